"""Problems of a map applied to a checkpoint: rows that overlap, and tensors that do not fit."""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from t5g2convert.checkpoint.altered_weights import describe
from t5g2convert.checkpoint.families.config_section import SourceModel
from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.library import is_shipped
from t5g2convert.mapping.name_patterns import expand, root_of
from t5g2convert.mapping.schema import Drop, WeightMap
from t5g2convert.mapping.strictyaml import NodePath
from t5g2convert.mapping.weightmap import LoadedMap, did_you_mean

MAX_NEAREST: Final = 50
"""Maximum number of names of a kind for which to suggest the nearest name; the search is quadratic."""


@dataclass(slots=True)
class Problems:
    """The problems of one checkpoint's tensors, collected while rows are resolved and raised as one error.

    Attributes:
        checkpoint: The checkpoint.
        model: Its model.
        used: Names that a row or a drop uses.
        missing: Names that a row needs but the checkpoint lacks, in order.
        misshapen: Other problems, as sentences.
        optional: Names that would be dropped with an option that was not passed, and the drop of each.
    """

    checkpoint: Checkpoint
    model: SourceModel
    used: set[str] = field(default_factory=set)
    missing: dict[str, None] = field(default_factory=dict)
    misshapen: list[str] = field(default_factory=list)
    optional: dict[str, Drop] = field(default_factory=dict)

    def find(self, name: str, *, carries: bool) -> StoredTensor | None:
        """Return a tensor, and record its name as missing, or as used if the row carries it."""
        tensor = self.checkpoint.tensors.get(name)
        if carries and tensor is None:
            self.missing[name] = None
        elif carries:
            self.used.add(name)
        return tensor

    def raise_any(self, weight_map: WeightMap, *, whole: bool) -> None:
        """Raise one error that lists all problems; unused tensors are a problem only if the checkpoint is `whole`."""
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
            f"its tensors do not match mapping {weight_map.name!r} and its config: {summary}",
            where=self.checkpoint.path,
            hint=describe(self.checkpoint, unused) or self._drop_hint(unused),
            details=details,
        )

    def _reason(self, name: str, missing: list[str]) -> str:
        drop = self.optional.get(name)
        return _nearest(name, missing) if drop is None else f" ({drop.because})"

    def _drop_hint(self, unused: list[str]) -> str | None:
        for name in unused:
            drop = self.optional.get(name)
            if drop is not None and drop.option is not None:
                return f"{name} is {drop.because}: {flag(drop.option)} drops it, and loses what it learned"
        return None


def flag(option: str) -> str:
    """Return a drop's option as it is written on the command line."""
    return f"--{option.replace('_', '-')}"


def _nearest(name: str, others: list[str]) -> str:
    hint = did_you_mean(name, others[:2000]) if others else None
    return f" ({hint})" if hint else ""


def refuse_overlaps(
    loaded: LoadedMap,
    features: frozenset[str],
    layout: Mapping[str, str],
    prefixes: Mapping[str, str],
    dims: Mapping[str, int],
    tensors: Mapping[str, object],
) -> None:
    """Refuse a map with rows that overlap once their patterns are expanded, or that match nothing.

    Args:
        loaded: The map.
        features: The source's features, for `when:`.
        layout: The spelling of each root.
        prefixes: The prefix of each root of the target.
        dims: The source's sizes, for the range of `{layer}`.
        tensors: The checkpoint's tensors by name.

    Raises:
        MappingError: Two rows carry one tensor or fill one target, a carried tensor is dropped, or a row of a map that
            is not shipped matches nothing. If a row of a shipped map matches nothing, the checkpoint is at fault.
    """
    own = not is_shipped(loaded.path)
    carried: set[str] = set()
    filled: set[str] = set()
    for position, row in enumerate(loaded.map.weights):
        if not row.applies(features):
            continue
        at: NodePath = ("weights", position)
        names = _names(row.from_, layout, dims)
        if own and names and not any(name in tensors for name in names):
            message = f"{names[0]} does not exist" if len(names) == 1 else f"{names[0]} to {names[-1]} do not exist"
            hint = did_you_mean(names[0], tensors)
            raise loaded.document.error(f"the row matches nothing: {message}", (*at, "from"), hint=hint)
        if row.op.carries:
            _refuse_known(loaded, "another row carries {} already", names, carried, (*at, "from"))
            carried.update(names)
        for part, pattern in row.targets:
            targets = _names(pattern, prefixes, dims)
            _refuse_known(loaded, "another row fills {} already", targets, filled, (*at, "to", part))
            filled.update(targets)
    for position, drop in enumerate(loaded.map.drop):
        if not drop.applies(features):
            continue
        for number, pattern in enumerate(drop.patterns):
            root = root_of(pattern)
            names = _names(pattern, layout, dims) if root is None or root in layout else []
            _refuse_known(loaded, "a row carries {}", names, carried, ("drop", position, "from", number))


def _names(pattern: str | None, layout: Mapping[str, str], dims: Mapping[str, int]) -> list[str]:
    return [] if pattern is None else [name for _, name in expand(pattern, layout, dims)]


def _refuse_known(loaded: LoadedMap, message: str, names: Iterable[str], known: Collection[str], at: NodePath) -> None:
    for name in names:
        if name in known:
            raise loaded.document.error(message.format(name), at)
