"""From a map and a checkpoint's headers to a plan."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.config import ConfigSection, Token, parse_section
from t5g2convert.checkpoint.dtypes import BY_CONFIG_NAME, CONFIG_NAMES, element_bytes, tensor_bits
from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor, open_checkpoint, read_json_object
from t5g2convert.checkpoint.t5gemma2 import ImpliedTensor, implied_tensors, read_t5gemma2
from t5g2convert.conversion.layout import Draft, lay_out
from t5g2convert.conversion.plan import (
    DEFAULT_SHARD_BYTES,
    Change,
    Content,
    Dropped,
    Kind,
    Plan,
    SourceConfig,
    SourceFile,
    SourceRange,
)
from t5g2convert.errors import CheckpointError, MappingError, UsageError
from t5g2convert.mapping.library import find_map, map_for
from t5g2convert.mapping.operations import Copy, ScaledRow, TakeRows, Zeros
from t5g2convert.mapping.resolve import Resolution, Resolved, resolve
from t5g2convert.mapping.schema import WeightMap, count_parameters
from t5g2convert.mapping.template import fill
from t5g2convert.mapping.weightmap import LoadedMap, did_you_mean

KEEP: Final = "keep"
"""`--dtype` that changes nothing."""


def build_plan(
    source: Path, *, mapping: str | None = None, dtype: str = KEEP, max_shard_bytes: int = DEFAULT_SHARD_BYTES
) -> Plan:
    """Plan a conversion from headers alone.

    Args:
        source: A Gemma 3 checkpoint folder.
        mapping: Name of a shipped map or path of one's own; by default the shipped one for the source's model type.
        dtype: `keep`, or `bfloat16`, `float16` or `float32` to cast all tensors to.
        max_shard_bytes: Largest size of one output file's tensors, in bytes.

    Raises:
        CheckpointError: The source is not sound, or is not what its config implies.
        MappingError: The map is faulty, or does not fill the target.
        UsageError: An argument has no meaning.
    """
    if dtype != KEEP and dtype not in BY_CONFIG_NAME:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"expected {KEEP}, {', '.join(BY_CONFIG_NAME)}")
    if max_shard_bytes < 1:
        raise UsageError(f"a shard of at most {max_shard_bytes} bytes holds nothing")
    checkpoint = open_checkpoint(source)
    loaded = find_map(mapping) if mapping is not None else map_for(checkpoint.config, source / "config.json")
    return plan_checkpoint(checkpoint, loaded, dtype=dtype, max_shard_bytes=max_shard_bytes)


def plan_checkpoint(checkpoint: Checkpoint, loaded: LoadedMap, *, dtype: str, max_shard_bytes: int) -> Plan:
    """Plan the conversion of a checkpoint that is open already; see `build_plan`."""
    weight_map = loaded.map
    resolution = resolve(loaded, checkpoint)
    if resolution.values["attention_bias"]:
        raise CheckpointError(
            "attention_bias is true, but the attention's tensors have no biases", where=checkpoint.path / "config.json"
        )
    model_dtype = BY_CONFIG_NAME[dtype] if dtype != KEEP else _dominant_dtype(resolution.targets)
    values = {**resolution.values, "vocab": resolution.symbols["vocab"], "dtype": CONFIG_NAMES[model_dtype]}
    config = fill(weight_map.config, values, resolution.model.conditions)
    generation = _generation_values(checkpoint, values)
    drafts = [_draft(item, resolution, None if dtype == KEEP else model_dtype) for item in resolution.targets]
    drafts = [replace(draft, dtype=draft.dtype or model_dtype) for draft in drafts]
    changes = tuple(_changes(resolution, drafts, config, model_dtype))
    _check_target(drafts, config, loaded)
    tensors, shards = lay_out(drafts, max_shard_bytes)
    counted: Counter[str] = Counter()
    for tensor in tensors:
        counted[tensor.part] += tensor.elements
    return Plan(
        mapping=weight_map.name,
        mapping_sha256=loaded.sha256,
        source=checkpoint.name,
        family=resolution.model.family,
        layout=dict(resolution.layout),
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
        source_files=tuple(SourceFile(name, header.identity) for name, header in checkpoint.files.items()),
        source_config=SourceConfig(len(checkpoint.config_text), hashlib.sha256(checkpoint.config_text).hexdigest()),
        carried_files=_carried_files(weight_map, checkpoint),
        config=config,
        generation_config=fill(weight_map.generation_config, generation, resolution.model.conditions),
        notes=tuple(_notes(checkpoint, resolution, drafts, changes, model_dtype, kept=dtype == KEEP)),
    )


def _draft(item: Resolved, resolution: Resolution, cast_to: str | None) -> Draft:
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
            content = Content(kind, SourceRange(item.source.file, start, end), source_dtype)
        case ScaledRow():
            assert item.source is not None, "the schema gives every row but zeros a source"
            content = _scaled_row(operation, item.source, resolution.symbols)
        case Zeros():
            content = Content("zeros", None, target_dtype)
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


def _whole(tensor: StoredTensor) -> SourceRange:
    return SourceRange(tensor.file, tensor.entry.start, tensor.entry.end)


def _dominant_dtype(targets: Iterable[Resolved]) -> str:
    """The dtype that most of the model's bytes have; config.json can name only one."""
    counted: Counter[str] = Counter()
    for item in targets:
        if item.source is not None:
            counted[item.source.entry.dtype] += tensor_bits(item.source.entry.dtype, item.shape) // 8
    return max(counted, key=lambda dtype: (counted[dtype], dtype))


