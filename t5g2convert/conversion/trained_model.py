"""The plan that puts trained or merged values into a T5Gemma 2: its own files with other values in some tensors.

Nothing else changes: names, shards, the order of headers and bytes, dtypes, settings and all other files stay the same,
and tensors that were not trained are copied byte for byte.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.adapter import Adapter, LoraTarget
from t5g2convert.checkpoint.families.config_section import ExpectedTensor, describe_model_type, parse_section
from t5g2convert.checkpoint.families.registry import expected_tensors
from t5g2convert.checkpoint.families.t5gemma2 import MODEL_TYPE
from t5g2convert.checkpoint.file_names import (
    GENERATION_FILE,
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    TOKENIZER_FILES,
    weight_files,
)
from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor, refuse_unheld
from t5g2convert.checkpoint.header import BY_CONFIG_NAME, CONFIG_NAMES, TensorEntry, encode_header, tensor_bits
from t5g2convert.checkpoint.manifest import MANIFEST_FILE
from t5g2convert.checkpoint.merge_record import MergeRecord
from t5g2convert.checkpoint.sources import SOURCE
from t5g2convert.checkpoint.tokenizer.chat_templates import TEMPLATES_FOLDER, held
from t5g2convert.checkpoint.training_record import AdaptationRecord
from t5g2convert.conversion.assets.aux_files import copied
from t5g2convert.conversion.option_values import KEEP
from t5g2convert.conversion.options import Dtype, PlanOptions
from t5g2convert.conversion.plan.types import (
    Change,
    Content,
    ContentKind,
    Plan,
    PlannedSource,
    PlannedTensor,
    Shard,
    SourceConfig,
    SourceFile,
    SourceRange,
)
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.schema import count_parameters

TABLE: Final = "model.encoder.embed_tokens.weight"
TIED: Final = ("model.decoder.embed_tokens.weight", "lm_head.out_proj.weight")
"""Other names of the embedding table, which the published layout stores once."""

CARRIED: Final = (
    GENERATION_FILE,
    *TOKENIZER_FILES,
    PROCESSOR_FILE,
    PREPROCESSOR_FILE,
    TEMPLATES_FOLDER,
)
"""Files that are copied if the model has them."""

FROZEN: Final = "vision"
"""The part that training never changes: SigLIP."""

_LAYER: Final = re.compile(r"(?<=\.layers\.)\d+(?=\.)")


def plan_adapted(
    model: Checkpoint, trained: Mapping[str, tuple[int, ...]], facts: Mapping[str, Any] | None, *, dtype: Dtype = KEEP
) -> Plan:
    """Plan a copy of a model with trained values in some of its tensors.

    Args:
        model: A T5Gemma 2 in the published layout, open.
        trained: The shapes of the trained tensors, by name.
        facts: The record of the training for the manifest, without the trained tensors and the frozen parts; None if
            another program trained the model.
        dtype: `keep`, or `bfloat16`, `float16` or `float32` for all tensors.

    Raises:
        CheckpointError: The model is of another family or layout, or trained tensors do not belong to it; the details
            list all of these tensors.
        UsageError: The dtype is unknown.
    """
    parts = _parts(model)
    faults = [fault for name, shape in trained.items() for fault in _trained_faults(name, shape, parts)]
    if faults:
        message = f"{len(faults)} trained tensor(s) do not belong to this model"
        raise CheckpointError(message, where=model.path, details=faults)
    plan = _planned(model, parts, trained.keys(), "given", dtype)
    return plan if facts is None else replace(plan, adaptation=_adaptation_record(facts, trained, parts))


def plan_merged(
    model: Checkpoint,
    adapter: Adapter,
    digests: Mapping[str, str],
    adaptation: AdaptationRecord | None,
    merged: MergeRecord | None,
    *,
    dtype: Dtype = KEEP,
) -> Plan:
    """Plan a copy of a model with an adapter merged into some of its tensors.

    Args:
        model: A T5Gemma 2 in the published layout, open.
        adapter: The adapter, open.
        digests: The sha256 of the adapter's files, by name.
        adaptation: The training of the model, which stays part of the history of the result.
        merged: The adapter that was merged into the model before, which stays part of it too.
        dtype: `keep`, or `bfloat16`, `float16` or `float32` for all tensors.

    Raises:
        CheckpointError: The model is of another family or layout, or the adapter does not fit it; the details list
            all targets that do not.
        UsageError: The dtype is unknown.
    """
    parts, targets = _parts(model), adapter.targets
    faults = [fault for target in targets.values() for fault in _target_faults(target, parts)]
    if faults:
        raise CheckpointError(
            f"{len(faults)} of {len(targets)} targets do not fit {model.name}, first {faults[0]}",
            where=adapter.path,
            details=faults,
            hint="pass the model that the adapter was trained on" + (f", {adapter.base}" if adapter.base else ""),
        )
    plan = _planned(model, parts, targets.keys(), "merged", dtype)
    alike: dict[tuple[int, float], list[str]] = {}
    for target in targets.values():
        alike.setdefault((target.rank, scale_of(target, rslora=adapter.rslora)), []).append(target.name)
    record = {
        "method": "lora",
        "adapter": dict(sorted(digests.items())),
        "targets": [
            {"names": patterns_of(names, parts), "rank": rank, "scale": scale}
            for (rank, scale), names in sorted(alike.items())
        ],
        "tensors": len(targets),
        **({} if merged is None else {"before": merged.document()}),
    }
    frozen = sum(parts[name].part == FROZEN for name in targets)
    return replace(
        plan,
        adaptation=adaptation,
        merged=parse_section(MergeRecord, record, Path(MANIFEST_FILE), "merged"),
        notes=(
            *plan.notes,
            *([f"the adapter also changes the vision tower: {frozen} of its {len(targets)} targets"] if frozen else []),
        ),
    )


def scale_of(target: LoraTarget, *, rslora: bool) -> float:
    """Return the factor of an adapter's product, computed as peft does."""
    return target.alpha / (math.sqrt(target.rank) if rslora else target.rank)


