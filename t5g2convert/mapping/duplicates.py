"""What patterns hide until they are expanded: a tensor of two rows, a target of two rows, a row of nothing."""

from collections.abc import Collection, Iterable, Mapping

from t5g2convert.mapping.library import is_shipped
from t5g2convert.mapping.names import expand, root_of
from t5g2convert.mapping.strictyaml import NodePath
from t5g2convert.mapping.weightmap import LoadedMap, did_you_mean


def check_rows(
    loaded: LoadedMap,
    features: frozenset[str],
    layout: Mapping[str, str],
    prefixes: Mapping[str, str],
    dims: Mapping[str, int],
    tensors: Mapping[str, object],
) -> None:
    """Expand all rows of a map that apply to a checkpoint, and compare their names.

    Args:
        loaded: The map.
        features: What the checkpoint is, for `when:`.
        layout: The spelling found of each root.
        prefixes: The prefix of each root of the target.
        dims: Sizes, for the ranges of `{layer}`.
        tensors: The checkpoint's tensors by name.

    Raises:
        MappingError: A tensor is carried twice, or carried and dropped; a target is filled twice; a row of a map of
            one's own matches nothing. What a shipped map does not find is the checkpoint's fault.
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
            told = f"{names[0]} is not there" if len(names) == 1 else f"none of {names[0]} to {names[-1]} is there"
            hint = did_you_mean(names[0], tensors)
            raise loaded.document.error(f"the row matches nothing: {told}", (*at, "from"), hint=hint)
        if row.op.carries:
            _refuse(loaded, "another row carries {} already", names, carried, (*at, "from"))
            carried.update(names)
        for part, pattern in row.targets:
            targets = _names(pattern, prefixes, dims)
            _refuse(loaded, "another row fills {} already", targets, filled, (*at, "to", part))
            filled.update(targets)
    for position, drop in enumerate(loaded.map.drop):
        if not drop.applies(features):
            continue
        for number, pattern in enumerate(drop.patterns):
            root = root_of(pattern)
            names = _names(pattern, layout, dims) if root is None or root in layout else []
            _refuse(loaded, "a row carries {}", names, carried, ("drop", position, "from", number))


def _names(pattern: str | None, layout: Mapping[str, str], dims: Mapping[str, int]) -> list[str]:
    return [] if pattern is None else [name for _, name in expand(pattern, layout, dims)]


def _refuse(loaded: LoadedMap, told: str, names: Iterable[str], known: Collection[str], at: NodePath) -> None:
    """Raise at a place of the map if one of the names is known."""
    for name in names:
        if name in known:
            raise loaded.document.error(told.format(name), at)
