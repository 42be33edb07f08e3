"""Load a weight map from its file, and make all checks that do not need a model."""

import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_origin

from pydantic import ValidationError

from t5g2convert.checkpoint.families.registry import TARGETS
from t5g2convert.checkpoint.file_names import PROCESSOR_FILE, TOKENIZER_CONFIG_FILE, TOKENIZER_FILE
from t5g2convert.errors import MappingError
from t5g2convert.mapping.name_patterns import INDEX_RANGES, index_of, pattern_fault, root_of, unknown_placeholder
from t5g2convert.mapping.operations import Aligned, Copy, ScaledRow, TakeRows, Zeros
from t5g2convert.mapping.schema import Drop, Row, TokenizerFiles, WeightMap
from t5g2convert.mapping.source_families import FAMILIES, source_variants
from t5g2convert.mapping.strictyaml import Document, NodePath, load_yaml
from t5g2convert.mapping.template import TARGET_VALUES, fill, template_faults, value_names


@dataclass(frozen=True, slots=True)
class LoadedMap:
    """A map, its file, the sha256 of the file, and the parsed file with the position of every node."""

    map: WeightMap
    path: Path
    sha256: str
    document: Document = field(repr=False, compare=False)


def load_map(path: Path) -> LoadedMap:
    """Read and check a weight map.

    Raises:
        MappingError: The map is faulty; the error has `file:line:column` and a caret at the first fault.
    """
    document = load_yaml(path)
    try:
        weight_map = WeightMap.model_validate(document.data)
    except ValidationError as error:
        raise _schema_error(document, error) from None
    for reason, at, hint in _faults(weight_map):
        raise document.error(reason, at, hint=hint)
    return LoadedMap(weight_map, path, hashlib.sha256(document.text.encode()).hexdigest(), document)


def did_you_mean(name: str, known: Iterable[str]) -> str | None:
    """Return a hint with the nearest known name, if one is similar."""
    near = get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else None


Variants = tuple[frozenset[str], ...]
"""The sets of features that a source of a map can have."""

Fault = tuple[str, NodePath, str | None]
"""A reason, its place, and a hint."""


def _schema_error(document: Document, error: ValidationError) -> MappingError:
    # A misspelt key is reported as missing and as unknown; the second helps more.
    errors = error.errors()
    first = errors[0]
    if first["type"] == "missing":
        siblings = (item for item in errors if item["loc"][:-1] == first["loc"][:-1])
        first = next((item for item in siblings if item["type"] == "extra_forbidden"), first)
    at: NodePath = first["loc"]
    if first["type"] == "extra_forbidden":
        name = str(at[-1])
        known = _known_keys(at)
        key_at = (*at, "<key>")
        return document.error(f"unknown key {name!r}", key_at, hint=did_you_mean(name, known))
    if first["type"] == "literal_error" and at and at[-1] == "[key]":
        return document.error(
            f"unknown part {at[-2]!r}", (*at[:-1], "<key>"), hint=f"expected {first['ctx']['expected']}"
        )
    if at and at[-1] == "[key]":
        at = (*at[:-1], "<key>")
        return document.error(str(first["msg"]), at)
    field = f"{at[-1]}: " if at and isinstance(at[-1], str) else ""
    return document.error(f"{field}{first['msg'].removeprefix('Value error, ')}", at)


def _known_keys(at: NodePath) -> list[str]:
    """Return the keys of the section at a path of the schema."""
    model: Any = WeightMap
    steps = iter(at[:-1])
    for step in steps:
        if isinstance(step, int):
            continue
        found = next((info for name, info in model.model_fields.items() if step in (name, info.alias)), None)
        if found is None:
            return []
        inner = [found.annotation, *getattr(found.annotation, "__args__", ())]
        model = next((item for item in inner if hasattr(item, "model_fields")), None)
        if model is None:
            return []
        if get_origin(found.annotation) is dict:
            next(steps, None)  # a name that the map defines
    return [info.alias or name for name, info in model.model_fields.items()]


