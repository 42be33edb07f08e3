"""What rows and drops of a map take of a checkpoint."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from t5g2convert.checkpoint.dtypes import CONFIG_NAMES
from t5g2convert.checkpoint.families.config_section import SourceModel
from t5g2convert.checkpoint.folder import StoredTensor
from t5g2convert.checkpoint.header import TensorEntry
from t5g2convert.checkpoint.inputs import EMBEDDING, SOURCE, Role
from t5g2convert.errors import MappingError
from t5g2convert.mapping.names import expand, root_of
from t5g2convert.mapping.operations import Size, TakeRows
from t5g2convert.mapping.problems import Collector
from t5g2convert.mapping.schema import Drop, Row


@dataclass(frozen=True, slots=True)
class Resolved:
    """One target tensor: the row that it comes from, its source tensor (None for zeros), its shape, and the role of the
    checkpoint that holds the source tensor."""

    row: Row
    part: str
    target: str
    source: StoredTensor | None
    shape: tuple[int, ...]
    role: Role


@dataclass(frozen=True, slots=True)
class ResolvedDrop:
    """A dropped tensor, the one that it must repeat, and the role of the checkpoint that holds both."""

    drop: Drop
    tensor: StoredTensor
    equals: StoredTensor | None
    role: Role = SOURCE


@dataclass(frozen=True, slots=True)
class LeftBehind:
    """A tensor that the map knows and that an option leaves behind."""

    tensor: StoredTensor
    because: str


@dataclass(frozen=True, slots=True)
class Side:
    """One of the checkpoints, as rows read it."""

    role: Role
    layout: Mapping[str, str]
    dims: Mapping[str, int]
    collector: Collector


def _sizes(shape: Iterable[Size], dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(dims[size] if isinstance(size, str) else size for size in shape)


def look(row: Row, side: Side) -> None:
    """Look at all tensors that a row names of a checkpoint, whichever of them are taken; what is wrong is collected."""
    for _, name in () if row.from_ is None else expand(row.from_, side.layout, side.dims):
        _check(row, name, side)


def resolve_target(
    row: Row, part: str, pattern: str, side: Side, prefixes: Mapping[str, str], layers: Sequence[int] | None
) -> Iterator[Resolved]:
    """The tensors of one target pattern.

    Args:
        row: The row.
        part: The part that they belong to.
        pattern: The pattern.
        side: The checkpoint that the part is read from.
        prefixes: The prefix of each root of the target.
        layers: The layers that are taken, if not all: the first becomes the target's layer 0.
    """
    shape = _sizes(row.target_shape, side.dims)
    names = [None] if row.from_ is None else [name for _, name in expand(row.from_, side.layout, side.dims, layers)]
    numbers = None if layers is None else range(len(layers))
    for name, (_, target) in zip(names, expand(pattern, prefixes, side.dims, numbers), strict=True):
        tensor = None if name is None else side.collector.checkpoint.tensors.get(name)
        if name is None or tensor is not None:
            yield Resolved(row, part, target, tensor, shape, side.role)


def left_behind(rows: Iterable[Row], source: Side, targets: Iterable[Resolved]) -> Iterator[LeftBehind]:
    """The source's tensors that rows carry, and that an option leaves behind."""
    taken = {item.source.entry.name for item in targets if item.source is not None and item.role == SOURCE}
    for row in rows:
        if row.from_ is None or not row.op.carries:
            continue
        for layer, name in expand(row.from_, source.layout, source.dims):
            tensor = source.collector.checkpoint.tensors.get(name)
            if tensor is None or name in taken:
                continue
            because = "the decoder is another checkpoint's" if layer is None else f"no stack takes layer {layer}"
            if EMBEDDING in row.to:
                because = "the embedding table is the decoder's parent's"
            yield LeftBehind(tensor, because)


def _check(row: Row, name: str, side: Side) -> None:
    """Whether the tensor of a row is there with the right shape and dtype; what is wrong is collected once."""
    collector = side.collector
    if name in collector.used or name in collector.missing:
        return
    tensor = collector.take(name, carries=row.op.carries)
    if tensor is None:
        return
    expected = _sizes(row.shape, side.dims)
    if tensor.entry.shape != expected:
        collector.misshapen.append(
            f"misshapen: {name} has shape {list(tensor.entry.shape)}, "
            f"expected {list(expected)} ({_implied_by(row, collector.model)})"
        )
    elif isinstance(row.op, TakeRows) and (taken := _sizes(row.target_shape, side.dims)[0]) > expected[0]:
        collector.misshapen.append(f"misshapen: {name} has {expected[0]} rows, of which {taken} cannot be taken")
    if tensor.entry.dtype not in CONFIG_NAMES:
        collector.misshapen.append(
            f"misshapen: {name} has dtype {tensor.entry.dtype}, expected one of {', '.join(CONFIG_NAMES)}"
        )


def _implied_by(row: Row, model: SourceModel) -> str:
    """Where a row's shape comes from: its dims, and the fields of config.json that they are made of."""
    fields = [f"{size} is {model.fields[size]}" for size in dict.fromkeys(map(str, row.shape)) if size in model.fields]
    return "; ".join([", ".join(map(str, row.shape)), ", ".join(fields)]) if fields else ", ".join(map(str, row.shape))


def dropped_names(drop: Drop, layout: Mapping[str, str], dims: Mapping[str, int]) -> Iterator[tuple[int | None, str]]:
    """All names that a drop stands for, each with its layer; none of a root that the checkpoint does not have."""
    for pattern in drop.patterns:
        root = root_of(pattern)
        if root is None or root in layout:
            yield from expand(pattern, layout, dims)


def resolve_drop(drop: Drop, side: Side) -> Iterator[ResolvedDrop]:
    """The tensors of a checkpoint that a drop leaves behind."""
    layout, dims, collector = side.layout, side.dims, side.collector
    tensors = collector.checkpoint.tensors
    others = _names_to_equal(drop, layout, dims)
    for index, name in dropped_names(drop, layout, dims):
        if name not in tensors:
            continue
        collector.used.add(name)
        equals = None
        if drop.must_equal is not None:
            other = others.get(index, others.get(None, drop.must_equal))
            if other in collector.missing:
                continue  # it is told with everything that is missing
            equals = tensors.get(other)
            if equals is None:
                raise MappingError(
                    f"{name} can be dropped only if it equals {other}, which is not there",
                    where=collector.checkpoint.path,
                )
            collector.misshapen += _unlike(tensors[name].entry, equals.entry)
        yield ResolvedDrop(drop, tensors[name], equals)


def _unlike(one: TensorEntry, other: TensorEntry) -> Iterator[str]:
    """Why a dropped tensor cannot repeat the other one, as far as headers tell; what is left is for the bytes."""
    if one.shape != other.shape:
        yield (
            f"misshapen: {one.name} has shape {list(one.shape)}, but it must repeat {other.name} of shape "
            f"{list(other.shape)}"
        )
    elif one.dtype != other.dtype and one.dtype not in CONFIG_NAMES:
        yield (
            f"misshapen: {one.name} has dtype {one.dtype}, but it must repeat {other.name} of dtype {other.dtype}; "
            f"only {', '.join(CONFIG_NAMES)} can be compared with it"
        )


def _names_to_equal(drop: Drop, layout: Mapping[str, str], dims: Mapping[str, int]) -> dict[int | None, str]:
    """The names that a drop must equal, by layer; none where the source has nothing under their root."""
    root = None if drop.must_equal is None else root_of(drop.must_equal)
    if drop.must_equal is None or (root is not None and root not in layout):
        return {}
    return dict(expand(drop.must_equal, layout, dims))
