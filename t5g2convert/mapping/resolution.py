"""A map applied to one checkpoint: the spelling of its names, and the tensors of every row.

Every source tensor must be used or dropped, and every tensor that a row needs must exist with the shape and dtype that
the config implies. All problems are collected and raised as one error.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Final

from t5g2convert.checkpoint.altered_weights import check_plain, describe
from t5g2convert.checkpoint.families.config_section import SourceModel, describe_model_type
from t5g2convert.checkpoint.folder import Checkpoint, refuse_unheld, some
from t5g2convert.checkpoint.sources import DECODER_FROM, SOURCE, STACKS, VISION_FROM, Role, role_of
from t5g2convert.errors import CheckpointError, MappingError
from t5g2convert.mapping.name_patterns import expand, root_of
from t5g2convert.mapping.problems import Problems, flag, refuse_overlaps
from t5g2convert.mapping.row_resolution import (
    Resolved,
    ResolvedDrop,
    SourceView,
    UnusedSource,
    check_row,
    dropped_names,
    resolve_drop,
    resolve_target,
    unused_sources,
)
from t5g2convert.mapping.schema import Drop, Row, WeightMap
from t5g2convert.mapping.source_families import FAMILIES
from t5g2convert.mapping.stack_sources import (
    SOURCE_ONLY,
    Layers,
    StackSources,
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
    """A map applied to a source and to the other checkpoints of a conversion.

    Attributes:
        model: The source's model, with the vision tower of a donor if there is one.
        checkpoints: The checkpoints by role.
        models: Their models by role; the source's is `model`.
        layouts: The spelling of each root, by role.
        dims: Sizes, for `shape:` and for the range of `{layer}`.
        values: Config values, with token ids moved as the map declares.
        stacks: Config values of each text stack, by part: its parent's values, with the layers that it takes.
        table: The role of the checkpoint that gives the embedding table, and the table's rows before the cut.
        layers: The layers that each stack takes from its parent.
        targets: Every target tensor.
        drops: The source's tensors that the map drops; other checkpoints' tensors that an option drops; and tensors of
            the decoder's parent that must equal another tensor.
        unused_sources: The source's tensors that are not used because of an option.
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
    unused_sources: tuple[UnusedSource, ...]

    def role_of(self, part: str) -> Role:
        """Return the role of the checkpoint that provides a part."""
        return role_of(part, self.checkpoints, table=self.table[0])


SUBJECTS: Final[Mapping[Role, str]] = {
    DECODER_FROM: "the decoder's parent (--decoder-from)",
    VISION_FROM: "the donor (--vision-from)",
}
"""Names of the other checkpoints in errors."""


def resolve(
    loaded: LoadedMap,
    checkpoint: Checkpoint,
    stack_sources: StackSources = SOURCE_ONLY,
    *,
    subject: str = "the source",
    drop_options: Collection[str] = (),
) -> Resolution:
    """Apply a map to a checkpoint.

    Args:
        loaded: The map.
        checkpoint: The source.
        stack_sources: The other checkpoints, and what the target takes from each.
        subject: The checkpoint's name in errors.
        drop_options: The options of drops that the user gave, by their names in the map.

    Raises:
        CheckpointError: A checkpoint does not match its config; `details` lists every affected tensor.
        MappingError: The map does not convert this family, has no drop for an option, or the checkpoints do not fit
            each other.
    """
    weight_map = loaded.map
    for option in drop_options:
        if all(drop.option != option for drop in weight_map.drop):
            raise MappingError(f"{flag(option)} cannot be used with mapping {weight_map.name!r}: it has no such drop")
    model = read_model(weight_map, checkpoint, subject=subject)
    check_plain(checkpoint)
    check_map(weight_map, stack_sources)
    # Resolve each other checkpoint as a source first, so that it is refused for the same reasons as a source.
    others = {
        role: resolve(
            loaded, other, StackSources(rows=stack_sources.rows), subject=SUBJECTS[role], drop_options=drop_options
        )
        for role, other in stack_sources.others.items()
    }
    if VISION_FROM in others:
        model = model.with_vision_of(others[VISION_FROM].model, stack_sources.projector)
    dims = {**model.dims, "vocab": _kept_rows(weight_map, model.dims["rows"], stack_sources.rows)}
    values = _moved_values(weight_map, model, dims["vocab"], checkpoint)
    parents: dict[str, Mapping[str, Any]] = dict.fromkeys(STACKS, values)
    if DECODER_FROM in others:
        parents["decoder"] = others[DECODER_FROM].values
        check_fit(dims, values, others[DECODER_FROM].dims, parents["decoder"])
    models: dict[Role, SourceModel] = {SOURCE: model, **{role: other.model for role, other in others.items()}}
    checkpoints: dict[Role, Checkpoint] = {SOURCE: checkpoint, **stack_sources.others}
    layers = check_layers(stack_sources.layers, {part: depth_of(models[role_of(part, checkpoints)]) for part in STACKS})
    rows = [row for row in weight_map.weights if row.applies(model.features)]
    drops = [drop for drop in weight_map.drop if drop.applies(model.features)]
    views = _views(loaded, rows, drops, checkpoints, models, dims, others)
    targets, dropped = _resolve_rows(
        loaded, model, rows, drops, views, stack_sources.table, layers, drop_options, stack_sources.encoder_norm
    )
    return Resolution(
        model=model,
        checkpoints=checkpoints,
        models=models,
        layouts={role: view.layout for role, view in views.items()},
        dims=dims,
        values=values,
        stacks={part: stack_values(parents[part], layers.get(part)) for part in STACKS},
        table=(stack_sources.table, models[stack_sources.table].dims["rows"]),
        layers=layers,
        targets=targets,
        drops=(*dropped, *_drops_of_others(others)),
        unused_sources=tuple(unused_sources(_source_rows(rows, checkpoints), views[SOURCE], targets)),
    )


