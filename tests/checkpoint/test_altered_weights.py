"""Quantised, wrapped or renamed weights: how they are recognized, and the hint to get plain ones."""

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from t5g2convert import convert, inspect, plan
from t5g2convert.checkpoint.altered_weights import NAMES, quantisation
from t5g2convert.checkpoint.header import BITS, read_header
from t5g2convert.errors import CheckpointError

Tensors = dict[str, tuple[str, list[int]]]
Change = Callable[[str, list[int]], Tensors]


def rewrite(folder: Path, change: Change, metadata: Mapping[str, str] | None = None) -> None:
    """Rewrite the only weight file with zeros, and apply a change to each tensor."""
    path = folder / "model.safetensors"
    made: Tensors = {}
    for name, entry in read_header(path).tensors.items():
        made |= change(name, list(entry.shape)) if "proj.weight" in name else {name: (entry.dtype, list(entry.shape))}
    header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, (dtype, shape) in made.items():
        end = position + math.prod(shape) * BITS[dtype] // 8
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(position))


def set_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def stem(name: str) -> str:
    return name.removesuffix("weight")


def mlx4(name: str, shape: list[int]) -> Tensors:
    scales = ("BF16", [shape[0], 1])
    return {name: ("U32", [shape[0], shape[1] // 8]), f"{stem(name)}scales": scales, f"{stem(name)}biases": scales}


def packed(name: str, shape: list[int]) -> Tensors:
    scale = ("BF16", [shape[0], 1])
    return {f"{name}_packed": ("I32", [shape[0], shape[1] // 8]), f"{name}_scale": scale, f"{name}_shape": ("I64", [2])}


def nvfp4(name: str, shape: list[int]) -> Tensors:
    scale = ("F8_E4M3", [shape[0], 2])
    return {name: ("U8", [shape[0], shape[1] // 2]), f"{name}_scale": scale, f"{name}_scale_2": ("F32", [])}


def bnb4(name: str, shape: list[int]) -> Tensors:
    return {name: ("U8", [shape[0] * shape[1] // 2, 1]), f"{name}.absmax": ("F32", [4])}


def bnb8(name: str, shape: list[int]) -> Tensors:
    return {name: ("I8", shape), f"{stem(name)}SCB": ("F32", [shape[0]])}


def gptq(name: str, shape: list[int]) -> Tensors:
    return {f"{stem(name)}qweight": ("I32", [shape[1] // 8, shape[0]]), f"{stem(name)}qzeros": ("I32", [1, 1])}


def hqq(name: str, shape: list[int]) -> Tensors:
    return {f"{stem(name)}W_q": ("U8", shape), f"{stem(name)}scale": ("BF16", [1])}


def fp8(name: str, shape: list[int]) -> Tensors:
    return {name: ("F8_E4M3", shape)}


def fp8_scaled(name: str, shape: list[int]) -> Tensors:
    return {name: ("F8_E4M3", shape), f"{name}_scale": ("F32", [])}


def torchao(name: str, shape: list[int]) -> Tensors:
    return {f"{name}_qdata": ("I8", shape), f"{name}_scale": ("F32", [shape[0]])}


QUANTISED: Final[dict[str, tuple[Change, dict[str, Any], str, str]]] = {
    "mlx": (mlx4, {"quantization": {"bits": 4, "group_size": 64}}, "(mlx, 4 bits)", "mlx_lm.convert -d"),
    "fp8 without scales": (fp8, {"quantization_config": {"quant_method": "fp8"}}, "(fp8)", "FineGrainedFP8Config"),
    "int4": (
        packed,
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "pack-quantized"}},
        "(compressed-tensors, pack-quantized)",
        "CompressedTensorsConfig(dequantize=True)",
    ),
    "compressed FP8": (
        fp8_scaled,
        {"quantization_config": {"quant_method": "compressed-tensors", "format": "float-quantized"}},
        "(compressed-tensors, float-quantized)",
        "CompressedTensorsConfig(dequantize=True)",
    ),
    "an older key": (
        packed,
        {"compression_config": {"quant_method": "compressed-tensors"}},
        "(compressed-tensors)",
        "dequantise",
    ),
    "nvfp4": (
        nvfp4,
        {"quantization_config": {"quant_method": "modelopt", "quant_algo": "NVFP4"}},
        "(modelopt, NVFP4)",
        "the original, unquantised model",
    ),
    "bnb 4 bits": (bnb4, {"quantization_config": {"load_in_4bit": True}}, "(bitsandbytes, 4 bits)", "dequantize()"),
    "bnb 8 bits": (
        bnb8,
        {"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}},
        "(bitsandbytes, 8 bits)",
        "dequantize()",
    ),
    "gptq": (
        gptq,
        {"quantization_config": {"quant_method": "gptq", "bits": 4}},
        "(gptq, 4 bits)",
        "the original, unquantised model",
    ),
    "awq": (gptq, {"quantization_config": {"quant_method": "awq"}}, "(awq)", "the original, unquantised model"),
    "hqq": (hqq, {"quantization_config": {"quant_method": "hqq"}}, "(hqq)", "the original, unquantised model"),
    "torchao": (
        torchao,
        {"quantization_config": {"quant_method": "torchao"}},
        "(torchao)",
        "the original, unquantised model",
    ),
    "no method": (fp8, {"quantization_config": {"group_size": 3}}, "(unknown method)", "dequantise"),
}


@pytest.mark.parametrize("case", QUANTISED)
def test_I7_a_quantised_config_is_refused_in_one_line(case: str, demo_source: Path, tmp_path: Path) -> None:
    change, config, method, step = QUANTISED[case]
    rewrite(demo_source, change)
    set_config(demo_source, **config)
    for read in (plan, lambda folder: convert(folder, tmp_path / "out")):
        with pytest.raises(CheckpointError) as refused:
            read(demo_source)
        assert refused.value.message == f"config.json says that the model is quantised {method}"
        assert step in (refused.value.hint or "")
        assert refused.value.details == ()
    assert not (tmp_path / "out").exists()
    notes = [note for note in inspect(demo_source).notes if "quantised" in note]
    assert notes == [f"config.json says that the model is quantised {method}: {refused.value.hint}"]


@pytest.mark.parametrize("place", ["top", "text_config"])
def test_a_config_that_was_left_on_plain_weights_is_noted_and_not_carried(
    place: str, demo_source: Path, tmp_path: Path
) -> None:
    left = {"quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    config = json.loads((demo_source / "config.json").read_text())
    set_config(demo_source, **(left if place == "top" else {"text_config": config["text_config"] | left}))
    key = "quantization_config" if place == "top" else "text_config.quantization_config"
    note = f"config.json has a {key} (bitsandbytes, 4 bits), but the weights are not quantised: ignored"
    assert note in plan(demo_source).notes
    assert note in inspect(demo_source).notes
    convert(demo_source, tmp_path / "out", flush=False)
    assert "quantization" not in (tmp_path / "out/config.json").read_text()


def test_a_leftover_config_does_not_hide_other_faults(demo_source: Path) -> None:
    set_config(demo_source, quantization_config={"quant_method": "fp8"})
    rewrite(demo_source, lambda name, shape: {name: ("BF16", shape)} if "layers.0.mlp.up" not in name else {})
    with pytest.raises(CheckpointError, match="1 missing") as refused:
        plan(demo_source)
    assert refused.value.hint is None


BY_METADATA: Final[dict[str, tuple[Change, dict[str, str], str]]] = {
    "mlx": (mlx4, {"format": "mlx"}, "the metadata of model.safetensors say that the model is quantised (mlx)"),
    "torchao": (
        torchao,
        {"tensor_names": "[]"},
        "the metadata of model.safetensors say that the model is quantised (torchao)",
    ),
}


@pytest.mark.parametrize("case", BY_METADATA)
def test_altered_weights_named_in_metadata_are_refused(case: str, demo_source: Path) -> None:
    change, metadata, says = BY_METADATA[case]
    rewrite(demo_source, change, metadata)
    with pytest.raises(CheckpointError) as refused:
        plan(demo_source)
    assert refused.value.message == says


def test_the_metadata_of_mlx_on_plain_weights_say_nothing(demo_source: Path) -> None:
    rewrite(demo_source, lambda name, shape: {name: ("BF16", shape)}, {"format": "mlx"})
    assert not [note for note in plan(demo_source).notes if "quantised" in note]


def empty(name: str, shape: list[int]) -> Tensors:
    return {name: ("BF16", [0])}


def test_the_empty_tensors_of_zero_3_are_recognized(demo_source: Path) -> None:
    rewrite(demo_source, empty)
    with pytest.raises(CheckpointError, match=r"tensor\(s\) have shape \[0\].*ZeRO-3") as refused:
        plan(demo_source)
    assert "zero_to_fp32.py" in (refused.value.hint or "")
    assert any("ZeRO-3" in note for note in inspect(demo_source).notes)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointError) as refused:
        plan(folder)
    return refused.value.hint or ""


def test_the_mlx_layout_is_recognized_by_its_patch_shape(demo_source: Path) -> None:
    path = demo_source / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    name = next(name for name in header if name.endswith("patch_embedding.weight"))
    out, channels, height, width = header[name]["shape"]
    header[name]["shape"] = [out, height, width, channels]
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    hint = refusal(demo_source)
    assert "channels last: the model has the MLX layout" in hint
    assert "permute(0, 3, 1, 2)" in hint


def test_undeclared_fp8_is_recognized_by_its_dtype(demo_source: Path) -> None:
    rewrite(demo_source, fp8)
    assert "is F8_E4M3: the model is quantised (FP8 without scales)" in refusal(demo_source)


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("change", "says"),
    [
        (mlx4, "quantised (MLX)"),
        (packed, "quantised (compressed-tensors)"),
        (nvfp4, "quantised (NVFP4)"),
        (bnb4, "quantised (bitsandbytes 4-bit)"),
        (bnb8, "quantised (bitsandbytes int8)"),
        (gptq, "quantised (GPTQ or AWQ)"),
        (hqq, "quantised (HQQ)"),
        (torchao, "quantised (torchao or quanto)"),
        (fp8_scaled, "quantised (FP8 with scales)"),
    ],
)
def test_altered_weights_are_recognized_by_name_alone(change: Change, says: str, demo_source: Path) -> None:
    rewrite(demo_source, change)
    assert f"shows that the model is {says}" in refusal(demo_source)


def renamed(folder: Path, rename: Callable[[str], str]) -> None:
    path = folder / "model.safetensors"
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    text = json.dumps({rename(name) if name != "__metadata__" else name: value for name, value in header.items()})
    path.write_bytes(len(text.encode()).to_bytes(8, "little") + text.encode() + data[8 + length :])


@pytest.mark.parametrize(
    ("rename", "says"),
    [
        (lambda name: f"module.{name}", "a DDP or DeepSpeed wrapper: save model.module"),
        (lambda name: f"_forward_module.{name}", "a Lightning wrapper"),
        (lambda name: f"_orig_mod.{name}", "a torch.compile wrapper"),
        (lambda name: f"_fsdp_wrapped_module.{name}", "an FSDP wrapper"),
        (lambda name: f"base_model.model.{name}", "saved from a peft model: merge"),
        (lambda name: name.replace("q_proj.weight", "q_proj.base_layer.weight"), "saved from a peft model: merge"),
        (
            lambda name: name.replace("embed_tokens.weight", "embed_tokens.modules_to_save.default.weight"),
            "saved from a peft model: merge",
        ),
        (
            lambda name: name.replace("language_model.model.", "model.").replace("vision_tower.", "vision_model."),
            "a ComfyUI single file",
        ),
        (lambda name: name.replace("language_model.model.layers.", "blk."), "stored with llama.cpp's"),
        (lambda name: name.replace("q_proj", "qkv_proj"), "fused"),
        (lambda name: f"_orig_mod.module.{name}", "a torch.compile wrapper"),
    ],
)
def test_a_wrapper_is_recognized_by_its_names(rename: Callable[[str], str], says: str, demo_source: Path) -> None:
    renamed(demo_source, rename)
    assert says in refusal(demo_source)


@pytest.mark.parametrize(
    "name", ["embed_tokens.embed_scale", "rotary_emb.inv_freq", "embeddings.position_ids", "x.eoi"]
)
def test_a_buffer_is_not_taken_for_a_scale(name: str) -> None:
    import re

    assert not [pattern for pattern in NAMES if re.search(pattern, f"model.{name}")]


@pytest.mark.parametrize(
    "config", [{}, {"quantization_config": None}, {"quantization_config": {}}, {"quantization": 3}]
)
def test_a_config_that_says_nothing(config: dict[str, Any]) -> None:
    assert quantisation(config) is None
