"""Recognise weights that are not a plain model's (quantised, wrapped, renamed), and say how to get plain ones.

The evidence is searched in this order: config.json, the metadata of the headers, dtypes and shapes, names of tensors.
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor
from t5g2convert.checkpoint.header import CONFIG_NAMES
from t5g2convert.errors import CheckpointError

ORIGINAL: Final = "pass the original, unquantised model"
DEQUANTISE: Final = f"dequantise it first, or {ORIGINAL}"
MLX: Final = f"dequantise it first: mlx_lm.convert -d --hf-path FOLDER --mlx-path OUT; or {ORIGINAL}"
BNB: Final = f"dequantise it first: model.dequantize().save_pretrained(OUT) in transformers; or {ORIGINAL}"
LOADED: Final = (
    "dequantise it first: from_pretrained(FOLDER, quantization_config={config}(dequantize=True)).save_pretrained(OUT) "
    f"in transformers; or {ORIGINAL}"
)

METHODS: Final[Mapping[str, str]] = {
    "bitsandbytes": BNB,
    "compressed-tensors": LOADED.format(config="CompressedTensorsConfig"),
    "fp8": LOADED.format(config="FineGrainedFP8Config"),
    "mlx": MLX,
}
"""What to do, by `quant_method`; the original model is always better."""

CONFIG_KEYS: Final = ("quantization_config", "quantization", "compression_config")
"""Keys of configs of quantised models; `quantization` is MLX's."""

DETAILS: Final = ("quant_algo", "format", "quant_type", "fmt", "bnb_4bit_quant_type")
SWITCHES: Final = {"load_in_4bit": "4 bits", "load_in_8bit": "8 bits"}

STRIP: Final = "remove that part of the names: safetensors.torch.load_file, rename, save_file"
MERGE: Final = "merge the adapter into its base model first (peft: merge_and_unload), and save_pretrained"

NAMES: Final[Mapping[str, str]] = {
    r"lora_": "a LoRA adapter: merge it into its base model first (peft: merge_and_unload)",
    r"\.(base_layer|modules_to_save|original_module)\.": f"saved from a peft model: {MERGE}",
    r"^base_model\.model\.": f"saved from a peft model: {MERGE}; without an adapter, {STRIP}",
    r"_orig_mod\.": f"saved from a torch.compile wrapper: save the unwrapped model (model._orig_mod), or {STRIP}",
    r"_fsdp_wrapped_module\.|_flat_param": "saved from an FSDP wrapper: save a full state dict",
    r"_checkpoint_wrapped_module\.": f"saved from an activation checkpointing wrapper: {STRIP}",
    r"^_forward_module\.": f"saved from a Lightning wrapper: {STRIP}",
    r"^module\.": f"saved from a DDP or DeepSpeed wrapper: save model.module, or {STRIP}",
    r"\.(q_weight|trellis)$": f"quantised (ExLlama): {ORIGINAL}",
    r"qweight|\.qzeros$": f"quantised (GPTQ or AWQ): {DEQUANTISE}",
    r"SCB": f"quantised (bitsandbytes int8): {BNB}",
    r"absmax|quant_map$|quant_state": f"quantised (bitsandbytes 4-bit): {BNB}",
    r"\.weight_packed$|\.weight_zero_point$": f"quantised (compressed-tensors): {METHODS['compressed-tensors']}",
    r"\.weight_scale_2$|\.weight_global_scale$": f"quantised (NVFP4): {DEQUANTISE}",
    r"\.W_q$": f"quantised (HQQ): {DEQUANTISE}",
    r"[._]qdata$|\.weight\._data$|:_data$": f"quantised (torchao or quanto): {DEQUANTISE}",
    r"\.(codes|codebooks)$": f"quantised (AQLM): {ORIGINAL}",
    r"(weight|input|output|activation|[qkv])_scale(_inv)?$|\.scale_(weight|input)$|(^|\.)scaled_fp8$": (
        f"quantised (FP8 with scales): {DEQUANTISE}"
    ),
    r"\.(scales|biases)$": f"quantised (MLX): {MLX}",
    r"^(blk\.\d|token_embd\.)": "stored with llama.cpp's tensor names: pass the model in the transformers layout",
    r"^spiece_model$|^vision_model\.|^text_encoders\.": (
        "a ComfyUI single file, with its own tensor names: pass the original model, "
        "such as google/gemma-3-12b-it from the Hub"
    ),
    r"(qkv|gate_up)_proj\.": "fused by an engine or gemma_pytorch: pass the model in the transformers layout",
    r"linear_(qkv|fc1)\.": "stored with Megatron's tensor names: export it to the Hugging Face format",
    r"^(params/|transformer/|embedder\.)": (
        "stored with the tensor names of Google's own code: pass the model in the transformers layout"
    ),
}
"""Patterns of tensor names in foreign checkpoints, with a description and a fix; the first match counts."""

