"""From a map and a checkpoint's headers to a plan."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final, Unpack

from t5g2convert.checkpoint.config import ConfigSection, ImpliedTensor, Token, parse_section
from t5g2convert.checkpoint.dtypes import BY_CONFIG_NAME, CONFIG_NAMES, element_bytes, tensor_bits
from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor
from t5g2convert.checkpoint.hub import Origin, read_held
from t5g2convert.checkpoint.roles import SOURCE, VISION_FROM, Role, named, role_in
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.checkpoint.targets import implied_tensors, target_of
from t5g2convert.conversion.files import plan_files
from t5g2convert.conversion.layout import Draft, lay_out
from t5g2convert.conversion.notes import plan_notes
from t5g2convert.conversion.options import KEEP, Options, PlanOptions
from t5g2convert.conversion.plan import (
    Change,
    Content,
    Dropped,
    Kind,
    Plan,
    PlannedAlignment,
    PlannedSource,
    PlannedTable,
    PlannedTensor,
    SourceConfig,
    SourceFile,
    SourceRange,
)
from t5g2convert.conversion.vocabulary import shared_rows
from t5g2convert.errors import CheckpointError, MappingError
from t5g2convert.mapping.library import find_map, map_for
from t5g2convert.mapping.names import expand
from t5g2convert.mapping.operations import Aligned, Copy, ScaledRow, TakeRows, Zeros
from t5g2convert.mapping.resolve import Graft, Resolution, Resolved, resolve
from t5g2convert.mapping.schema import WeightMap, count_parameters
from t5g2convert.mapping.template import fill
from t5g2convert.mapping.weightmap import LoadedMap, did_you_mean


def build_plan(source: Origin, **options: Unpack[PlanOptions]) -> Plan:
    """Plan a conversion from headers alone.

    Args:
        source: A Gemma 3 or Gemma 2 checkpoint folder; a str may also be a model of the Hub, org/name[@revision].
        options: What decides the output's bytes beside it; see `Options`.

    Raises:
        CheckpointError: The source or the donor is not sound, or is not what its config implies.
        HubError: The Hub does not have a model or give it out, or cannot be reached.
        MappingError: The map is faulty, does not fill the target, or an option does not fit this model.
        UsageError: An argument has no meaning.
    """
    wanted = Options(**options)
    sources = Sources.open(source, wanted.vision_from)
    checkpoint = sources.source
    loaded = (
        find_map(wanted.mapping)
        if wanted.mapping is not None
        else map_for(checkpoint.config, checkpoint.path / "config.json", extracts=wanted.part)
    )
    return plan_checkpoint(checkpoint, loaded, wanted, donor=sources.vision_from)


def plan_checkpoint(
    checkpoint: Checkpoint, loaded: LoadedMap, options: Options, *, donor: Checkpoint | None = None
) -> Plan:
    """Plan the conversion of a checkpoint that is open already, with the tower of a donor; see `build_plan`."""
    weight_map = loaded.map
    resolution = resolve(loaded, checkpoint, None if donor is None else Graft(donor, options.projector))
    _check_requirements(loaded, resolution, options)
    cast_to = None if options.dtype == KEEP else BY_CONFIG_NAME[options.dtype]
    model_dtype = cast_to or _dominant_dtype(resolution.targets)
    settings = options.settings(resolution.model, weight_map)
    values = {
        **resolution.values, **settings, "vocab": resolution.symbols["vocab"], "dtype": CONFIG_NAMES[model_dtype],
    }  # fmt: skip
    config = fill(weight_map.config, values, resolution.model.conditions)
    generation = _generation_values(checkpoint, values)
    drafts = [_draft(item, resolution, weight_map, options, cast_to) for item in resolution.targets]
    drafts = [replace(draft, dtype=draft.dtype or model_dtype) for draft in drafts]
    _check_target(drafts, config, loaded)
    changes = tuple(_changes(resolution, drafts, config, loaded, model_dtype))
    beside = plan_files(weight_map, resolution)
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
        dropped=tuple(
            Dropped(
                drop.tensor.entry.name,
                drop.drop.because,
                _whole(drop.tensor),
                None if drop.equals is None else _whole(drop.equals),
            )
            for drop in resolution.drops
        ),
        changes=changes,
        tied={name: item.target for item in resolution.targets for name in item.row.tied},
        files=beside.files,
        tokens=beside.tokens,
        config=config,
        generation_config=(
            None
            if weight_map.generation_config is None
            else fill(weight_map.generation_config, generation, resolution.model.conditions)
        ),
        notes=(
            *plan_notes(resolution, drafts, changes, options, weight_map, config),
            *beside.notes,
        ),
    )


def _check_requirements(loaded: LoadedMap, resolution: Resolution, options: Options) -> None:
    """What the target cannot be otherwise, and what cannot be asked of a part that is taken out."""
    for name, needed in loaded.map.requires.items():
        if (found := resolution.values[name]) != needed:
            raise CheckpointError(
                f"{name} is {found!r}; mapping {loaded.map.name!r} can convert {needed!r} only",
                where=resolution.checkpoints[SOURCE].path / "config.json",
            )
    asked = options.record().keys() - {"dtype", "max_shard_bytes"}
    if loaded.map.extracts is not None and asked:
        raise MappingError(f"{', '.join(sorted(asked))}: what is taken out of a model keeps its settings")


def _effective(options: Options, resolution: Resolution) -> dict[str, Any]:
    """The options that the manifest keeps, with the choices that were left to the tool."""
    made = (name.removeprefix("projector_") for name in resolution.model.conditions if name.startswith("projector_"))
    return {**options.record(), **({"projector": next(made)} if VISION_FROM in resolution.checkpoints else {})}


def _source(role: Role, resolution: Resolution, tensors: Sequence[PlannedTensor]) -> PlannedSource:
    """A checkpoint as the plan reads it: the source whole, of another only the files with something for the target."""
    checkpoint = resolution.checkpoints[role]
    read = {span.file for tensor in tensors for span in tensor.content.spans}
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


def _draft(
    item: Resolved, resolution: Resolution, weight_map: WeightMap, options: Options, cast_to: str | None
) -> Draft:
    """The content of one target. A constant gets the model's dtype later; everything else keeps or casts its own."""
    operation = item.row.op
    source_dtype = "" if item.source is None else item.source.entry.dtype
    target_dtype = cast_to or source_dtype
    match operation:
        case Copy() | TakeRows():
            assert item.source is not None, "the schema gives every row but zeros a source"
            start = item.source.entry.start
            kind: Kind = "copy" if target_dtype == source_dtype else "cast"
            end = start + tensor_bits(source_dtype, item.shape) // 8
            content = Content(kind, SourceRange(named(item.role, item.source.file), start, end), source_dtype)
        case ScaledRow():
            assert item.source is not None, "the schema gives every row but zeros a source"
            content = _scaled_row(operation, item.source, resolution.symbols)
        case Zeros():
            content = Content("zeros", None, target_dtype)
        case Aligned():
            assert item.source is not None, "the schema gives every row but zeros a source"
            alignment = _alignment(operation, resolution, weight_map, options.ridge)
            content = Content("aligned", _whole(item.source, item.role), source_dtype, alignment)
        case _:
            raise NotImplementedError(f"no content for {operation!r}")
    return Draft(
        item.target,
        item.part,
        target_dtype,
        item.shape,
        None if item.source is None else item.source.entry.name,
        content,
        item.row.merged_attention,
    )


