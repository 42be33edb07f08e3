"""config: the settings, tensors and ids of the output are the source's, except for declared changes.

The expected settings are written here in code, from the config classes of both models, independently of the map.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families.gemma3 import Gemma3, Gemma3Text
from t5g2convert.checkpoint.families.registry import expected_tensors
from t5g2convert.checkpoint.families.text_and_vision import TextConfig
from t5g2convert.checkpoint.file_names import GENERATION_FILE
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.folder import Checkpoint, read_json_object
from t5g2convert.checkpoint.header import CONFIG_NAMES
from t5g2convert.errors import CheckpointError
from t5g2convert.parity.reports.report import Check, failed_check
from t5g2convert.parity.source_models import StackSettings
from t5g2convert.parity.token_ids import special_faults

SHARED = (
    "attention_bias", "attention_dropout", "attn_logit_softcapping", "bos_token_id", "eos_token_id",
    "final_logit_softcapping", "head_dim", "hidden_activation", "hidden_size", "initializer_range",
    "intermediate_size", "layer_types", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "pad_token_id", "query_pre_attn_scalar", "rms_norm_eps", "sliding_window", "use_cache",
    "vocab_size",
)  # fmt: skip
"""Settings that a stack takes from its parent under the same name."""

STUB = {
    "attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 16, "image_size": 28,
    "intermediate_size": 16, "layer_norm_eps": 1e-6, "num_attention_heads": 1, "num_channels": 3,
    "num_hidden_layers": 0, "patch_size": 14,
}  # fmt: skip
"""The tower without layers that a target has where its source does not read images."""

ID_SETTINGS: Final = {
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_decoder_ids",
    "sequence_bias",
}  # fmt: skip
"""Settings of generation_config.json that hold ids, besides those named `..._token_id`."""


def judge_config(
    source: Gemma3,
    target: Checkpoint,
    changes: Mapping[str, Any],
    *,
    generation: Iterable[str] = (),
    donated: bool = False,
    stacks: StackSettings | None = None,
) -> Check:
    """Compare config.json with the source's settings and the declared changes.

    Args:
        source: The source's settings, with the tower that the target must have.
        target: The converted folder.
        changes: New values from the manifest, by the source's name of a setting, or by its path in the target's config.
        generation: Faults of its generation_config.json.
        donated: Whether the vision tower comes from another checkpoint.
        stacks: The settings of both text stacks, if they are not the source's.
    """
    stacks = stacks or both_of(source)
    expected = dict(flatten(expected_config(source, changes, stacks)))
    expected |= {path: value for path, value in changes.items() if path in expected and "." in path}
    expected["dtype"] = CONFIG_NAMES.get(main_dtype(target, donated=donated))
    return judge_settings(expected, target, generation, changes)


def judge_settings(
    expected: Mapping[str, Any], target: Checkpoint, generation: Iterable[str], declared: Collection[str]
) -> Check:
    """Compare config.json with the expected settings, and the tensors with those that config.json implies.

    Args:
        expected: Settings by path; `dtype` defaults to the dtype of most bytes.
        target: The folder.
        generation: Faults of its generation_config.json.
        declared: The changes among the expected settings.
    """
    wanted = {"dtype": CONFIG_NAMES.get(target.dtype), **expected}
    faults = list(differences(wanted, dict(flatten(target.config))))
    faults += [f"generation_config.json: {fault}" for fault in generation]
    try:
        faults += [f"tensors: {fault}" for fault in (*tensor_faults(target), *_unknown_tensors(target))]
        faults += special_faults(target)
    except CheckpointError as error:
        faults.append(error.message)
    if faults:
        return failed_check("config", "setting(s) that differ from the source's", faults)
    exceptions = f" but for {', '.join(declared)}, as declared" if declared else ""
    return Check("config", True, f"{len(wanted)} settings match the source's{exceptions}")


def main_dtype(target: Checkpoint, *, donated: bool) -> str:
    """Return the safetensors dtype of most bytes, not counting a donor's tower: config.json can name only one dtype."""
    counted: Counter[str] = Counter()
    parts = {item.name: item.part for item in expected_tensors(target.config, target.path)} if donated else {}
    for name, stored in target.tensors.items():
        if parts.get(name) not in ("vision", "projector"):
            counted[stored.entry.dtype] += stored.entry.nbytes
    return max(counted, key=lambda dtype: (counted[dtype], dtype), default="F32")


def both_of(source: Gemma3) -> StackSettings:
    """Return the settings of both stacks if each is the whole source."""
    return StackSettings(source.text, source.text, source.text.vocab_size)


