"""A map applied to one checkpoint: which spelling its names have, and which tensor every row stands for.

This is the closed world. Whatever does not fit is collected, all of it, and told in one error: source tensors that no
row uses, tensors that a row wants and that are missing, shapes and dtypes that are not what the config implies.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from t5g2convert.checkpoint.config import SourceModel, describe_model_type
from t5g2convert.checkpoint.dtypes import CONFIG_NAMES
from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor, some
from t5g2convert.checkpoint.roles import SOURCE, VISION_FROM, Role, role_of
from t5g2convert.errors import CheckpointError, MappingError
from t5g2convert.mapping.collector import Collector, foreign
from t5g2convert.mapping.collisions import check_rows
from t5g2convert.mapping.families import FAMILIES
from t5g2convert.mapping.names import expand, root_of
from t5g2convert.mapping.operations import Size, TakeRows
from t5g2convert.mapping.schema import Drop, Row, WeightMap
from t5g2convert.mapping.template import fill
from t5g2convert.mapping.weightmap import LoadedMap


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
    """A dropped tensor, and the one that it must repeat."""

    drop: Drop
    tensor: StoredTensor
    equals: StoredTensor | None


@dataclass(frozen=True, slots=True)
class Graft:
    """A donor of a vision tower, and how its projector comes to the source's width; see `SourceModel`."""

    donor: Checkpoint
    projector: str | None


@dataclass(frozen=True, slots=True)
class Resolution:
    """A map applied to a checkpoint, and to the donor of its vision tower if it has one.

    Attributes:
        model: What the target is made of.
        checkpoints: What is read, by role.
        layouts: By role, the spelling of each root.
        symbols: Sizes, for `shape:` and for the ranges of `{layer}`.
        values: Config values, those that the map moves already moved.
        targets: Every target tensor.
        drops: The source's tensors that are left behind.
    """

    model: SourceModel
    checkpoints: Mapping[Role, Checkpoint]
    layouts: Mapping[Role, Mapping[str, str]]
    symbols: Mapping[str, int]
    values: Mapping[str, Any]
    targets: tuple[Resolved, ...]
    drops: tuple[ResolvedDrop, ...]


def resolve(
    loaded: LoadedMap, checkpoint: Checkpoint, graft: Graft | None = None, *, subject: str = "the source"
) -> Resolution:
    """Apply a map to a checkpoint.

    Args:
        loaded: The map.
        checkpoint: The source.
        graft: Where the vision tower of a source without images comes from.
        subject: What the checkpoint is called where it does not fit the map.

    Raises:
        CheckpointError: A checkpoint is not what its config implies; `details` lists every tensor concerned.
        MappingError: The map does not convert this family, or the graft does not fit.
    """
    weight_map = loaded.map
    model = read_model(weight_map, checkpoint, subject=subject)
    checkpoints: dict[Role, Checkpoint] = {SOURCE: checkpoint}
    layouts: dict[Role, Mapping[str, str]] = {}
    if graft is not None:
        # A world of its own: whatever would refuse the donor as a source refuses it as a donor.
        donor = resolve(loaded, graft.donor, subject="the donor of --vision-from")
        model = model.with_vision_of(donor.model, graft.projector)
        checkpoints[VISION_FROM], layouts[VISION_FROM] = graft.donor, donor.layouts[SOURCE]
    symbols = {**model.symbols, "vocab": weight_map.vocabulary.cut.get(model.symbols["rows"], model.symbols["rows"])}
    values = _moved_values(weight_map, model, symbols["vocab"], checkpoint)
    rows = [(row, role_of(row.to, checkpoints)) for row in weight_map.weights if row.applies(model.conditions)]
    own = [row for row, role in rows if role == SOURCE]
    drops = [drop for drop in weight_map.drop if drop.applies(model.conditions)]
    layouts[SOURCE] = _find_layout(weight_map, own, drops, symbols, checkpoint)
    tensors = {name: tensor for each in checkpoints.values() for name, tensor in each.tensors.items()}
    prefixes = fill(weight_map.target.roots, {}, model.conditions)
    layout = {**layouts.get(VISION_FROM, {}), **layouts[SOURCE]}
    check_rows(loaded, model.conditions, layout, prefixes, symbols, tensors)
    collectors = {role: Collector(each, model) for role, each in checkpoints.items()}
    targets = [
        item
        for row, role in rows
        for item in _resolve_row(row, role, layouts[role], prefixes, symbols, collectors[role])
    ]
    dropped = [item for drop in drops for item in _resolve_drop(drop, layouts[SOURCE], symbols, collectors[SOURCE])]
    for role, collector in collectors.items():
        collector.finish(weight_map, whole=role == SOURCE)
    return Resolution(model, checkpoints, layouts, symbols, values, tuple(targets), tuple(dropped))


def read_model(weight_map: WeightMap, checkpoint: Checkpoint, *, subject: str = "the source") -> SourceModel:
    """The source model as its config describes it.

    Raises:
        MappingError: The map is for other families.
        CheckpointError: The config is not one that can be converted.
    """
    model_type = checkpoint.config.get("model_type")
    if model_type not in weight_map.source.model_type:
        raise MappingError(
            f"mapping {weight_map.name!r} converts {', '.join(weight_map.source.model_type)}; "
            f"{subject} is {describe_model_type(checkpoint.config)}",
            where=checkpoint.path,
        )
    return FAMILIES[str(model_type)].read(checkpoint.config, checkpoint.path / "config.json")