def _faults(weight_map: WeightMap) -> Iterator[Fault]:
    """Yield every fault that the schema cannot express, in the order of the file."""
    for position, model_type in enumerate(weight_map.source.model_type):
        if model_type not in FAMILIES:
            hint = did_you_mean(model_type, FAMILIES) or f"known: {', '.join(FAMILIES)}"
            yield f"unknown model_type {model_type!r}", ("source", "model_type", position), hint
            return
    terms = [FAMILIES[model_type].terms for model_type in weight_map.source.model_type]
    variants = source_variants(weight_map.source.model_type)
    dims = {name for model in terms for name in model.dims} | {"vocab"}
    values = {name for model in terms for name in model.values}
    numbers = {name for model in terms for name, value in model.values.items() if type(value) is int}
    yield from _target_faults(weight_map, variants)
    yield from _vocabulary_faults(weight_map, numbers)
    yield from _condition_faults(weight_map.weights, variants, "weights")
    yield from _condition_faults(weight_map.drop, variants, "drop")
    for position, row in enumerate(weight_map.weights):
        yield from _row_faults(row, weight_map, dims, ("weights", position))
    for position, drop in enumerate(weight_map.drop):
        yield from _drop_faults(drop, weight_map.roots, dims, ("drop", position))
    yield from _repeated(weight_map, variants)
    for name, template in weight_map.requires.items():
        if name not in values:
            yield f"unknown value {name!r}", ("requires", name, "<key>"), did_you_mean(name, values)
        for reason, at, unknown in template_faults(template, values, variants, ("requires", name)):
            yield reason, at, did_you_mean(unknown, values) if unknown else None
    yield from _preset_faults(weight_map, values)
    for key, template in (("config", weight_map.config), ("generation_config", weight_map.generation_config)):
        for reason, at, unknown in template_faults(template, value_names(values), variants, (key,)):
            yield reason, at, did_you_mean(unknown, value_names(values)) if unknown else None
    yield from _made_type_faults(weight_map, variants)
    yield from _file_faults(weight_map, values | set(TARGET_VALUES), variants)


def _target_faults(weight_map: WeightMap, variants: Variants) -> Iterator[Fault]:
    """Yield unknown targets, and roots that are not plain prefixes."""
    for position, model_type in enumerate(weight_map.target.model_types):
        if model_type not in TARGETS:
            at: NodePath = ("target", "model_type", position)
            hint = did_you_mean(model_type, TARGETS) or f"known: {', '.join(TARGETS)}"
            yield f"unknown target {model_type!r}", at, hint
    for root, template in weight_map.target.roots.items():
        at = ("target", "roots", root)
        for reason, place, _ in template_faults(template, set(), variants, at):
            yield reason, place, None
        for variant in variants:
            if isinstance(prefix := fill(template, {}, variant), str) and not {"{", "}"} & set(prefix):
                continue
            yield "expected a literal prefix without braces", at, None
            break


def _made_type_faults(weight_map: WeightMap, variants: Variants) -> Iterator[Fault]:
    """Yield a fault if the made config.json would have another model_type than the target."""
    for variant in variants:
        made = fill(weight_map.config, defaultdict(lambda: None), variant).get("model_type")
        if made not in weight_map.target.model_types:
            reason = (
                f"config.json would have model_type {made!r}, expected {' or '.join(weight_map.target.model_types)}"
            )
            yield reason, ("config", "model_type"), None
            return


def _condition_faults(items: Iterable[Row | Drop], variants: Variants, key: str) -> Iterator[Fault]:
    known = sorted(frozenset().union(*variants))
    for position, item in enumerate(items):
        if item.when is not None and item.when not in known:
            hint = did_you_mean(item.when, known) or f"known: {', '.join(known)}"
            yield f"unknown feature {item.when!r}", (key, position, "when"), hint


