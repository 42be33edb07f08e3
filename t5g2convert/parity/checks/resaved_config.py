"""config of a folder that `save_pretrained` wrote: its settings have the same meaning as the start's.

transformers adds keys that a conversion leaves out, and sorts them. Settings that affect the computation are compared
as this tool's readers understand them. Every other key must equal the start's, or be listed below as a key that does
not affect the computation.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families.known_settings import EVERY_CONFIG
from t5g2convert.checkpoint.families.setting_rules import Outcome
from t5g2convert.checkpoint.families.t5gemma2 import (
    DEFAULT_THETA,
    ENCODER_TYPE,
    T5Gemma2,
    T5Gemma2Encoder,
    T5Gemma2Text,
    read_t5gemma2,
    read_t5gemma2_encoder,
)
from t5g2convert.checkpoint.families.t5gemma2_spellings import HEADED
from t5g2convert.checkpoint.file_names import GENERATION_FILE
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.folder import Checkpoint, read_json_if_there, read_json_object
from t5g2convert.parity.checks.config import flatten
from t5g2convert.parity.reports.report import Check, failed_check

CLASSES: Final = ("T5Gemma2ForConditionalGeneration", "T5Gemma2Model", *HEADED)
"""Classes that save all of a T5Gemma 2; others leave parts out."""

IDLE: Final[Mapping[str, Any]] = {
    "add_cross_attention": False, "chunk_size_feed_forward": 0, "cross_attention_hidden_size": None,
    "is_decoder": False, "is_encoder_decoder": False, "output_attentions": False, "output_hidden_states": False,
    "pruned_heads": {}, "return_dict": True, "sep_token_id": None, "tie_encoder_decoder": False, "use_bfloat16": False,
    "tie_word_embeddings": True, "vision_use_head": False, "dropout_rate": 0.0, "classifier_dropout_rate": 0.0,
    "attention_dropout": 0.0, "decoder_start_token_id": None, "initializer_range": 0.02, "use_cache": True,
}  # fmt: skip
"""Keys of transformers that have no effect with these values, its defaults."""

CODE: Final = frozenset({"auto_map", "custom_pipelines"})
"""Keys that name code, which could compute anything."""

ABOUT: Final = frozenset(each.name for each in EVERY_CONFIG if each.outcome is Outcome.ABOUT) - CODE
"""Keys that say who wrote a file."""

LABELS: Final = (
    frozenset({"architectures", "dtype", "torch_dtype"})
    | ABOUT
    | frozenset(each.name for each in EVERY_CONFIG if each.outcome is Outcome.NOTED)
) - IDLE.keys()
"""Last parts of keys that may have any value: they do not affect the computation."""

TRAINING: Final = frozenset({
    "attention_dropout", "classifier_dropout_rate", "dropout_rate", "initializer_range", "max_position_embeddings",
    "use_cache",
})  # fmt: skip
"""Settings without effect on a model's outputs in use: a change is a remark, not a fault."""

IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")

_ROPE: Final = re.compile(r"\.rope_parameters\.\w+\.(rope_type|type|rope_theta|factor)$")
"""Rotary embedding settings known to the readers, in several spellings."""


@dataclass(frozen=True, slots=True)
class Found:
    """Differences between settings: faults, and remarks for the report."""

    faults: tuple[str, ...]
    remarks: tuple[str, ...]


def judge_resaved_config(start: Checkpoint, target: Checkpoint) -> Check:
    """Compare the settings with the start's.

    Raises:
        CheckpointError: A config cannot be read.
    """
    expected, given = (meaning(each.config, each.path / "config.json") for each in (start, target))
    found = [_compared(name, expected.get(name), given.get(name)) for name in sorted(expected.keys() | given.keys())]
    others = _others(start, target, frozenset(expected))
    generation = _generation(start, target)
    sizes = [given[name] for name in ("encoder.text_config.vocab_size", "decoder.vocab_size") if name in given]
    if len(set(sizes)) > 1:
        told = f"encoder and decoder share one table, but have vocab_size {sizes}"
        others = Found((*others.faults, told), others.remarks)
    faults = [fault for each in (*found, others, generation) for fault in each.faults]
    remarks = [remark for each in (*found, others, generation) for remark in each.remarks]
    if faults:
        return failed_check("config", "setting(s) that differ from the start's", faults, remarks)
    return Check(
        "config", True, f"{len(expected)} settings have the same meaning as the start's", remarks=tuple(remarks)
    )


