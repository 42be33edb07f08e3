"""What is wrong with the tensors of a checkpoint, gathered while a map is applied to it and told in one error."""

from dataclasses import dataclass, field
from typing import Final

from t5g2convert.checkpoint.families.config_section import SourceModel
from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor
from t5g2convert.checkpoint.foreign import describe
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.schema import Drop, WeightMap
from t5g2convert.mapping.weightmap import did_you_mean


@dataclass(slots=True)
class Collector:
    """Everything wrong, gathered while rows are resolved.

    Attributes:
        checkpoint: The checkpoint.
        model: What it is.
        used: Names that a row or a drop accounts for.
        missing: Names that a row wants and that are not there.
        misshapen: What else is wrong, in sentences.
        optional: Names that only an option would drop, which was not given, with their drops.
    """

    checkpoint: Checkpoint
    model: SourceModel
    used: set[str] = field(default_factory=set)
    missing: dict[str, None] = field(default_factory=dict)
    misshapen: list[str] = field(default_factory=list)
    optional: dict[str, Drop] = field(default_factory=dict)

    def take(self, name: str, *, carries: bool) -> StoredTensor | None:
        """A tensor, noted as used or as missing if that is accounted for."""
        tensor = self.checkpoint.tensors.get(name)
        if tensor is None:
            if carries:
                self.missing[name] = None
        elif carries:
            self.used.add(name)
        return tensor

    def finish(self, weight_map: WeightMap, *, whole: bool) -> None:
        """Tell everything that is wrong; of a checkpoint that need not be used whole, not what was left over."""
        unused = [name for name in self.checkpoint.tensors if name not in self.used] if whole else []
        if not (unused or self.missing or self.misshapen):
            return
        missing = list(self.missing)
        details = [f"missing: {name}{_nearest(name, unused)}" for name in missing[:MAX_NEAREST]]
        details += [f"missing: {name}" for name in missing[MAX_NEAREST:]]
        details += [f"unused: {name}{self._reason(name, missing)}" for name in unused[:MAX_NEAREST]]
        details += [f"unused: {name}" for name in unused[MAX_NEAREST:]]
        details += self.misshapen
        counts = {"missing": len(self.missing), "unused": len(unused), "misshapen": len(self.misshapen)}
        summary = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        raise CheckpointError(
            f"its tensors are not those of mapping {weight_map.name!r} and its config: {summary}",
            where=self.checkpoint.path,
            hint=describe(self.checkpoint, unused) or self._way_out(unused),
            details=details,
        )

    def _reason(self, name: str, missing: list[str]) -> str:
        drop = self.optional.get(name)
        return _nearest(name, missing) if drop is None else f" ({drop.because})"

    def _way_out(self, unused: list[str]) -> str | None:
        """The option that leaves the first such tensor out."""
        for name in unused:
            drop = self.optional.get(name)
            if drop is not None and drop.option is not None:
                return f"{name} is {drop.because}: {flag(drop.option)} leaves it out, and what it learned is lost"
        return None


MAX_NEAREST: Final = 50
"""For how many names of a kind the nearest one is looked up; the search is quadratic."""


def flag(option: str) -> str:
    """How the command line spells an option of a drop."""
    return f"--{option.replace('_', '-')}"


def _nearest(name: str, others: list[str]) -> str:
    hint = did_you_mean(name, others[:2000]) if others else None
    return f" ({hint})" if hint else ""