def _file_faults(weight_map: WeightMap, values: set[str], variants: Variants) -> Iterator[Fault]:
    """Yield the faults of `files`."""
    files, at = weight_map.files, ("files",)
    made = [TOKENIZER_FILE, TOKENIZER_CONFIG_FILE] if files.tokenizer is not None else []
    made += [PROCESSOR_FILE, "preprocessor_config.json"] if files.processor is not None else []
    for position, name in enumerate(files.carry):
        if name in made:
            yield f"{name} is made by the conversion, and cannot be carried", (*at, "carry", position), None
    templates: dict[tuple[str, ...], Mapping[str, Any]] = {}
    if files.tokenizer is not None:
        yield from _moved_faults(files.tokenizer, weight_map.vocabulary.moved)
        templates["tokenizer", "config"] = files.tokenizer.config
    if files.processor is not None:
        if not isinstance(files.processor.get("image_processor"), dict):
            yield "expected the settings of an image_processor", (*at, "processor"), None
        templates["processor",] = files.processor
    for key, template in templates.items():
        for reason, place, unknown in template_faults(template, values, variants, (*at, *key)):
            yield reason, place, did_you_mean(unknown, values) if unknown else None


def _moved_faults(tokenizer: TokenizerFiles, moved: Mapping[str, int]) -> Iterator[Fault]:
    """Yield values that move without a token, and tokens that are listed twice."""
    at = ("files", "tokenizer", "moved")
    taken: set[str] = set()
    for position, item in enumerate(tokenizer.moved):
        if item.id not in moved:
            yield (
                f"{item.id!r} does not move",
                (*at, position, "id"),
                f"vocabulary.moved has {', '.join(moved) or 'none'}",
            )
        for key, token in (("id", item.id), ("token", item.token), ("replaces", item.replaces)):
            if token in taken:
                yield f"{token!r} is duplicated", (*at, position, key), None
            taken.add(token)
    for name in moved:
        if name not in taken:
            yield f"vocabulary.moved has {name!r}, but no token is listed for it", at, None
    for position, token in enumerate(tokenizer.special):
        if token in taken:
            yield f"{token!r} is duplicated", (*at[:2], "special", position), None


def _vocabulary_faults(weight_map: WeightMap, numbers: set[str]) -> Iterator[Fault]:
    for rows, kept in weight_map.vocabulary.cut.items():
        if kept > rows:
            yield f"a table of {rows} rows cannot be cut to {kept}", ("vocabulary", "cut", rows), None
    for name in weight_map.vocabulary.moved:
        if name not in numbers:
            yield f"unknown value {name!r}", ("vocabulary", "moved", name, "<key>"), did_you_mean(name, numbers)


def _preset_faults(weight_map: WeightMap, values: set[str]) -> Iterator[Fault]:
    for preset, declared in weight_map.presets.items():
        for key, names in (("requires", declared.requires), ("settings", declared.settings.chosen)):
            for name in names:
                if name not in values:
                    at: NodePath = ("presets", preset, key, name, "<key>")
                    yield f"unknown value {name!r}", at, did_you_mean(name, values)
        for position, name in enumerate(declared.assumed):
            if name not in declared.settings.chosen:
                at = ("presets", preset, "assumed", position)
                yield f"{name!r} is not one of the settings", at, did_you_mean(name, declared.settings.chosen)


def _placeholder_hint(pattern: str, roots: Mapping[str, object]) -> str | None:
    unknown = unknown_placeholder(pattern, roots)
    return None if unknown is None else did_you_mean(unknown, (*roots, *INDEX_RANGES))