def meaning(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return all settings that this tool's readers know, by path in config.json, with defaults filled in.

    Raises:
        CheckpointError: The config cannot be read.
    """
    if config.get("model_type") == ENCODER_TYPE:
        alone = read_t5gemma2_encoder(config, where)
        return dict(_encoder(alone, ""))
    model: T5Gemma2 = read_t5gemma2(config, where)
    return {**dict(_encoder(model, "encoder.")), **dict(_stack(model.decoder, "decoder."))}


def _encoder(model: T5Gemma2Encoder, section: str) -> Iterator[tuple[str, Any]]:
    yield from _stack(model.encoder, f"{section}text_config.")
    for name, value in model.vision.model_dump().items():
        yield f"{section}vision_config.{name}", value
    for name, value in model.tokens.model_dump().items():
        yield section + name, value


def _stack(stack: T5Gemma2Text, section: str) -> Iterator[tuple[str, Any]]:
    for name, value in stack.model_dump(exclude={"rope_parameters"}).items():
        yield section + name, value
    # The settings of a kind of layer may be left out if the stack has no such layer.
    for kind in sorted(set(stack.layer_types)):
        rope = stack.rope_parameters.get(kind)
        yield f"{section}rope_parameters.{kind}.rope_theta", DEFAULT_THETA[kind] if rope is None else rope.rope_theta
        yield f"{section}rope_parameters.{kind}.factor", 1.0 if rope is None else rope.linear_factor


def _compared(path: str, expected: Any, found: Any) -> Found:
    name = path.rpartition(".")[2]
    if expected == found or (name == "eos_token_id" and _ends(expected) == _ends(found)):
        return Found((), ())
    if name in TRAINING:
        return Found((), (f"{path} is {found!r}, the start's is {expected!r}: used only in training",))
    if name == "vocab_size" and isinstance(found, int) and isinstance(expected, int) and found > expected:
        return Found((), (f"{path} is {found}, the start's is {expected}: rows were added to the table",))
    return Found((f"{path} is {found!r}, expected {expected!r}",), ())


def _others(start: Checkpoint, target: Checkpoint, known: frozenset[str]) -> Found:
    """Compare the keys that the readers do not know."""
    faults: list[str] = []
    remarks: list[str] = []
    expected, found = (
        {path: value for path, value in flatten(checkpoint.config) if path not in known and not _ROPE.search(path)}
        for checkpoint in (start, target)
    )
    for path in sorted(expected.keys() | found.keys()):
        name = path.rpartition(".")[2]
        if name in LABELS or {*path.split(".")} & {"id2label", "label2id"}:
            continue
        value, wanted = found.get(path), expected.get(path, IDLE.get(name))
        if value == wanted or (path not in found and name in IDLE and IDLE[name] == wanted):
            continue
        if name in IDS and "." not in path and path in expected:
            # Trainer writes the tokenizer's ids at the top of config.json; generate reads generation_config.json.
            if not _ends(value) <= _ends(wanted) or not _ends(value):
                faults.append(f"{path} is {value!r}, expected {wanted!r}")
        elif name == "vocab_size" and isinstance(value, int) and isinstance(wanted, int) and value > wanted:
            continue
        elif name in TRAINING:
            remarks.append(f"{path} is {value!r}, the start's is {wanted!r}: used only in training")
        elif path not in found:
            faults.append(f"{path} is missing, expected {wanted!r}")
        elif path in expected or name in IDLE:
            faults.append(f"{path} is {value!r}, expected {wanted!r}")
        elif value is not None:
            faults.append(f"{path} is {value!r}, a key with an unknown effect")
    faults += _class_faults(target)
    return Found(tuple(faults), tuple(remarks))


def _class_faults(target: Checkpoint) -> Iterator[str]:
    named = target.config.get("architectures")
    alone = target.config.get("model_type") == ENCODER_TYPE
    known = ("T5Gemma2Encoder",) if alone else CLASSES
    if named is not None and not (isinstance(named, list) and len(named) == 1 and named[0] in known):
        yield f"architectures is {named!r}, expected one of {', '.join(known)}"


def _generation(start: Checkpoint, target: Checkpoint) -> Found:
    """Compare the ids that decide where texts end; how tokens are sampled is the user's choice."""
    if not is_there(target.path / GENERATION_FILE):
        return Found(
            (), (f"{GENERATION_FILE} is missing: copy the start's",) if is_there(start.path / GENERATION_FILE) else ()
        )
    found = read_json_object(target.path / GENERATION_FILE)
    expected = read_json_if_there(start.path, GENERATION_FILE)
    faults, changed = [], []
    for name in sorted({*found, *expected} - ABOUT - {"_from_model_config"}):
        if found.get(name) == expected.get(name):
            continue
        if name in (*IDS, "decoder_start_token_id"):
            if _ends(found.get(name)) != _ends(expected.get(name)) and not (name not in expected and name in IDLE):
                faults.append(f"{GENERATION_FILE}: {name} is {found.get(name)!r}, expected {expected.get(name)!r}")
        elif found.get(name) != IDLE.get(name):
            changed.append(f"{name} {found.get(name)!r}, not {expected.get(name)!r}")
    remarks = (
        (f"{GENERATION_FILE} chooses tokens differently from the start's: {'; '.join(changed)}",) if changed else ()
    )
    return Found(tuple(faults), remarks)


def _ends(value: Any) -> set[Any]:
    """Return the ids as a set; transformers may write a single id as a list."""
    return set(value) if isinstance(value, list) else set() if value is None else {value}