def _target_faults(target: LoraTarget, parts: Mapping[str, ExpectedTensor]) -> Iterator[str]:
    if target.name not in parts:
        yield f"{target.module} is not a linear layer of this model"
    elif target.shape != parts[target.name].shape:
        yield f"{target.module} needs a weight {list(target.shape)}, the model's is {list(parts[target.name].shape)}"


def _parts(model: Checkpoint) -> dict[str, ExpectedTensor]:
    refuse_unheld(model)
    return {item.name: item for item in _published(model)}


def _planned(
    model: Checkpoint,
    parts: Mapping[str, ExpectedTensor],
    changed: Collection[str],
    kind: ContentKind,
    dtype: Dtype,
) -> Plan:
    """Plan a copy of a model in which some tensors have another kind of content."""
    options = PlanOptions(dtype=dtype)
    cast_to = None if dtype == KEEP else BY_CONFIG_NAME[dtype]
    tensors, shards = _laid_out(model, changed, kind, parts, cast_to)
    counted: Counter[str] = Counter()
    for item in parts.values():
        counted[item.part] += tensor_bits("I8", item.shape) // 8
    main = cast_to or model.dtype
    return Plan(
        mapping=None,
        mapping_sha256=None,
        options=options.record(),
        sources={SOURCE: _source(model)},
        dtype=CONFIG_NAMES[main],
        parameters=count_parameters(counted),
        tensors=tensors,
        shards=shards,
        dropped=(),
        changes=tuple(_changes(model, main)) if cast_to is not None else (),
        tied=dict.fromkeys(TIED, TABLE),
        files=tuple(copied(model, name) for name in held(model, CARRIED)),
        tokens=(),
        config=_with_dtype(model.config, CONFIG_NAMES[main], top=True) if cast_to is not None else model.config,
        generation_config=None,
        notes=model.notes,
    )


def _adaptation_record(
    facts: Mapping[str, Any], trained: Collection[str], parts: Mapping[str, ExpectedTensor]
) -> AdaptationRecord:
    frozen = sorted({item.part for item in parts.values()} - {parts[name].part for name in trained})
    record = {**facts, "trained": patterns_of(trained, parts), "frozen": frozen}
    return parse_section(AdaptationRecord, record, Path(MANIFEST_FILE), "adaptation")


def patterns_of(names: Iterable[str], every: Collection[str]) -> list[str]:
    """Abbreviate names of tensors: `{layer}` replaces the number if the tensors of all layers are named."""
    wanted = set(names)
    by_pattern: dict[str, list[str]] = {}
    for name in every:
        by_pattern.setdefault(_LAYER.sub("{layer}", name), []).append(name)
    patterns: list[str] = []
    for pattern, members in by_pattern.items():
        patterns += [pattern] if wanted.issuperset(members) else [name for name in members if name in wanted]
    return patterns


def named_by(patterns: Iterable[str], every: Collection[str]) -> list[str]:
    """Return the names that patterns match; a pattern without a match is returned unchanged."""
    wanted = dict.fromkeys(patterns)
    found = [name for name in every if name in wanted or _LAYER.sub("{layer}", name) in wanted]
    known = {*found, *(_LAYER.sub("{layer}", name) for name in found)}
    return [*found, *(pattern for pattern in wanted if pattern not in known)]