def _scaled_row(operation: ScaledRow, source: StoredTensor, symbols: Mapping[str, int]) -> Content:
    token = operation.scaled_row
    row = symbols[token] if isinstance(token, str) else token
    entry = source.entry
    if not 0 <= row < entry.shape[0]:
        return Content("zeros", None, entry.dtype)
    width = entry.shape[1] * element_bytes(entry.dtype)
    start = entry.start + row * width
    return Content("scaled_row", SourceRange(source.file, start, start + width), entry.dtype)


def _alignment(operation: Aligned, resolution: Resolution, weight_map: WeightMap, ridge: float) -> PlannedAlignment:
    tables = []
    for role in (VISION_FROM, SOURCE):
        ((_, name),) = expand(operation.aligned.tables, resolution.layouts[role], {})
        stored = resolution.checkpoints[role].tensors[name]
        tables.append(PlannedTable(name, _whole(stored, role), stored.entry.dtype, *stored.entry.shape))
    donor, target = tables
    return PlannedAlignment(donor, target, shared_rows(resolution, weight_map, donor.rows), ridge)


def _whole(tensor: StoredTensor, role: Role = SOURCE) -> SourceRange:
    return SourceRange(named(role, tensor.file), tensor.entry.start, tensor.entry.end)


def _dominant_dtype(targets: Iterable[Resolved]) -> str:
    """The dtype that most of the source's bytes have; config.json can name only one, and a donor does not decide it."""
    counted: Counter[str] = Counter()
    for item in targets:
        if item.source is not None and item.role == SOURCE:
            counted[item.source.entry.dtype] += tensor_bits(item.source.entry.dtype, item.shape) // 8
    return max(counted, key=lambda dtype: (counted[dtype], dtype))