def find_layout(weight_map: WeightMap, model: SourceModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Which spelling of each root a checkpoint has.

    Raises:
        CheckpointError: None, or two of them.
    """
    rows = [row for row in weight_map.weights if row.applies(model.conditions)]
    return _find_layout(weight_map, rows, (), model.symbols, checkpoint)


def _find_layout(
    weight_map: WeightMap,
    rows: Iterable[Row],
    drops: Iterable[Drop],
    symbols: Mapping[str, int],
    checkpoint: Checkpoint,
) -> dict[str, str]:
    """The spelling of each root that a row has; of one that only drops have, if there is anything to drop."""
    layout: dict[str, str] = {}
    patterns: dict[str, list[str]] = {}
    for row in rows:
        if row.from_ is not None and (root := root_of(row.from_)) is not None:
            patterns.setdefault(root, []).append(row.from_)
    needed = set(patterns)
    for drop in drops:
        if (root := root_of(drop.from_)) is not None and root not in needed:
            patterns.setdefault(root, []).append(drop.from_)
    for root, wanted in patterns.items():
        spellings = weight_map.roots[root]
        hits = {
            spelling: sum(
                name in checkpoint.tensors
                for pattern in wanted
                for _, name in expand(pattern, {root: spelling}, symbols)
            )
            for spelling in spellings
        }
        found = [spelling for spelling in spellings if hits[spelling]]
        if not found and root not in needed:
            continue
        if not found:
            raise CheckpointError(
                f"holds no {root} tensors under any known spelling; it holds {some(checkpoint.tensors)}",
                where=checkpoint.path,
                hint=foreign(checkpoint.tensors) or f"known prefixes: {', '.join(map(repr, spellings))}",
            )
        if len(found) > 1:
            counts = ", ".join(f"{hits[spelling]} as {spelling!r}" for spelling in found)
            raise CheckpointError(
                f"spells its {root} tensors in more than one way: {counts}",
                where=checkpoint.path,
                hint="remove the tensors that are out of date",
            )
        layout[root] = found[0]
    return layout


def _moved_values(weight_map: WeightMap, model: SourceModel, vocab: int, checkpoint: Checkpoint) -> dict[str, Any]:
    """The source's values, with the token ids that lie past the end of the target's table moved into it."""
    values: dict[str, Any] = dict(model.values)
    for name, token in weight_map.vocabulary.moved.items():
        if values[name] >= vocab:
            if "vision" in model.conditions and token >= vocab:
                raise CheckpointError(
                    f"{name} is {values[name]}, past the {vocab} rows of the embedding table",
                    where=checkpoint.path / "config.json",
                )
            values[name] = token
    return values


def _sizes(shape: Iterable[Size], symbols: Mapping[str, int]) -> tuple[int, ...]:
    return tuple(symbols[size] if isinstance(size, str) else size for size in shape)


def _resolve_row(
    row: Row,
    role: Role,
    layout: Mapping[str, str],
    prefixes: Mapping[str, str],
    symbols: Mapping[str, int],
    collector: Collector,
) -> Iterable[Resolved]:
    shape = _sizes(row.target_shape, symbols)
    names = [None] if row.from_ is None else [name for _, name in expand(row.from_, layout, symbols)]
    for part, pattern in row.targets:
        for name, (_, target) in zip(names, expand(pattern, prefixes, symbols), strict=True):
            if name is None:
                yield Resolved(row, part, target, None, shape, role)
            elif (tensor := _checked(row, name, symbols, collector)) is not None:
                yield Resolved(row, part, target, tensor, shape, role)


def _checked(row: Row, name: str, symbols: Mapping[str, int], collector: Collector) -> StoredTensor | None:
    """The tensor of a row if it is there with the right shape and dtype; what is wrong is collected once."""
    known = name in collector.used or name in collector.missing
    tensor = collector.take(name, carries=row.op.carries) if not known else collector.checkpoint.tensors.get(name)
    if tensor is None or known:
        return tensor
    expected = _sizes(row.shape, symbols)
    if tensor.entry.shape != expected:
        collector.misshapen.append(
            f"misshapen: {name} has shape {list(tensor.entry.shape)}, "
            f"expected {list(expected)} ({_implied_by(row, collector.model)})"
        )
    elif isinstance(row.op, TakeRows) and (taken := _sizes(row.target_shape, symbols)[0]) > expected[0]:
        collector.misshapen.append(f"misshapen: {name} has {expected[0]} rows, of which {taken} cannot be taken")
    if tensor.entry.dtype not in CONFIG_NAMES:
        collector.misshapen.append(
            f"misshapen: {name} has dtype {tensor.entry.dtype}, expected one of {', '.join(CONFIG_NAMES)}"
        )
    return tensor


def _implied_by(row: Row, model: SourceModel) -> str:
    """Where a row's shape comes from: its symbols, and the fields of config.json that they are made of."""
    fields = [f"{size} is {model.fields[size]}" for size in dict.fromkeys(map(str, row.shape)) if size in model.fields]
    return "; ".join([", ".join(map(str, row.shape)), ", ".join(fields)]) if fields else ", ".join(map(str, row.shape))


def _resolve_drop(
    drop: Drop, layout: Mapping[str, str], symbols: Mapping[str, int], collector: Collector
) -> Iterable[ResolvedDrop]:
    root = root_of(drop.from_)
    if root is not None and root not in layout:
        return
    tensors = collector.checkpoint.tensors
    others = _names_to_equal(drop, layout, symbols)
    for index, name in expand(drop.from_, layout, symbols):
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
        yield ResolvedDrop(drop, tensors[name], equals)


def _names_to_equal(drop: Drop, layout: Mapping[str, str], symbols: Mapping[str, int]) -> dict[int | None, str]:
    """The names that a drop must equal, by layer; none where the source has nothing under their root."""
    root = None if drop.must_equal is None else root_of(drop.must_equal)
    if drop.must_equal is None or (root is not None and root not in layout):
        return {}
    return dict(expand(drop.must_equal, layout, symbols))
