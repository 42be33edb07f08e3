"""The example that dequantises GGUF files: names, config and values."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFWriter, dequantize, quantize
from numpy.typing import NDArray
from real_gemma3 import bfloat16, config_of, hub_name, main
from safetensors.torch import load_file
from transformers import Gemma3ForCausalLM

from t5g2convert import convert, inspect, verify
from tests.examples.conftest import run

SETTINGS = {
    "block_count": 7, "embedding_length": 64, "feed_forward_length": 96, "context_length": 4096,
    "attention.head_count": 2, "attention.head_count_kv": 1, "attention.key_length": 32, "attention.value_length": 32,
    "attention.sliding_window": 9,
}  # fmt: skip
REALS = {"attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 1e6}
ROWS = 48


def shapes() -> dict[str, tuple[int, ...]]:
    layer = {
        "attn_norm": (64,), "attn_q": (64, 64), "attn_k": (32, 64), "attn_v": (32, 64), "attn_output": (64, 64),
        "attn_q_norm": (32,), "attn_k_norm": (32,), "post_attention_norm": (64,), "ffn_norm": (64,),
        "ffn_gate": (96, 64), "ffn_up": (96, 64), "ffn_down": (64, 96), "post_ffw_norm": (64,),
    }  # fmt: skip
    layers = {f"blk.{number}.{name}.weight": shape for number in range(7) for name, shape in layer.items()}
    return {"token_embd.weight": (ROWS, 64), "output_norm.weight": (64,), **layers}


def write_gguf(path: Path, **settings: Any) -> dict[str, NDArray[np.float32]]:
    """Write a tiny Gemma 3, matrices in Q8_0, and return the values that it stands for."""
    writer, drawn, values = GGUFWriter(path, "gemma3"), np.random.default_rng(0), {}
    for name, number in {**SETTINGS, **settings}.items():
        writer.add_uint32(f"gemma3.{name}", number)
    for name, real in REALS.items():
        writer.add_float32(f"gemma3.{name}", real)
    for name, token in (("bos", 2), ("eos", 1), ("padding", 0)):
        writer.add_uint32(f"tokenizer.ggml.{name}_token_id", token)
    for name, shape in shapes().items():
        value = drawn.normal(size=shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, value)
        else:
            packed = quantize(value, GGMLQuantizationType.Q8_0)
            value = dequantize(packed, GGMLQuantizationType.Q8_0)
            writer.add_tensor(name, packed, raw_dtype=GGMLQuantizationType.Q8_0)
        values[name] = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def test_a_gguf_file_becomes_a_folder_that_converts_and_verifies(tmp_path: Path) -> None:
    values = write_gguf(tmp_path / "tiny.gguf")
    out = tmp_path / "gemma"
    assert "is written" in run("real_gemma3.py", "dequantise", tmp_path / "tiny.gguf", out)
    found = load_file(out / "model.safetensors")
    assert len(found) == len(values)
    for name, value in values.items():
        expected = torch.from_numpy(value - 1 if value.ndim == 1 else value).bfloat16()
        assert torch.equal(found[hub_name(name)], expected), name
    model = Gemma3ForCausalLM.from_pretrained(out)
    assert model.config.layer_types == ["sliding_attention"] * 5 + ["full_attention", "sliding_attention"]
    assert (model.config.query_pre_attn_scalar, model.config.rms_norm_eps) == (32, 1e-6)
    assert inspect(out).parameters["total"] == sum(value.size for value in values.values())
    convert(out, tmp_path / "converted")
    assert verify(tmp_path / "converted", out).passed
    assert "is there" in run("real_gemma3.py", "dequantise", tmp_path / "tiny.gguf", out)
    assert {path.name for path in tmp_path.iterdir()} == {"tiny.gguf", "gemma", "converted"}


@pytest.mark.parametrize("name", ["v.blk.0.attn_q.weight", "blk.0.attn_sinks.weight", "rope_freqs.weight"])
def test_a_tensor_of_another_model_is_refused(name: str) -> None:
    with pytest.raises(SystemExit, match="is not one of a text-only Gemma 3"):
        hub_name(name)


def test_the_config_follows_the_metadata() -> None:
    ids = {"tokenizer.ggml.bos_token_id": 2, "tokenizer.ggml.eos_token_id": 106, "tokenizer.ggml.padding_token_id": 0}
    settings: dict[str, Any] = {"general.architecture": "gemma3", **ids}
    settings |= {f"gemma3.{name}": value for name, value in {**SETTINGS, **REALS}.items()}
    config = config_of({**settings, "gemma3.rope.scaling.factor": 8.0}, vocabulary=99)
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 8.0}
    assert (config["vocab_size"], config["eos_token_id"]) == (99, 106)
    large = {**settings, "gemma3.block_count": 62, "gemma3.embedding_length": 5376, "gemma3.attention.head_count": 32}
    assert config_of(large, vocabulary=99)["query_pre_attn_scalar"] == 168
    for name, value, reason in (
        ("gemma3.final_logit_softcapping", 30.0, "sets gemma3.final_logit_softcapping, which is not read"),
        ("gemma3.rope.scaling.type", "yarn", "the scaling of RoPE is 'yarn'"),
        ("gemma3.attention.value_length", 64, "different lengths"),
    ):
        with pytest.raises(SystemExit, match=reason):
            config_of({**settings, name: value}, vocabulary=99)
    with pytest.raises(SystemExit, match="the architecture is 'llama'"):
        config_of({**settings, "general.architecture": "llama"}, vocabulary=99)
    del settings["gemma3.block_count"]
    with pytest.raises(SystemExit, match=r"has no gemma3\.block_count"):
        config_of(settings, vocabulary=99)


def test_a_file_without_all_tensors_and_a_folder_of_others_are_refused(tmp_path: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf", block_count=8)
    arguments = ("dequantise", str(tmp_path / "tiny.gguf"), str(tmp_path / "gemma"))
    assert "lacks 13 tensors, for example model.layers.7." in refused(arguments)
    assert not (tmp_path / "gemma").exists()
    (tmp_path / "gemma").mkdir()
    assert "exists, but is no model" in refused(arguments)


def refused(arguments: Sequence[str]) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["real_gemma3.py", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
    return str(end.value.code)


def test_values_are_rounded_as_torch_rounds_them() -> None:
    bits = np.random.default_rng(1).integers(0, 2**31, 10_000, dtype=np.uint32)
    values = bits.view(np.float32)
    values = values[np.isfinite(values)]
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bfloat16(values), expected)


def test_every_target_of_the_table_is_named_once() -> None:
    names = [hub_name(name) for name in shapes()]
    assert len(set(names)) == len(names)
    assert json.dumps(names).count("layernorm") == 4 * 7
