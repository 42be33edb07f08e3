"""What is wrong with the tensors of a checkpoint, gathered while a map is applied to it and told in one error."""

from dataclasses import dataclass, field
from typing import Final

from t5g2convert.checkpoint.config import SourceModel
from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor
from t5g2convert.checkpoint.foreign import describe
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.weightmap import did_you_mean


@dataclass(slots=True)
class Collector:
    """Everything wrong, gathered while rows are resolved."""

    checkpoint: Checkpoint
    model: SourceModel
    used: set[str] = field(default_factory=set)
    missing: dict[str, None] = field(default_factory=dict)
    misshapen: list[str] = field(default_factory=list)

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
        details += [f"unused: {name}{_nearest(name, missing)}" for name in unused[:MAX_NEAREST]]
        details += [f"unused: {name}" for name in unused[MAX_NEAREST:]]
        details += self.misshapen
        counts = {"missing": len(self.missing), "unused": len(unused), "misshapen": len(self.misshapen)}
        summary = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
        raise CheckpointError(
            f"its tensors are not those of mapping {weight_map.name!r} and its config: {summary}",
            where=self.checkpoint.path,
            hint=describe(self.checkpoint, unused),
            details=details,
        )


MAX_NEAREST: Final = 50
"""For how many names of a kind the nearest one is looked up; the search is quadratic."""


def _nearest(name: str, others: list[str]) -> str:
    hint = did_you_mean(name, others[:2000]) if others else None
    return f" ({hint})" if hint else ""
