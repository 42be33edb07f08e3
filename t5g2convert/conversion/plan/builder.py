"""Build the plan of a conversion from a map and the headers of the checkpoints."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from t5g2convert.checkpoint.families.registry import expected_tensors
from t5g2convert.checkpoint.file_names import GENERATION_FILE
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.header import BY_CONFIG_NAME, CONFIG_NAMES, tensor_bits
from t5g2convert.checkpoint.hub.open_and_fetch import Origin
from t5g2convert.checkpoint.sources import DECODER_FROM, SOURCE, STACKS, VISION_FROM, Role, Sources, named
from t5g2convert.checkpoint.tokenizer.files import Tokenizer
from t5g2convert.command_options import takes_options
from t5g2convert.conversion.assets.aux_files import plan_files
from t5g2convert.conversion.assets.generation_config import generation_config, given_generation
from t5g2convert.conversion.option_values import KEEP
from t5g2convert.conversion.options import TABLES, PlanOptions
from t5g2convert.conversion.plan.changes import declared_changes, target_values
from t5g2convert.conversion.plan.drafts import Draft, draft_tensor, whole_range
from t5g2convert.conversion.plan.notes import has_head, plan_notes, tied
from t5g2convert.conversion.plan.rows import kept_rows
from t5g2convert.conversion.plan.sharding import lay_out
from t5g2convert.conversion.plan.source_files import account_for, left_notes
from t5g2convert.conversion.plan.types import (
    Dropped,
    Plan,
    PlannedSource,
    PlannedTensor,
    Repeated,
    SourceConfig,
    SourceFile,
)
from t5g2convert.conversion.plan.vocabulary import check_names
from t5g2convert.errors import CheckpointError, MappingError
from t5g2convert.mapping.library import find_map, map_for
from t5g2convert.mapping.resolution import Resolution, resolve
from t5g2convert.mapping.row_resolution import Resolved
from t5g2convert.mapping.schema import WeightMap, count_parameters
from t5g2convert.mapping.stack_sources import StackSources
from t5g2convert.mapping.template import fill
from t5g2convert.mapping.weightmap import LoadedMap, did_you_mean


@takes_options(PlanOptions)
def plan(source: Origin, options: PlanOptions) -> Plan:
    """Plan a conversion; read only the headers of the weights.

    Example:
        >>> plan("google/gemma-3-270m", encoder_layers="first:9").parameters["encoder"]

    Args:
        source: A Gemma 3 or Gemma 2 checkpoint folder; a str may also name a model on the Hub, org/name[@revision].
        options: As keyword arguments; see `PlanOptions`.

    Raises:
        CheckpointError: A checkpoint is damaged, or does not match its config.
        HubError: The Hub does not have a model, refuses access, or cannot be reached.
        MappingError: The map is faulty, does not fill the target, or an option does not fit this model.
        UsageError: An option has an impossible value.
    """
    return build_plan(open_sources(source, options), options)


def open_sources(source: Origin, options: PlanOptions) -> Sources:
    """Open the checkpoints that a conversion reads; only their headers are read."""
    return Sources.open(source, decoder_from=options.decoder_from, vision_from=options.vision_from)


def build_plan(sources: Sources, options: PlanOptions, loaded: LoadedMap | None = None) -> Plan:
    """Plan the conversion of checkpoints that are already open; see `plan`.

    Args:
        sources: The checkpoints.
        options: The options. Their checkpoints are not opened again.
        loaded: The map, if it differs from the options' map.
    """
    if loaded is None:
        loaded = _find_map(sources.source, options)
    weight_map = loaded.map
    if options.part is not None and options.part != weight_map.extracts:
        takes = f"extracts the {weight_map.extracts}" if weight_map.extracts else "converts whole models"
        raise MappingError(f"mapping {weight_map.name!r} {takes}, not the {options.part}")
    table = TABLES[options.embedding_from]
    tokenizer = Tokenizer(sources.source)
    kept = kept_rows(weight_map, sources.by_role, table, tokenizer, keep=options.keep_rows)
    stack_sources = StackSources(
        sources.others, options.projector, table, options.layers, kept.rows, options.encoder_factor
    )
    resolution = resolve(loaded, sources.source, stack_sources, drop_options=options.drops)
    _check_requirements(loaded, resolution, options)
    _check_heads(resolution)
    if DECODER_FROM in resolution.checkpoints:
        check_names(resolution, DECODER_FROM, "the decoder's parent")
    cast_to = None if options.dtype == KEEP else BY_CONFIG_NAME[options.dtype]
    model_dtype = cast_to or _dominant_dtype(resolution.targets)
    values = target_values(resolution, options, weight_map, CONFIG_NAMES[model_dtype])
    config = fill(weight_map.config, values, resolution.model.features)
    drafts = [draft_tensor(item, resolution, weight_map, options, cast_to) for item in resolution.targets]
    drafts = [replace(draft, dtype=draft.dtype or model_dtype) for draft in drafts]
    _check_target(drafts, config, loaded)
    changes = tuple(declared_changes(resolution, drafts, config, loaded, model_dtype))
    beside = plan_files(weight_map, resolution, tokenizer)
    items = account_for(sources.source, beside.files)
    tensors, shards = lay_out(drafts, options.max_shard_bytes)
    counted: Counter[str] = Counter()
    for tensor in tensors:
        counted[tensor.part] += tensor.elements
    return Plan(
        mapping=weight_map.name,
        mapping_sha256=loaded.sha256,
        options=_effective(options, resolution),
        sources={role: _source(role, resolution, tensors) for role in resolution.checkpoints},
        dtype=CONFIG_NAMES[model_dtype],
        parameters=count_parameters(counted),
        tensors=tensors,
        shards=shards,
        dropped=tuple(_dropped(resolution)),
        changes=changes,
        tied={name: item.target for item in resolution.targets for name in item.row.tied},
        files=beside.files,
        tokens=beside.tokens,
        config=config,
        generation_config=_generation(resolution, weight_map, values),
        notes=(
            *plan_notes(resolution, drafts, changes, options, weight_map, config),
            *kept.notes,
            *beside.notes,
            *left_notes(items),
        ),
        source_items=items,
    )


def _find_map(source: Checkpoint, options: PlanOptions) -> LoadedMap:
    if options.mapping is not None:
        return find_map(options.mapping)
    return map_for(source.config, source.path / "config.json", extracts=options.part)


def _check_requirements(loaded: LoadedMap, resolution: Resolution, options: PlanOptions) -> None:
    """Refuse sources that the map cannot convert, and options that cannot be used when a part is extracted."""
    parents = {SOURCE: resolution.values, resolution.role_of("decoder"): resolution.stacks["decoder"]}
    for name, template in loaded.map.requires.items():
        for role, values in parents.items():
            needed = fill(template, values, resolution.models[role].features)
            if (found := values[name]) != needed:
                raise CheckpointError(
                    f"{name} is {found!r}; mapping {loaded.map.name!r} can convert {needed!r} only",
                    where=resolution.checkpoints[role].path / "config.json",
                )
    asked = options.record().keys() - {"dtype", "max_shard_bytes"}
    if loaded.map.extracts is not None and asked:
        raise MappingError(f"{', '.join(sorted(asked))}: cannot be used when extracting an encoder or decoder")


def _check_heads(resolution: Resolution) -> None:
    """Refuse a model that lacks the separate head that its config describes."""
    for role, checkpoint in resolution.checkpoints.items():
        if role != VISION_FROM and not tied(resolution, role) and not has_head(resolution, role):
            raise CheckpointError(
                "tie_word_embeddings is false, but lm_head.weight is missing: transformers would make a random head",
                where=checkpoint.path / "config.json",
                hint="remove tie_word_embeddings if the head is tied to the embedding, or add the head's weights",
            )


def _dropped(resolution: Resolution) -> Iterator[Dropped]:
    """Yield the tensors that the map and the options drop."""
    for drop in resolution.drops:
        entry, other = drop.tensor.entry, drop.equals
        repeated = None
        if other is not None:
            repeated = Repeated(named(drop.role, other.entry.name), whole_range(other, drop.role), other.entry.dtype)
        content = whole_range(drop.tensor, drop.role)
        yield Dropped(
            named(drop.role, entry.name), drop.drop.because, content, entry.dtype, entry.shape, must_equal=repeated
        )
    for left in resolution.unused_sources:
        entry = left.tensor.entry
        yield Dropped(entry.name, left.because, whole_range(left.tensor), entry.dtype, entry.shape)


def _effective(options: PlanOptions, resolution: Resolution) -> dict[str, Any]:
    """Return the options to record: with the choices made for the user, without options that had no effect."""
    made = (name.removeprefix("projector_") for name in resolution.model.features if name.startswith("projector_"))
    idle = {f"{part}_layers" for part in STACKS if part not in resolution.layers}
    idle |= options.drops - {drop.drop.option for drop in resolution.drops}
    recorded = {name: value for name, value in options.record().items() if name not in idle}
    return {**recorded, **({"projector": next(made)} if VISION_FROM in resolution.checkpoints else {})}


def _source(role: Role, resolution: Resolution, tensors: Sequence[PlannedTensor]) -> PlannedSource:
    """Return a checkpoint as the plan reads it: all files of the source, but only needed files of other checkpoints."""
    checkpoint = resolution.checkpoints[role]
    read = {span.file for tensor in tensors for span in tensor.content.spans}
    # A tensor that must equal another is compared with it, so its file is read too.
    read |= {
        named(drop.role, stored.file)
        for drop in resolution.drops
        for stored in (drop.tensor, drop.equals)
        if drop.equals is not None and stored is not None
    }
    return PlannedSource(
        name=checkpoint.name,
        family=str(checkpoint.config["model_type"]),
        layout=dict(resolution.layouts[role]),
        config=SourceConfig(len(checkpoint.config_text), hashlib.sha256(checkpoint.config_text).hexdigest()),
        files=tuple(
            SourceFile(named(role, name), header.identity)
            for name, header in checkpoint.files.items()
            if role == SOURCE or named(role, name) in read
        ),
        hub=checkpoint.hub,
    )


def _dominant_dtype(targets: Iterable[Resolved]) -> str:
    """Return the dtype of most of the parents' bytes, not counting the tower: config.json can name only one."""
    counted: Counter[str] = Counter()
    for item in targets:
        if item.source is not None and item.role != VISION_FROM:
            counted[item.source.entry.dtype] += tensor_bits(item.source.entry.dtype, item.shape) // 8
    return max(counted, key=lambda dtype: (counted[dtype], dtype))


