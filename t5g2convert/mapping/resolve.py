"""A map applied to one checkpoint: which spelling its names have, and which tensor every row stands for.

This is the closed variant. Whatever does not fit is collected, all of it, and told in one error: source tensors that no
row uses, tensors that a row wants and that are missing, shapes and dtypes that are not what the config implies.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from t5g2convert.checkpoint.families.config_section import SourceModel, describe_model_type
from t5g2convert.checkpoint.folder import Checkpoint, refuse_unheld, some
from t5g2convert.checkpoint.foreign import check_plain, describe
from t5g2convert.checkpoint.inputs import DECODER_FROM, SOURCE, STACKS, VISION_FROM, Role, role_of
from t5g2convert.errors import CheckpointError, MappingError
from t5g2convert.mapping.duplicates import check_rows
from t5g2convert.mapping.names import expand, root_of
from t5g2convert.mapping.problems import Collector, flag
from t5g2convert.mapping.row_resolution import (
    LeftBehind,
    Resolved,
    ResolvedDrop,
    Side,
    dropped_names,
    left_behind,
    look,
    resolve_drop,
    resolve_target,
)
from t5g2convert.mapping.schema import Drop, Row, WeightMap
from t5g2convert.mapping.source_families import FAMILIES
from t5g2convert.mapping.stack_sources import (
    ALONE,
    Layers,
    Pairing,
    check_fit,
    check_layers,
    check_map,
    depth_of,
    stack_values,
)
from t5g2convert.mapping.template import fill
from t5g2convert.mapping.weightmap import LoadedMap


@dataclass(frozen=True, slots=True)
class Resolution:
    """A map applied to a checkpoint, and to the others that a conversion reads.

    Attributes:
        model: What the target is made of: the source, with the tower of a donor if it has one.
        checkpoints: What is read, by role.
        models: What each is; the source's is `model`.
        layouts: By role, the spelling of each root.
        dims: Sizes, for `shape:` and for the ranges of `{layer}`.
        values: Config values, those that the map moves already moved.
        stacks: The same by part, for the text stacks: those of its own parent, with the layers that it takes.
        table: The role of the checkpoint that gives the embedding table, and its rows before the cut.
        layers: What each stack takes of its parent.
        targets: Every target tensor.
        drops: The source's tensors that are left behind by the map; of other checkpoints those that an option drops,
            and of the decoder's parent those that must repeat another.
        left: The source's tensors that are left behind by an option.
    """

    model: SourceModel
    checkpoints: Mapping[Role, Checkpoint]
    models: Mapping[Role, SourceModel]
    layouts: Mapping[Role, Mapping[str, str]]
    dims: Mapping[str, int]
    values: Mapping[str, Any]
    stacks: Mapping[str, Mapping[str, Any]]
    table: tuple[Role, int]
    layers: Layers
    targets: tuple[Resolved, ...]
    drops: tuple[ResolvedDrop, ...]
    left: tuple[LeftBehind, ...]

    def role_of(self, part: str) -> Role:
        """The role of the checkpoint that a part is read from."""
        return role_of(part, self.checkpoints, table=self.table[0])


SUBJECTS: Final[Mapping[Role, str]] = {
    DECODER_FROM: "the decoder's parent of --decoder-from",
    VISION_FROM: "the donor of --vision-from",
}
"""What other checkpoints are called where they do not fit the map."""


def resolve(
    loaded: LoadedMap,
    checkpoint: Checkpoint,
    pairing: Pairing = ALONE,
    *,
    subject: str = "the source",
    given: Collection[str] = (),
) -> Resolution:
    """Apply a map to a checkpoint.

    Args:
        loaded: The map.
        checkpoint: The source.
        pairing: What the target is made of beside it.
        subject: What the checkpoint is called where it does not fit the map.
        given: Options that drops wait for, by their names in the map.

    Raises:
        CheckpointError: A checkpoint is not what its config implies; `details` lists every tensor concerned.
        MappingError: The map does not convert this family, has no drop for an option, or the checkpoints do not fit
            each other.
    """
    weight_map = loaded.map
    for option in given:
        if all(drop.option != option for drop in weight_map.drop):
            raise MappingError(f"{flag(option)} is not for mapping {weight_map.name!r}: it has no such drop")
    model = read_model(weight_map, checkpoint, subject=subject)
    check_plain(checkpoint)
    check_map(weight_map, pairing)
    # Variants of their own: whatever would refuse another checkpoint as a source refuses it here.
    variants = {
        role: resolve(loaded, other, Pairing(rows=pairing.rows), subject=SUBJECTS[role], given=given)
        for role, other in pairing.others.items()
    }
    if VISION_FROM in variants:
        model = model.with_vision_of(variants[VISION_FROM].model, pairing.projector)
    dims = {**model.dims, "vocab": _rows_of(weight_map, model.dims["rows"], pairing.rows)}
    values = _moved_values(weight_map, model, dims["vocab"], checkpoint)
    models: dict[Role, SourceModel] = {SOURCE: model}
    parents: dict[str, Mapping[str, Any]] = dict.fromkeys(STACKS, values)
    for role, variant in variants.items():
        models[role] = variant.model
        if role == DECODER_FROM:
            check_fit(dims, values, variant.dims, variant.values)
            parents["decoder"] = variant.values
    checkpoints: dict[Role, Checkpoint] = {SOURCE: checkpoint, **pairing.others}
    depths = {part: depth_of(models[role_of(part, checkpoints)]) for part in STACKS}
    layers = check_layers(pairing.layers, depths)
    rows = [row for row in weight_map.weights if row.applies(model.features)]
    drops = [drop for drop in weight_map.drop if drop.applies(model.features)]
    sides = _sides(loaded, rows, drops, checkpoints, models, dims, variants)
    prefixes = fill(weight_map.target.roots, {}, model.features)
    layout = {**(sides[VISION_FROM].layout if VISION_FROM in sides else {}), **sides[SOURCE].layout}
    tensors = {name: tensor for each in checkpoints.values() for name, tensor in each.tensors.items()}
    check_rows(loaded, model.features, layout, prefixes, dims, tensors)
    targets = tuple(_targets(rows, sides, prefixes, pairing.table, layers))
    dropped = list(_dropped(drops, sides[SOURCE], given))
    for role, side in sides.items():
        side.collector.finish(weight_map, whole=role == SOURCE)
    return Resolution(
        model=model,
        checkpoints=checkpoints,
        models=models,
        layouts={role: side.layout for role, side in sides.items()},
        dims=dims,
        values=values,
        stacks={part: stack_values(parents[part], layers.get(part)) for part in STACKS},
        table=(pairing.table, models[pairing.table].dims["rows"]),
        layers=layers,
        targets=targets,
        drops=(*dropped, *_drops_of_others(variants)),
        left=tuple(left_behind(_own(rows, checkpoints), sides[SOURCE], targets)),
    )


def _rows_of(weight_map: WeightMap, rows: int, wanted: int | None) -> int:
    """The rows that are left of a table: those that are wanted where it can have so many, else what the map keeps."""
    kept = weight_map.vocabulary.cut.get(rows, rows)
    return rows if wanted == rows else kept


def _dropped(drops: Iterable[Drop], source: Side, given: Collection[str]) -> Iterator[ResolvedDrop]:
    """What is left behind by the map; and a look at what the source's index names and no shard holds."""
    collector, droppable = source.collector, set[str]()
    for drop in drops:
        names = {name: drop for _, name in dropped_names(drop, source.layout, source.dims)}
        droppable.update(names)
        if drop.option is None or drop.option in given:
            yield from resolve_drop(drop, source)
        else:
            collector.optional |= names
    refuse_unheld(collector.checkpoint, droppable)


