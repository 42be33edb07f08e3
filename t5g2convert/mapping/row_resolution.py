"""The tensors of a checkpoint for each row and drop of a map."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from t5g2convert.checkpoint.families.config_section import SourceModel
from t5g2convert.checkpoint.folder import StoredTensor
from t5g2convert.checkpoint.header import CONFIG_NAMES, TensorEntry
from t5g2convert.checkpoint.sources import EMBEDDING, SOURCE, Role
from t5g2convert.errors import MappingError
from t5g2convert.mapping.name_patterns import expand, root_of
from t5g2convert.mapping.operations import Size, TakeRows
from t5g2convert.mapping.problems import Problems
from t5g2convert.mapping.schema import Drop, Row


@dataclass(frozen=True, slots=True)
class Resolved:
    """One target tensor: its row, its source tensor (None for zeros), its shape, and its checkpoint's role."""

    row: Row
    part: str
    target: str
    source: StoredTensor | None
    shape: tuple[int, ...]
    role: Role
    factor: float | None = None


@dataclass(frozen=True, slots=True)
class ResolvedDrop:
    """A dropped tensor, the tensor that it must equal, and the role of the checkpoint of both."""

    drop: Drop
    tensor: StoredTensor
    equals: StoredTensor | None
    role: Role = SOURCE


@dataclass(frozen=True, slots=True)
class UnusedSource:
    """A source tensor with a row in the map that is not used because of an option."""

    tensor: StoredTensor
    because: str


@dataclass(frozen=True, slots=True)
class SourceView:
    """A checkpoint in its role, with the spelling of its roots, its sizes, and its problems."""

    role: Role
    layout: Mapping[str, str]
    dims: Mapping[str, int]
    problems: Problems


def _sizes(shape: Iterable[Size], dims: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(dims[size] if isinstance(size, str) else size for size in shape)


def check_row(row: Row, view: SourceView) -> None:
    """Check every tensor that a row names in a checkpoint, whether used or not, and collect the problems."""
    for _, name in () if row.from_ is None else expand(row.from_, view.layout, view.dims):
        _check_tensor(row, name, view)


def _check_tensor(row: Row, name: str, view: SourceView) -> None:
    problems = view.problems
    if name in problems.used or name in problems.missing:
        return
    tensor = problems.find(name, carries=row.op.carries)
    if tensor is None:
        return
    expected = _sizes(row.shape, view.dims)
    if tensor.entry.shape != expected:
        problems.misshapen.append(
            f"misshapen: {name} has shape {list(tensor.entry.shape)}, "
            f"expected {list(expected)} ({_shape_origin(row, problems.model)})"
        )
    elif isinstance(row.op, TakeRows) and (taken := _sizes(row.target_shape, view.dims)[0]) > expected[0]:
        problems.misshapen.append(f"misshapen: {name} has {expected[0]} rows, expected at least {taken}")
    if tensor.entry.dtype not in CONFIG_NAMES:
        problems.misshapen.append(
            f"misshapen: {name} has dtype {tensor.entry.dtype}, expected one of {', '.join(CONFIG_NAMES)}"
        )


def _shape_origin(row: Row, model: SourceModel) -> str:
    """Return a row's shape as the map writes it, and the fields of config.json that its dimensions come from."""
    shape = list(map(str, row.shape))
    fields = [f"{size} is {model.fields[size]}" for size in dict.fromkeys(shape) if size in model.fields]
    return "; ".join([", ".join(shape), ", ".join(fields)]) if fields else ", ".join(shape)


def resolve_target(
    row: Row, part: str, pattern: str, view: SourceView, prefixes: Mapping[str, str], layers: Sequence[int] | None
) -> Iterator[Resolved]:
    """Yield the tensors of one target pattern.

    Args:
        row: The row.
        part: The part of the target.
        pattern: The target's pattern.
        view: The checkpoint that provides the part.
        prefixes: The prefix of each root of the target.
        layers: The layers to take; the first becomes the target's layer 0. None takes all.
    """
    shape = _sizes(row.target_shape, view.dims)
    names = [None] if row.from_ is None else [name for _, name in expand(row.from_, view.layout, view.dims, layers)]
    numbers = None if layers is None else range(len(layers))
    for name, (_, target) in zip(names, expand(pattern, prefixes, view.dims, numbers), strict=True):
        tensor = None if name is None else view.problems.checkpoint.tensors.get(name)
        if name is None or tensor is not None:
            yield Resolved(row, part, target, tensor, shape, view.role)


def unused_sources(rows: Iterable[Row], source: SourceView, targets: Iterable[Resolved]) -> Iterator[UnusedSource]:
    """Yield the source tensors that rows carry but that no target uses, because of an option."""
    used = {
        item.source.entry.name
        for item in targets
        if item.source is not None and item.role == SOURCE and item.factor is None
    }
    for row in rows:
        if row.from_ is None or not row.op.carries:
            continue
        for layer, name in expand(row.from_, source.layout, source.dims):
            tensor = source.problems.checkpoint.tensors.get(name)
            if tensor is None or name in used:
                continue
            because = "the decoder is another checkpoint's" if layer is None else f"no stack takes layer {layer}"
            if row.encoder_norm:
                because += ", and the encoder's final norm is replaced"
            if EMBEDDING in row.to:
                because = "the embedding table is the decoder's parent's"
            yield UnusedSource(tensor, because)


def dropped_names(drop: Drop, layout: Mapping[str, str], dims: Mapping[str, int]) -> Iterator[tuple[int | None, str]]:
    """Yield all names that a drop matches, each with its layer; skip roots that the checkpoint lacks."""
    for pattern in drop.patterns:
        root = root_of(pattern)
        if root is None or root in layout:
            yield from expand(pattern, layout, dims)


def resolve_drop(drop: Drop, view: SourceView) -> Iterator[ResolvedDrop]:
    """Yield the tensors of a checkpoint that a drop matches.

    Raises:
        MappingError: The tensor that a dropped tensor must equal does not exist.
    """
    layout, dims, problems = view.layout, view.dims, view.problems
    tensors = problems.checkpoint.tensors
    others = _names_to_equal(drop, layout, dims)
    for index, name in dropped_names(drop, layout, dims):
        if name not in tensors:
            continue
        problems.used.add(name)
        equals = None
        if drop.must_equal is not None:
            other = others.get(index, others.get(None, drop.must_equal))
            if other in problems.missing:
                continue  # reported later with all missing tensors
            equals = tensors.get(other)
            if equals is None:
                raise MappingError(
                    f"{name} can be dropped only if it equals {other}, which is missing",
                    where=problems.checkpoint.path,
                )
            problems.misshapen += _incomparable(tensors[name].entry, equals.entry)
        yield ResolvedDrop(drop, tensors[name], equals)


def _names_to_equal(drop: Drop, layout: Mapping[str, str], dims: Mapping[str, int]) -> dict[int | None, str]:
    """Return the names that a drop must equal, by layer; skip roots that the checkpoint lacks."""
    root = None if drop.must_equal is None else root_of(drop.must_equal)
    if drop.must_equal is None or (root is not None and root not in layout):
        return {}
    return dict(expand(drop.must_equal, layout, dims))


def _incomparable(one: TensorEntry, other: TensorEntry) -> Iterator[str]:
    """Yield why a dropped tensor cannot equal the other one, judging by headers; bytes are compared later."""
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