def _generation_values(checkpoint: Checkpoint, values: Mapping[str, Any]) -> dict[str, Any]:
    """The end tokens of the source's generation_config.json win over those of its config.json: -it models have more."""
    path = checkpoint.path / "generation_config.json"
    if not checkpoint.holds(path.name):
        return dict(values)
    generation = read_json_object(path)
    tokens = parse_section(_Generation, generation, path).eos_token_id
    return {**values, **({} if tokens is None else {"eos_token_id": tokens})}


class _Generation(ConfigSection):
    eos_token_id: Token | list[Token] | None = None


def _check_target(drafts: Sequence[Draft], config: Mapping[str, Any], loaded: LoadedMap) -> None:
    """Every tensor that the target's config implies must be filled exactly once, in its shape.

    The list of implied tensors does not come from the map, so a map that forgets a tensor is found out here.
    """
    implied = {item.name: item for item in implied_tensors(read_t5gemma2(config, loaded.path))}
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


def _carried_files(weight_map: WeightMap, checkpoint: Checkpoint) -> tuple[str, ...]:
    return tuple(name for name in weight_map.files.carry if checkpoint.holds(name))


def _changes(
    resolution: Resolution, drafts: Sequence[Draft], config: Mapping[str, Any], model_dtype: str
) -> Iterable[Change]:
    """What the target's config does not have from the source; verification takes these for declared."""
    cast = sorted({draft.content.dtype for draft in drafts if draft.content.kind != "zeros"} - {model_dtype})
    if cast and all(draft.dtype == model_dtype for draft in drafts):
        yield Change("dtype", ", ".join(CONFIG_NAMES[dtype] for dtype in cast), CONFIG_NAMES[model_dtype])
    rows, vocab = resolution.symbols["rows"], resolution.symbols["vocab"]
    if vocab != rows:
        yield Change("vocab_size", rows, vocab)
    for name, before in resolution.model.values.items():
        if resolution.values[name] != before:
            yield Change(name, before, resolution.values[name])
    for path, name in _WRITTEN_OUT.items():
        for stack in ("encoder.text_config", "decoder"):
            before, after = resolution.model.values[name], _setting(config, f"{stack}.{path}")
            if after != before:
                yield Change(f"{stack}.{path}", before, after)


_WRITTEN_OUT: Final = {
    "rope_parameters.full_attention.factor": "rope_full_factor",
    "rope_parameters.full_attention.rope_theta": "rope_full_theta",
    "rope_parameters.sliding_attention.rope_theta": "rope_sliding_theta",
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


def _notes(
    checkpoint: Checkpoint,
    resolution: Resolution,
    drafts: Sequence[Draft],
    changes: Sequence[Change],
    model_dtype: str,
    *,
    kept: bool,
) -> Iterable[str]:
    """What a user should know before converting."""
    yield from checkpoint.notes
    for change in changes:
        if change.field == "vocab_size":
            yield f"the embedding table is cut from {change.source} to {change.target} rows"
        elif change.field in resolution.model.values and "vision" in resolution.model.conditions:
            yield f"{change.field} moves from {change.source} to {change.target}"
        elif "." in change.field:
            yield f"{change.field} is {change.target}, the source's is {change.source}: that changes what is computed"
    for draft in drafts:
        if draft.content.kind == "zeros" and draft.origin is not None:
            yield f"{draft.name} is zeros: the vocabulary has no such token"
    if "text_only" in resolution.model.conditions:
        yield "the source has no vision tower: the target gets a stub of no layers and cannot read images"
    dtypes = sorted({draft.dtype for draft in drafts})
    if kept and len(dtypes) > 1:
        yield f"tensors have several dtypes ({', '.join(dtypes)}); config.json names {CONFIG_NAMES[model_dtype]}"
    for drop in resolution.drops:
        yield f"{drop.tensor.entry.name} is dropped: {drop.drop.because}"