METADATA: Final = {"tensor_names": "torchao", "_quantization_metadata": "ComfyUI"}
"""Keys of a header's metadata that only quantised models have."""

PLAIN: Final = frozenset(CONFIG_NAMES) | {"F64"}
"""Dtypes of weights that are not quantised."""

UNWEIGHED: Final = frozenset({"BOOL", "I64"})
"""Dtypes of buffers, not of weights."""

_PATCHES: Final = re.compile(r"patch_embedding\.weight$")
_SCALES: Final = re.compile("|".join(pattern for pattern, what in NAMES.items() if what.startswith("quantised")))
_BUFFERS: Final = re.compile(r"(position_ids|spiece_model)$")


@dataclass(frozen=True, slots=True)
class Foreign:
    """Evidence that weights are not plain, and how to get plain ones."""

    evidence: str
    step: str

    def __str__(self) -> str:
        return f"{self.evidence}: {self.step}"


def quantisation(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Return the key and the method of a config's quantisation; None if the config declares none."""
    for prefix, section in (("", config), ("text_config.", config.get("text_config"))):
        if not isinstance(section, Mapping):
            continue
        for key in CONFIG_KEYS:
            if isinstance(found := section.get(key), Mapping) and found:
                return f"{prefix}{key}", ", ".join(_described(key, found))
    return None


def check_plain(checkpoint: Checkpoint) -> None:
    """Refuse quantised or empty weights, as config.json, headers and dtypes show them.

    A stale `quantization_config` on weights of full precision is ignored.

    Raises:
        CheckpointError: The weights are quantised or empty.
    """
    found = _empty(checkpoint) or _quantised(checkpoint)
    if found is not None:
        raise CheckpointError(found.evidence, where=checkpoint.path, hint=found.step)


def describe(checkpoint: Checkpoint, names: Iterable[str]) -> str | None:
    """Explain why a checkpoint does not fit its config, and how to fix it.

    Args:
        checkpoint: The checkpoint.
        names: The tensors that do not fit its config.

    Returns:
        A sentence; None if there is no evidence.
    """
    found = _empty(checkpoint) or _quantised(checkpoint) or _channels_last(checkpoint) or _cast(checkpoint)
    return str(found) if found is not None else _named(names)


def remarks(checkpoint: Checkpoint) -> Iterator[str]:
    """Yield notes on a quantisation that config.json declares but the weights lack, and on signs of foreign weights."""
    said = quantisation(checkpoint.config)
    if said is not None and _first_odd(checkpoint) is None:
        yield f"config.json has a {said[0]} ({said[1]}), but the weights are not quantised: ignored"
    elif (found := _empty(checkpoint) or _quantised(checkpoint)) is not None:
        yield str(found)


def _described(key: str, fields: Mapping[str, Any]) -> Iterator[str]:
    """Return the method, then its details."""
    yield _method(key, fields)
    for name in DETAILS:
        if isinstance(value := fields.get(name), str):
            yield value[:100]
    yield from (bits for name, bits in SWITCHES.items() if fields.get(name) is True)
    if type(width := fields.get("bits")) is int:
        yield f"{width} bits"


def _method(key: str, fields: Mapping[str, Any]) -> str:
    method = fields.get("quant_method")
    if isinstance(method, str):
        return method[:100]
    if key == "quantization":
        return "mlx"
    return "bitsandbytes" if fields.keys() & SWITCHES.keys() else "unknown method"


def _quantised(checkpoint: Checkpoint) -> Foreign | None:
    """Return the evidence in config.json and the headers' metadata; None if all weights are plain.

    A config may be a leftover from before the weights were dequantised, and full-precision files also have MLX's
    metadata.
    """
    said = quantisation(checkpoint.config)
    metadata = next(_said_by_metadata(checkpoint), None)
    if (said is None and metadata is None) or _first_odd(checkpoint) is None:
        return None
    if said is not None:
        step = METHODS.get(said[1].partition(", ")[0], DEQUANTISE)
        return Foreign(f"config.json says that the model is quantised ({said[1]})", step)
    return metadata


def _said_by_metadata(checkpoint: Checkpoint) -> Iterator[Foreign]:
    for name, header in checkpoint.files.items():
        evidence = f"the metadata of {name} say that the model is quantised"
        if header.metadata.get("format") == "mlx":
            yield Foreign(f"{evidence} (mlx)", MLX)
        for key, what in METADATA.items():
            if key in header.metadata:
                yield Foreign(f"{evidence} ({what})", DEQUANTISE)


def _first_odd(checkpoint: Checkpoint) -> str | None:
    """Return the first tensor that has a packed dtype or scales another tensor; None if there is none."""
    odd = (name for name, stored in checkpoint.tensors.items() if _is_packed(stored) or _SCALES.search(name))
    return next(odd, None)


def _is_packed(stored: StoredTensor) -> bool:
    entry = stored.entry
    return entry.dtype not in PLAIN | UNWEIGHED and _BUFFERS.search(entry.name) is None


def _empty(checkpoint: Checkpoint) -> Foreign | None:
    """Return evidence of empty tensors, which ZeRO-3 leaves if a wrapper's state dict is saved without gathering it."""
    empty = [name for name, stored in checkpoint.tensors.items() if stored.entry.shape == (0,)]
    if not empty:
        return None
    return Foreign(
        f"{len(empty)} tensor(s) have shape [0], such as {empty[0]}: saved under DeepSpeed's ZeRO-3 without gathering",
        "run: python CHECKPOINT/zero_to_fp32.py CHECKPOINT OUT --safe_serialization, or train with "
        "stage3_gather_16bit_weights_on_model_save",
    )


def _channels_last(checkpoint: Checkpoint) -> Foreign | None:
    """Return evidence of MLX: its patch embedding is [out, height, width, in], PyTorch's [out, in, height, width]."""
    for name, stored in checkpoint.tensors.items():
        shape = stored.entry.shape
        if _PATCHES.search(name) and len(shape) == 4 and shape[1] == shape[2] != shape[3]:
            return Foreign(
                f"{name} has shape {list(shape)}, with the channels last: the model has the MLX layout",
                "pass the original model, or store this tensor as weight.permute(0, 3, 1, 2)",
            )
    return None


def _cast(checkpoint: Checkpoint) -> Foreign | None:
    """Return evidence of weights with a packed dtype, if there is no other evidence."""
    packed = [name for name, stored in checkpoint.tensors.items() if _is_packed(stored)]
    if not packed or _named(checkpoint.tensors) is not None:
        return None
    dtype = checkpoint.tensors[packed[0]].entry.dtype
    if dtype.startswith("F8_"):
        step = "store it as bfloat16: safetensors.torch.load_file, .to(torch.bfloat16), save_file"
        return Foreign(f"{packed[0]} is {dtype}: the model is quantised (FP8 without scales)", f"{step}; or {ORIGINAL}")
    return Foreign(f"{packed[0]} is {dtype}: the model is quantised", DEQUANTISE)


def _named(names: Iterable[str]) -> str | None:
    """Return the description for the tensor names; None if no pattern matches."""
    every = list(names)
    for pattern, what in NAMES.items():
        search = re.compile(pattern).search
        if (name := next(filter(search, every), None)) is not None:
            return f"{name} shows that the model is {what}"
    return None