def _own(rows: Iterable[Row], roles: Iterable[Role]) -> list[Row]:
    """The rows that a source must have the tensors of: it is whole, even where another checkpoint gives the decoder."""
    others = {*roles} - {DECODER_FROM}
    return [row for row in rows if any(role_of(part, others) == SOURCE for part in row.to)]


def _sides(
    loaded: LoadedMap,
    rows: Sequence[Row],
    drops: Sequence[Drop],
    checkpoints: Mapping[Role, Checkpoint],
    models: Mapping[Role, SourceModel],
    dims: Mapping[str, int],
    variants: Mapping[Role, Resolution],
) -> dict[Role, Side]:
    """The checkpoints, each with its own spelling; the decoder's parent has its own sizes too."""
    layouts = {role: variant.layouts[SOURCE] for role, variant in variants.items()}
    layouts[SOURCE] = _find_layout(loaded.map, _own(rows, checkpoints), drops, dims, checkpoints[SOURCE])
    return {
        role: Side(
            role,
            layouts[role],
            variants[role].dims if role == DECODER_FROM else dims,
            Collector(checkpoint, models[role]),
        )
        for role, checkpoint in checkpoints.items()
    }


def _targets(
    rows: Sequence[Row], sides: Mapping[Role, Side], prefixes: Mapping[str, str], table: Role, layers: Layers
) -> Iterator[Resolved]:
    """Every target tensor, behind a look at all tensors that rows name."""
    for row in _own(rows, sides):
        look(row, sides[SOURCE])
    for row in rows:
        for role in dict.fromkeys(role_of(part, sides, table=table) for part in row.to):
            look(row, sides[role])
        for part, pattern in row.targets:
            role = role_of(part, sides, table=table)
            yield from resolve_target(row, part, pattern, sides[role], prefixes, layers.get(part))


def _drops_of_others(variants: Mapping[Role, Resolution]) -> Iterator[ResolvedDrop]:
    """What is dropped by an option; and what the decoder's parent drops because it repeats another tensor, which is
    yet to be compared."""
    for role, variant in variants.items():
        for drop in variant.drops:
            if drop.drop.option is not None or (role == DECODER_FROM and drop.equals is not None):
                yield replace(drop, role=role)


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
    family, where = FAMILIES[str(model_type)], checkpoint.path / "config.json"
    if family.read_held is not None:
        return family.read_held(checkpoint.config, where, checkpoint.tensors)
    return family.read(checkpoint.config, where)


def find_layout(weight_map: WeightMap, model: SourceModel, checkpoint: Checkpoint) -> dict[str, str]:
    """Which spelling of each root a checkpoint has.

    Raises:
        CheckpointError: None, or two of them.
    """
    rows = [row for row in weight_map.weights if row.applies(model.features)]
    return _find_layout(weight_map, rows, (), model.dims, checkpoint)


def _find_layout(
    weight_map: WeightMap,
    rows: Iterable[Row],
    drops: Iterable[Drop],
    dims: Mapping[str, int],
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
        for pattern in drop.patterns:
            if (root := root_of(pattern)) is not None and root not in needed:
                patterns.setdefault(root, []).append(pattern)
    for root, wanted in patterns.items():
        spellings = weight_map.roots[root]
        hits = {
            spelling: sum(
                name in checkpoint.tensors for pattern in wanted for _, name in expand(pattern, {root: spelling}, dims)
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
                hint=describe(checkpoint, checkpoint.tensors) or f"known prefixes: {', '.join(map(repr, spellings))}",
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
            if "vision" in model.features and token >= vocab:
                raise CheckpointError(
                    f"{name} is {values[name]}, past the {vocab} rows of the embedding table",
                    where=checkpoint.path / "config.json",
                )
            values[name] = token
    return values