def _generation(resolution: Resolution, weight_map: WeightMap, values: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return generation_config.json of the decoder's parent, since the decoder generates."""
    if weight_map.generation_config is None:
        return None
    checkpoint = resolution.checkpoints[resolution.role_of("decoder")]
    before = resolution.model.values
    moves = {
        int(before[name]): int(resolution.values[name])  # type: ignore[arg-type]
        for name in weight_map.vocabulary.moved
        if before[name] != resolution.values[name]
    }
    gaps = fill(weight_map.generation_config, values, resolution.model.features)
    where = checkpoint.path / GENERATION_FILE
    return generation_config(given_generation(checkpoint), gaps, moves, resolution.dims["vocab"], where)


def _check_target(drafts: Sequence[Draft], config: Mapping[str, Any], loaded: LoadedMap) -> None:
    """Require that a plan fills every tensor that the target's config implies exactly once, in the right shape.

    The list of implied tensors does not come from the map, so this check finds tensors that a map forgets.
    """
    implied = {item.name: item for item in expected_tensors(config, loaded.path)}
    filled = Counter(draft.name for draft in drafts)
    details = [f"filled {count} times: {name}" for name, count in filled.items() if count > 1]
    unfilled = [name for name in implied if name not in filled]
    unknown = [name for name in filled if name not in implied]
    details += [f"not filled: {name}{_suggest(name, unknown)}" for name in unfilled]
    details += [f"not in the target: {name}{_suggest(name, unfilled)}" for name in unknown]
    for draft, expected in ((draft, implied[draft.name]) for draft in drafts if draft.name in implied):
        if (draft.shape, draft.part) != (expected.shape, expected.part):
            found, wanted = (f"{item.part} {list(item.shape)}" for item in (draft, expected))
            details.append(f"wrong shape: {draft.name} would be {found}, expected {wanted}")
    if details:
        raise MappingError(
            f"mapping {loaded.map.name!r} does not match the target's config: {len(details)} fault(s)",
            where=loaded.path,
            details=details,
        )


def _suggest(name: str, others: Sequence[str]) -> str:
    hint = did_you_mean(name, others) if len(others) <= 50 else None
    return f" ({hint})" if hint else ""