def _row_faults(row: Row, weight_map: WeightMap, dims: set[str], at: NodePath) -> Iterator[Fault]:
    roots = weight_map.roots
    constant = isinstance(row.op, Zeros)
    if constant == (row.from_ is not None):
        yield "a row with zeros must not have from" if constant else "from is missing", at, None
    if row.from_ is not None and (fault := pattern_fault(row.from_, roots, dims)):
        yield fault, (*at, "from"), _placeholder_hint(row.from_, roots)
    for part, pattern in row.targets:
        yield from _name_faults(row, pattern, weight_map, dims, (*at, "to", part))
    for position, size in enumerate(row.shape):
        if isinstance(size, str) and size not in dims:
            yield f"unknown dimension {size!r}", (*at, "shape", position), did_you_mean(size, dims)
    for size in row.op.sizes():
        if isinstance(size, str) and size not in dims:
            yield f"unknown dimension {size!r}", (*at, "op"), did_you_mean(size, dims)
    if isinstance(row.op, ScaledRow) and len(row.shape) != 2:
        yield "scaled_row needs a table: a shape of two sizes", (*at, "shape"), None
    if isinstance(row.op, Aligned):
        if len(row.shape) != 2:
            yield "aligned needs a matrix: a shape of two sizes", (*at, "shape"), None
        if fault := pattern_fault(row.op.aligned.tables, roots, dims):
            yield fault, (*at, "op"), _placeholder_hint(row.op.aligned.tables, roots)
        elif index_of(row.op.aligned.tables) is not None:
            yield "an embedding table has no layer index", (*at, "op"), None
    if isinstance(row.op, TakeRows) and not row.shape:
        yield "take_rows needs a table: a shape of at least one size", (*at, "shape"), None
    if row.merged_attention and not {"encoder", "decoder"} <= row.to.keys():
        yield "merged_attention needs targets in both stacks", (*at, "merged_attention"), None
    if row.encoder_norm and ("encoder" not in row.to or len(row.shape) != 1 or not isinstance(row.op, Copy)):
        yield "encoder_norm needs a copied vector with a target in the encoder", (*at, "encoder_norm"), None


def _drop_faults(drop: Drop, roots: Mapping[str, list[str]], dims: set[str], at: NodePath) -> Iterator[Fault]:
    """Yield the faults of a drop's patterns."""
    places = [((*at, "from", number), pattern) for number, pattern in enumerate(drop.patterns)]
    if drop.must_equal is not None:
        places.append(((*at, "must_equal"), drop.must_equal))
    indices = {index_of(pattern) for pattern in drop.patterns}
    for place, pattern in places:
        if fault := pattern_fault(pattern, roots, dims):
            yield fault, place, _placeholder_hint(pattern, roots)
        elif pattern == drop.must_equal and index_of(pattern) not in (None, *(indices if len(indices) == 1 else ())):
            yield f"{{{index_of(pattern)}}} is on one side only", place, None


def _name_faults(row: Row, pattern: str, weight_map: WeightMap, dims: set[str], at: NodePath) -> Iterator[Fault]:
    """Yield the faults of a target's pattern."""
    prefixes, index = weight_map.target.roots, index_of(row.from_ or "")
    if fault := pattern_fault(pattern, {**weight_map.roots, **prefixes}, dims):
        yield fault, at, _placeholder_hint(pattern, prefixes)
    elif (root := root_of(pattern)) is not None and root not in prefixes:
        yield f"{{{root}}} is not a root of the target", at, f"target.roots has {', '.join(prefixes) or 'none'}"
    elif index_of(pattern) != index:
        yield f"{{{index_of(pattern) or index}}} is on one side only", at, None


def _repeated(weight_map: WeightMap, variants: Variants) -> Iterator[Fault]:
    """Yield targets that two rows fill and source tensors that two rows carry, if both rows apply to one source."""
    for features in variants:
        targets: set[str] = set()
        carried: set[str] = set()
        for position, row in enumerate(weight_map.weights):
            if not row.applies(features):
                continue
            for part, pattern in row.targets:
                if pattern in targets:
                    yield f"another row fills {pattern} already", ("weights", position, "to", part), None
                targets.add(pattern)
            if row.from_ is not None and row.op.carries:
                if row.from_ in carried:
                    yield f"another row carries {row.from_} already", ("weights", position, "from"), None
                carried.add(row.from_)
        for position, drop in enumerate(weight_map.drop):
            for number, pattern in enumerate(drop.patterns):
                if drop.applies(features) and pattern in carried:
                    yield f"a row carries {pattern}", ("drop", position, "from", number), None