def _published(model: Checkpoint) -> Iterator[ExpectedTensor]:
    """Yield every tensor of the model; require the names and shapes of the published layout.

    Raises:
        CheckpointError: Names or shapes differ; the details list all differences.
    """
    if model.config.get("model_type") != MODEL_TYPE:
        message = f"{describe_model_type(model.config)} cannot be adapted, expected {MODEL_TYPE}"
        raise CheckpointError(message, where=model.path, hint="convert a Gemma 3 with t5g2 convert first")
    implied = {item.name: item for item in expected_tensors(model.config, model.path / "config.json")}
    faults = [f"missing: {name}" for name in implied if name not in model.tensors]
    for name, stored in model.tensors.items():
        if name not in implied:
            faults.append(f"not in the published layout: {name}")
        elif stored.entry.shape != implied[name].shape:
            faults.append(f"{name} has shape {list(stored.entry.shape)}, expected {list(implied[name].shape)}")
        elif stored.entry.dtype not in CONFIG_NAMES:
            faults.append(f"{name} has dtype {stored.entry.dtype}, expected one of {', '.join(CONFIG_NAMES)}")
    if faults:
        raise CheckpointError(
            f"{len(faults)} tensor(s) do not match the published layout", where=model.path, details=faults
        )
    yield from implied.values()


def _trained_faults(name: str, shape: tuple[int, ...], parts: Mapping[str, ExpectedTensor]) -> Iterator[str]:
    if name in TIED:
        yield f"{name} is another name of {TABLE}; use {TABLE}"
    elif name not in parts:
        yield f"{name} is not a tensor of this model"
    elif parts[name].part == FROZEN:
        yield f"{name} belongs to the vision tower, which stays frozen"
    elif shape != parts[name].shape:
        yield f"{name} has shape {list(shape)}, expected {list(parts[name].shape)}"


def _laid_out(
    model: Checkpoint,
    changed: Collection[str],
    kind: ContentKind,
    parts: Mapping[str, ExpectedTensor],
    cast_to: str | None,
) -> tuple[tuple[PlannedTensor, ...], tuple[Shard, ...]]:
    """Lay out the model's own shards under published names, with headers and bytes in the model's order."""
    tensors: list[PlannedTensor] = []
    shards: list[Shard] = []
    for name, header in zip(weight_files(len(model.files)), model.files.values(), strict=True):
        places: dict[str, tuple[int, int]] = {}
        position = 0
        for entry in sorted(header.tensors.values(), key=lambda entry: (entry.start, entry.end)):
            end = position + tensor_bits(cast_to or entry.dtype, entry.shape) // 8
            places[entry.name], position = (position, end), end
        entries = [
            TensorEntry(entry.name, cast_to or entry.dtype, entry.shape, *places[entry.name])
            for entry in header.tensors.values()
        ]
        header_size = len(encode_header(entries))
        shards.append(Shard(name, header_size + position, header_size))
        tensors += [
            PlannedTensor(
                entry.name,
                parts[entry.name].part,
                entry.dtype,
                entry.shape,
                name,
                header_size + entry.start,
                header_size + entry.end,
                entry.name,
                _content(entry, model.tensors[entry.name], kind if entry.name in changed else None),
            )
            for entry in entries
        ]
    return tuple(tensors), tuple(shards)


def _content(entry: TensorEntry, stored: StoredTensor, kind: ContentKind | None) -> Content:
    if kind == "given":
        return Content("given", None, "F32")
    source = SourceRange(stored.file, stored.entry.start, stored.entry.end)
    return Content(kind or ("copy" if entry.dtype == stored.entry.dtype else "cast"), source, stored.entry.dtype)


def _source(model: Checkpoint) -> PlannedSource:
    return PlannedSource(
        name=model.name,
        family=MODEL_TYPE,
        layout={},
        config=SourceConfig(len(model.config_text), hashlib.sha256(model.config_text).hexdigest()),
        files=tuple(SourceFile(name, header.identity) for name, header in model.files.items()),
        hub=model.hub,
    )


def _changes(model: Checkpoint, main: str) -> Iterator[Change]:
    """Yield the change of dtype, if tensors had another dtype."""
    found = sorted({stored.entry.dtype for stored in model.tensors.values()} - {main})
    if found:
        yield Change("dtype", ", ".join(CONFIG_NAMES[dtype] for dtype in found), CONFIG_NAMES[main])


def _with_dtype(section: Mapping[str, Any], dtype: str, *, top: bool = False) -> dict[str, Any]:
    """Return a config with another dtype at the top and in every section that names a dtype."""
    named = {
        key: _with_dtype(value, dtype) if isinstance(value, dict) else dtype if key in _DTYPE_KEYS else value
        for key, value in section.items()
    }
    return {**named, "dtype": dtype} if top else named


_DTYPE_KEYS: Final = ("dtype", "torch_dtype")
