"""config: the target's settings are the source's, but for declared changes.

What is expected stands here in code, written down from the two classes' configs, apart from the map that made it.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from t5g2convert.checkpoint.dtypes import CONFIG_NAMES
from t5g2convert.checkpoint.families.gemma3 import Gemma3, Gemma3Text
from t5g2convert.checkpoint.families.registry import implied_tensors
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.errors import CheckpointError
from t5g2convert.parity.checks.token_ids import special_faults
from t5g2convert.parity.parents import Stacks
from t5g2convert.parity.reports.report import Check, refused

SHARED = (
    "attention_bias", "attention_dropout", "attn_logit_softcapping", "bos_token_id", "eos_token_id",
    "final_logit_softcapping", "head_dim", "hidden_activation", "hidden_size", "initializer_range",
    "intermediate_size", "layer_types", "max_position_embeddings", "num_attention_heads", "num_hidden_layers",
    "num_key_value_heads", "pad_token_id", "query_pre_attn_scalar", "rms_norm_eps", "sliding_window", "use_cache",
    "vocab_size",
)  # fmt: skip
"""Settings that a stack has from its parent under the same name."""

STUB = {
    "attention_dropout": 0.0, "hidden_act": "gelu_pytorch_tanh", "hidden_size": 16, "image_size": 28,
    "intermediate_size": 16, "layer_norm_eps": 1e-6, "num_attention_heads": 1, "num_channels": 3,
    "num_hidden_layers": 0, "patch_size": 14,
}  # fmt: skip
"""The tower of no layers that stands for a source without images."""


def judge_config(
    source: Gemma3,
    target: Checkpoint,
    changes: Mapping[str, Any],
    *,
    generation: Iterable[str] = (),
    donated: bool = False,
    stacks: Stacks | None = None,
) -> Check:
    """Compare config.json with what the source and the declared changes imply.

    Args:
        source: The source's settings, with the tower that the target should have.
        target: The converted folder.
        changes: New values from the manifest, by the source's name of a setting, or by its path in the target's config.
        generation: What was found to be wrong in its generation_config.json.
        donated: Whether the vision tower is another checkpoint's.
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
    """Compare config.json with what is expected of it, and the tensors with what it implies.

    Args:
        expected: Settings by their paths; `dtype` is that of most bytes where it is left out.
        target: The folder.
        generation: What was found to be wrong in its generation_config.json.
        declared: The changes among the expected settings.
    """
    wanted = {"dtype": CONFIG_NAMES.get(target.dtype), **expected}
    faults = list(differences(wanted, dict(flatten(target.config))))
    faults += [f"generation_config.json: {fault}" for fault in generation]
    try:
        faults += [f"tensors: {fault}" for fault in (*tensor_faults(target), *_strangers(target))]
        faults += special_faults(target)
    except CheckpointError as error:
        faults.append(error.message)
    if faults:
        return refused("config", "setting(s) that are not the source's", faults)
    told = f" but for {', '.join(declared)}, as declared" if declared else ""
    return Check("config", True, f"{len(wanted)} settings are the source's{told}")


def main_dtype(target: Checkpoint, *, donated: bool) -> str:
    """The safetensors dtype that most bytes of a folder have, a donor's tower not counted; config.json names one."""
    counted: Counter[str] = Counter()
    parts = {item.name: item.part for item in implied_tensors(target.config, target.path)} if donated else {}
    for name, stored in target.tensors.items():
        if parts.get(name) not in ("vision", "projector"):
            counted[stored.entry.dtype] += stored.entry.nbytes
    return max(counted, key=lambda dtype: (counted[dtype], dtype), default="F32")


def both_of(source: Gemma3) -> Stacks:
    """Both stacks as the source is, whole."""
    return Stacks(source.text, source.text, source.text.vocab_size)


def expected_config(source: Gemma3, changes: Mapping[str, Any], stacks: Stacks | None = None) -> dict[str, Any]:
    """config.json of the target, without `dtype`."""
    stacks = stacks or both_of(source)
    told = {"vocab_size": stacks.rows, **{name: value for name, value in changes.items() if name != "dtype"}}
    values = {**source.values, **told}
    # What the model writes starts and ends as the decoder's parent has it.
    writing = {**stacks.decoder.model_dump(), **told}
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
            "text_config": {"model_type": "t5gemma2_text", **_expected_stack(stacks.encoder, told)},
            "vision_config": {"model_type": "siglip_vision_model", "vision_use_head": False, **vision},
        },
        "decoder": {"model_type": "t5gemma2_decoder", **_expected_stack(stacks.decoder, told)},
    }


def _expected_stack(text: Gemma3Text, told: Mapping[str, Any]) -> dict[str, Any]:
    """The settings of a text stack with this parent, but for those that are told."""
    values = {**text.model_dump(), **told}
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
    """Settings by their path, `decoder.rope_parameters.full_attention.factor`; lists stay whole."""
    for key, value in node.items():
        # A key with a dot of its own is no path.
        name = prefix + (repr(key) if "." in key else key)
        if isinstance(value, dict) and value:
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def differences(expected: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    """Every setting that is missing, another, or one too many."""
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            yield f"{name} is missing, expected {expected[name]!r}"
        elif name not in expected:
            yield f"{name} is {found[name]!r}, no setting of this model"
        elif not _same(expected[name], found[name]):
            yield f"{name} is {found[name]!r}, expected {expected[name]!r}"


def _same(expected: Any, found: Any) -> bool:
    """Equal, and of one type: True == 1 == 1.0 in Python, but transformers refuses a type that is not declared."""
    if isinstance(expected, list) and isinstance(found, list):
        return len(expected) == len(found) and all(map(_same, expected, found))
    if isinstance(expected, dict) and isinstance(found, dict):
        return expected.keys() == found.keys() and all(_same(expected[key], found[key]) for key in expected)
    return type(expected) is type(found) and bool(expected == found)


def tensor_faults(target: Checkpoint) -> Iterator[str]:
    """Tensors that the folder's own config implies and that are not there, or in another shape."""
    for item in implied_tensors(target.config, target.path):
        stored = target.tensors.get(item.name)
        if stored is None:
            yield f"{item.name} is missing"
        elif stored.entry.shape != item.shape:
            yield f"{item.name} has shape {list(stored.entry.shape)}, expected {list(item.shape)}"


def _strangers(target: Checkpoint) -> Iterator[str]:
    """Tensors that the folder's own config does not imply."""
    implied = {item.name for item in implied_tensors(target.config, target.path)}
    yield from (f"{name} is not one of this model" for name in target.tensors if name not in implied)