def _generation_values(checkpoint: Checkpoint, values: Mapping[str, Any]) -> dict[str, Any]:
    """The end tokens of the source's generation_config.json win over those of its config.json: -it models have more."""
    path = checkpoint.path / "generation_config.json"
    generation = read_held(checkpoint, path.name)
    if generation is None:
        return dict(values)
    tokens = parse_section(_Generation, generation, path).eos_token_id
    return {**values, **({} if tokens is None else {"eos_token_id": tokens})}


class _Generation(ConfigSection):
    eos_token_id: Token | list[Token] | None = None


def _check_target(drafts: Sequence[Draft], config: Mapping[str, Any], loaded: LoadedMap) -> None:
    """Every tensor that the target's config implies must be filled exactly once, in its shape.

    The list of implied tensors does not come from the map, so a map that forgets a tensor is found out here.
    """
    implied = {item.name: item for item in implied_tensors(config, loaded.path)}
    filled = Counter(draft.name for draft in drafts)
    details = [f"filled {count} times: {name}" for name, count in filled.items() if count > 1]
    unfilled = [name for name in implied if name not in filled]
    unknown = [name for name in filled if name not in implied]
    details += [f"not filled: {name}{_suggest(name, unknown)}" for name in unfilled]
    details += [f"not in the target: {name}{_suggest(name, unfilled)}" for name in unknown]
    details += [_mismatch(draft, implied[draft.name]) for draft in drafts if _differs(draft, implied.get(draft.name))]
    if details:
        raise MappingError(
            f"mapping {loaded.map.name!r} does not fill the target that its config describes: {len(details)} fault(s)",
            where=loaded.path,
            details=details,
        )


def _differs(draft: Draft, implied: ImpliedTensor | None) -> bool:
    return implied is not None and (draft.shape != implied.shape or draft.part != implied.part)


def _mismatch(draft: Draft, implied: ImpliedTensor) -> str:
    return (
        f"misshapen: {draft.name} would be {draft.part} {list(draft.shape)}, "
        f"expected {implied.part} {list(implied.shape)}"
    )


def _suggest(name: str, others: Sequence[str]) -> str:
    hint = did_you_mean(name, others) if len(others) <= 50 else None
    return f" ({hint})" if hint else ""


def _changes(
    resolution: Resolution, drafts: Sequence[Draft], config: Mapping[str, Any], loaded: LoadedMap, model_dtype: str
) -> Iterable[Change]:
    """What the target's config does not have from the source; verification takes these for declared."""
    given = {(span.file, draft.content.dtype) for draft in drafts for span in draft.content.spans[:1]}
    cast = sorted({(role_in(file) != SOURCE, CONFIG_NAMES[dtype]) for file, dtype in given if dtype != model_dtype})
    if cast and all(draft.dtype == model_dtype for draft in drafts):
        told = ", ".join(f"the donor's {dtype}" if donated else dtype for donated, dtype in cast)
        yield Change("dtype", told, CONFIG_NAMES[model_dtype])
    rows, vocab = resolution.symbols["rows"], resolution.symbols["vocab"]
    if vocab != rows:
        yield Change("vocab_size", rows, vocab)
    for name, before in resolution.model.values.items():
        if resolution.values[name] != before:
            yield Change(name, before, resolution.values[name])
    for path, name in _WRITTEN_OUT.items():
        for stack in target_of(config, loaded.path).stacks if name in resolution.model.values else ():
            before, after = resolution.model.values[name], _setting(config, stack + path)
            if after is not None and after != before:
                yield Change(stack + path, before, after)


_WRITTEN_OUT: Final = {
    "rope_parameters.full_attention.factor": "rope_full_factor",
    "rope_parameters.full_attention.rope_theta": "rope_full_theta",
    "rope_parameters.sliding_attention.rope_theta": "rope_sliding_theta",
    "rope_parameters.factor": "rope_factor",
    "rope_parameters.rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
    "max_position_embeddings": "max_position_embeddings",
}
"""Settings of a stack, by path, that a map may write out in place of the source's: those of long contexts."""


def _setting(config: Mapping[str, Any], path: str) -> Any:
    """The value at a path of keys in a config, None where there is none."""
    node: Any = config
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node