def _kept_rows(weight_map: WeightMap, rows: int, wanted: int | None) -> int:
    """Return how many rows of a table are kept: all if `wanted` is that number, otherwise those that the map keeps."""
    return rows if wanted == rows else weight_map.vocabulary.cut.get(rows, rows)


def _source_rows(rows: Iterable[Row], roles: Iterable[Role]) -> list[Row]:
    """Return the rows of the source, which must be complete even if another checkpoint gives the decoder."""
    others = {*roles} - {DECODER_FROM}
    return [row for row in rows if any(role_of(part, others) == SOURCE for part in row.to)]


def _views(
    loaded: LoadedMap,
    rows: Sequence[Row],
    drops: Sequence[Drop],
    checkpoints: Mapping[Role, Checkpoint],
    models: Mapping[Role, SourceModel],
    dims: Mapping[str, int],
    others: Mapping[Role, Resolution],
) -> dict[Role, SourceView]:
    """Return the checkpoints, each with its own spelling; the decoder's parent also with its own sizes."""
    layouts = {role: other.layouts[SOURCE] for role, other in others.items()}
    layouts[SOURCE] = _find_layout(loaded.map, _source_rows(rows, checkpoints), drops, dims, checkpoints[SOURCE])
    return {
        role: SourceView(
            role,
            layouts[role],
            others[role].dims if role == DECODER_FROM else dims,
            Problems(checkpoint, models[role]),
        )
        for role, checkpoint in checkpoints.items()
    }


def _resolve_rows(
    loaded: LoadedMap,
    model: SourceModel,
    rows: Sequence[Row],
    drops: Sequence[Drop],
    views: Mapping[Role, SourceView],
    table: Role,
    layers: Layers,
    drop_options: Collection[str],
    encoder_norm: float | None,
) -> tuple[tuple[Resolved, ...], tuple[ResolvedDrop, ...]]:
    """Return every target tensor, and the source's dropped tensors.

    Raises:
        CheckpointError: The tensors do not fit; the error lists all problems of a checkpoint.
        MappingError: Rows overlap, or match nothing.
    """
    prefixes = fill(loaded.map.target.roots, {}, model.features)
    layout = {**(views[VISION_FROM].layout if VISION_FROM in views else {}), **views[SOURCE].layout}
    tensors = {name: tensor for view in views.values() for name, tensor in view.problems.checkpoint.tensors.items()}
    refuse_overlaps(loaded, model.features, layout, prefixes, views[SOURCE].dims, tensors)
    targets = tuple(_targets(rows, views, prefixes, table, layers, encoder_norm))
    dropped = tuple(_dropped(drops, views[SOURCE], drop_options))
    for role, view in views.items():
        view.problems.raise_any(loaded.map, whole=role == SOURCE)
    return targets, dropped


def _targets(
    rows: Sequence[Row],
    views: Mapping[Role, SourceView],
    prefixes: Mapping[str, str],
    table: Role,
    layers: Layers,
    encoder_norm: float | None,
) -> Iterator[Resolved]:
    for row in _source_rows(rows, views):
        check_row(row, views[SOURCE])
    for row in rows:
        for role in dict.fromkeys(role_of(part, views, table=table) for part in row.to):
            check_row(row, views[role])
        for part, pattern in row.targets:
            role = role_of(part, views, table=table)
            factor = encoder_norm if row.encoder_norm and part == "encoder" else None
            for item in resolve_target(row, part, pattern, views[role], prefixes, layers.get(part)):
                yield replace(item, factor=factor)


def _dropped(drops: Iterable[Drop], source: SourceView, drop_options: Collection[str]) -> Iterator[ResolvedDrop]:
    """Yield the source's dropped tensors; refuse names in its index that no shard holds and no drop matches."""
    problems, droppable = source.problems, set[str]()
    for drop in drops:
        names = {name: drop for _, name in dropped_names(drop, source.layout, source.dims)}
        droppable.update(names)
        if drop.option is None or drop.option in drop_options:
            yield from resolve_drop(drop, source)
        else:
            problems.optional |= names
    refuse_unheld(problems.checkpoint, droppable)


def _drops_of_others(others: Mapping[Role, Resolution]) -> Iterator[ResolvedDrop]:
    """Yield tensors dropped by an option, and tensors of the decoder's parent dropped if they equal another."""
    for role, other in others.items():
        for drop in other.drops:
            if drop.drop.option is not None or (role == DECODER_FROM and drop.equals is not None):
                yield replace(drop, role=role)


def read_model(weight_map: WeightMap, checkpoint: Checkpoint, *, subject: str = "the source") -> SourceModel:
    """Read the source's model from its config.

    Raises:
        MappingError: The map is for other families.
        CheckpointError: The config cannot be converted.
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
    """Return the spelling of each root in a checkpoint.

    Raises:
        CheckpointError: A root has no known spelling, or several.
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
    """Return the spelling of each root of the rows; a root that only drops have may be absent."""
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
                hint="remove the outdated tensors",
            )
        layout[root] = found[0]
    return layout


def _moved_values(weight_map: WeightMap, model: SourceModel, vocab: int, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the source's values, with token ids beyond the target's table moved as the map declares."""
    values: dict[str, Any] = dict(model.values)
    for name, token in weight_map.vocabulary.moved.items():
        if values[name] >= vocab:
            if "vision" in model.features and token >= vocab:
                raise CheckpointError(
                    f"{name} is {values[name]}, beyond the {vocab} rows of the embedding table",
                    where=checkpoint.path / "config.json",
                )
            values[name] = token
    return values