def expected_config(source: Gemma3, changes: Mapping[str, Any], stacks: StackSettings | None = None) -> dict[str, Any]:
    """Return config.json of the target, without `dtype`."""
    stacks = stacks or both_of(source)
    changed = {"vocab_size": stacks.rows, **{name: value for name, value in changes.items() if name != "dtype"}}
    values = {**source.values, **changed}
    # Generated texts start and end with the tokens of the decoder's parent.
    writing = {**stacks.decoder.model_dump(), **changed}
    tokens = {name: values[name] for name in ("eoi_token_index", "image_token_index", "initializer_range")}
    vision = STUB if source.vision is None else source.vision.model_dump()
    return {
        "architectures": ["T5Gemma2ForConditionalGeneration"],
        "model_type": "t5gemma2",
        "is_encoder_decoder": True,
        "tie_word_embeddings": True,
        "classifier_dropout_rate": 0.0,
        "dropout_rate": 0.0,
        **tokens,
        "attention_dropout": values["attention_dropout"],
        **{name: writing[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "vocab_size")},
        "encoder": {
            "model_type": "t5gemma2_encoder",
            "boi_token_index": values["boi_token_index"],
            **tokens,
            "mm_tokens_per_image": 4 if source.vision is None else values["mm_tokens_per_image"],
            "tie_word_embeddings": True,
            "text_config": {"model_type": "t5gemma2_text", **_expected_stack(stacks.encoder, changed)},
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **vision},
        },
        "decoder": {"model_type": "t5gemma2_decoder", **_expected_stack(stacks.decoder, changed)},
    }


def _expected_stack(text: Gemma3Text, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a text stack: its parent's, some of them changed."""
    values = {**text.model_dump(), **changed}
    return {name: values[name] for name in SHARED} | {
        "dropout_rate": 0.0,
        "rope_parameters": {
            "full_attention": {
                "rope_type": "linear", "rope_theta": values["rope_full_theta"], "factor": values["rope_full_factor"],
            },
            "sliding_attention": {"rope_type": "default", "rope_theta": values["rope_sliding_theta"]},
        },
        "tie_word_embeddings": True,
    }  # fmt: skip


def flatten(node: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield settings by path, like `decoder.rope_parameters.full_attention.factor`; lists stay whole."""
    for key, value in node.items():
        # A key with a dot in it is not a path.
        name = prefix + (repr(key) if "." in key else key)
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Yield every setting that is missing, different or unexpected."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing, expected {expected[name]!r}"
        elif name not in expected:
            yield f"{name} is {found[name]!r}, which is not a setting of this model"
        elif not _same(expected[name], found[name]):
            yield f"{name} is {found[name]!r}, expected {expected[name]!r}"


def _same(expected: Any, found: Any) -> bool:
    """Return whether values are equal and of one type: transformers refuses 1 for True."""
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(map(_same, expected, found))
    if isinstance(expected, dict) and isinstance(found, dict):
        return expected.keys() == found.keys() and all(_same(expected[key], found[key]) for key in expected)
    return type(expected) is type(found) and bool(expected == found)


def tensor_faults(target: Checkpoint) -> Iterator[str]:
    """Yield tensors that the folder's own config implies but that are missing or have another shape."""
    for item in expected_tensors(target.config, target.path):
        stored = target.tensors.get(item.name)
        if stored is None:
            yield f"{item.name} is missing"
        elif stored.entry.shape != item.shape:
            yield f"{item.name} has shape {list(stored.entry.shape)}, expected {list(item.shape)}"


def _unknown_tensors(target: Checkpoint) -> Iterator[str]:
    """Yield tensors that the folder's own config does not imply."""
    implied = {item.name for item in expected_tensors(target.config, target.path)}
    yield from (f"{name} is not a tensor of this model" for name in target.tensors if name not in implied)


def generation_faults(
    folder: Path, target: Path, writes: TextConfig, move: tuple[int, int] | None = None
) -> Iterator[str]:
    """Yield all differences between a generation_config.json and the source's.

    Args:
        folder: The folder of the source, or of the decoder's parent.
        target: The converted folder.
        writes: The settings of the decoder, as its parent has them.
        move: Old and new id of a token that has moved.

    Raises:
        CheckpointError: A file cannot be read.
    """
    expected = {name: getattr(writes, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if is_there(folder / GENERATION_FILE):
        own = read_json_object(folder / GENERATION_FILE)
        expected |= {name: value for name, value in own.items() if value is not None}
    if move is not None:
        for name in expected:
            if name in ID_SETTINGS or name.endswith("_token_id"):
                expected[name] = _with_new_id(expected[name], *move)
    yield from differences(expected, read_json_object(target / GENERATION_FILE))


def _with_new_id(value: Any, old: int, new: int) -> Any:
    """Return a value with one id replaced, at any depth."""
    if isinstance(value, list):
        return [_with_new_id(item, old, new) for item in value]
    return new if type(value) is int and value == old else value
