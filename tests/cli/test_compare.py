import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import compare, convert
from tests.cli.commandline import CommandLine, assert_one_line_error, document

TEXT = "The quick brown fox jumps over the lazy dog."


@pytest.fixture
def output(demo_source: Path, tmp_path: Path) -> Path:
    """Return a conversion of `demo_source` that the test may train."""
    convert(demo_source, tmp_path / "out", flush=False)
    return tmp_path / "out"


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "text").write_text(TEXT)
    return tmp_path / "text"


def train(output: Path, amount: float) -> None:
    tensors = load_file(output / "model.safetensors")
    generator = torch.Generator().manual_seed(3)
    for name in sorted(tensors):
        if name.startswith("model.decoder."):
            noise = torch.randn(tensors[name].shape, generator=generator) * amount
            tensors[name] = tensors[name] + noise.to(tensors[name].dtype)
    save_file(tensors, output / "model.safetensors", {"format": "pt"})


def test_a_fresh_conversion_has_not_moved(t5g2: CommandLine, demo_source: Path, output: Path, text: Path) -> None:
    result = t5g2("compare", demo_source, output, "--text", text)
    assert (result.code, result.err) == (0, "")
    found = document(t5g2("compare", demo_source, output, "--text", text, "--json"))
    alone = found["decoder_alone"]
    assert (alone["kl"], alone["agreement"], alone["tokens"]) == (0, 1, len(TEXT) - 1)
    assert alone["gemma3_perplexity"] == alone["t5gemma2_perplexity"]
    assert "100.00%" in result.out
    for layer in ("embed_tokens", *(f"layers.{number}" for number in range(8))):
        assert f" {layer} " in result.out
    passed = t5g2("compare", demo_source, output, "--text", text, "--max-kl", "0", "--min-agreement", "1")
    assert passed.code == 0


def test_json_equals_the_library_result(t5g2: CommandLine, demo_source: Path, output: Path, text: Path) -> None:
    train(output, 0.05)
    result = t5g2("compare", demo_source, output, "--text", text, "--dtype", "float32", "--max-tokens", "20", "--json")
    assert (result.code, result.err) == (0, "")
    expected = compare(demo_source, output, text, dtype="float32", max_tokens=20)
    assert document(result) == json.loads(json.dumps(expected.to_json()))
    assert expected.decoder_alone.kl > 0
    assert expected.decoder_alone.tokens == 19


def test_gates_are_exit_6_and_say_what_is_wrong(t5g2: CommandLine, demo_source: Path, output: Path, text: Path) -> None:
    train(output, 0.01)
    alone = compare(demo_source, output, text).decoder_alone
    assert 0 < alone.agreement < 1
    run: list[str | Path] = ["compare", demo_source, output, "--text", text]
    assert t5g2(*run, "--max-kl", str(alone.kl * 1.01), "--min-agreement", str(alone.agreement)).code == 0
    for gate, value, word in (("--max-kl", alone.kl * 0.99, "KL"), ("--min-agreement", 1, "agreement")):
        result = t5g2(*run, gate, str(value))
        assert_one_line_error(result, 6, printed=True)
        assert word in result.err
        assert "decoder alone" in result.out
        as_json = t5g2(*run, gate, str(value), "--json")
        assert (as_json.code, as_json.err) == (6, "")
        assert document(as_json)["decoder_alone"]["kl"] == alone.kl
    both = t5g2(*run, "--max-kl", "0", "--min-agreement", "1")
    assert_one_line_error(both, 6, printed=True)
    assert "KL" in both.err
    assert "agreement" in both.err


@pytest.mark.parametrize("gate", [["--max-kl", "1e9"], ["--min-agreement", "0.01"]])
def test_a_model_that_is_not_finite_fails_every_gate(
    gate: list[str], t5g2: CommandLine, demo_source: Path, output: Path, text: Path
) -> None:
    tensors = load_file(output / "model.safetensors")
    tensors["model.decoder.norm.weight"][0] = math.nan
    save_file(tensors, output / "model.safetensors")
    assert t5g2("compare", demo_source, output, "--text", text, *gate).code == 6
    result = t5g2("compare", demo_source, output, "--text", text, *gate, "--json")
    assert result.code == 6
    assert document(result)["decoder_alone"]["tokens"] == len(TEXT) - 1


def test_logits_without_limits_are_reported_unchanged(
    t5g2: CommandLine, demo_source: Path, output: Path, text: Path
) -> None:
    tensors = load_file(output / "model.safetensors")
    tensors["model.decoder.norm.weight"] += 1e6
    save_file(tensors, output / "model.safetensors")
    result = t5g2("compare", demo_source, output, "--text", text)
    assert result.code == 0, result.err
    assert "inf" in result.out
    document(t5g2("compare", demo_source, output, "--text", text, "--json"))
    assert t5g2("compare", demo_source, output, "--text", text, "--max-kl", "100").code == 6


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["SOURCE", "OUTPUT"], 2),
        (["SOURCE", "OUTPUT", "--text", "MISSING"], 2),
        (["SOURCE", "OUTPUT", "--text", "SHORT"], 2),
        (["SOURCE", "OUTPUT", "--text", "SOURCE"], 2),
        (["SOURCE", "OUTPUT", "--text", "TEXT", "--max-tokens", "7"], 2),
        (["SOURCE", "OUTPUT", "--text", "TEXT", "--max-kl", "-1"], 2),
        (["SOURCE", "OUTPUT", "--text", "TEXT", "--min-agreement", "1.5"], 2),
        (["SOURCE", "OUTPUT", "--text", "TEXT", "--dtype", "int8"], 2),
        (["MISSING", "OUTPUT", "--text", "TEXT"], 3),
        (["SOURCE", "MISSING", "--text", "TEXT"], 3),
        (["OUTPUT", "OUTPUT", "--text", "TEXT"], 3),
        (["SOURCE", "SOURCE", "--text", "TEXT"], 3),
        (["SOURCE", "BARE", "--text", "TEXT"], 3),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_models_that_cannot_be_compared_have_their_own_exit_code(
    arguments: list[str], code: int, t5g2: CommandLine, demo_source: Path, output: Path, text: Path, tmp_path: Path
) -> None:
    (tmp_path / "short").write_text("short")
    shutil.copytree(output, tmp_path / "bare")
    (tmp_path / "bare/tokenizer.json").unlink()
    places = {
        "SOURCE": demo_source,
        "OUTPUT": output,
        "TEXT": text,
        "SHORT": tmp_path / "short",
        "BARE": tmp_path / "bare",
        "MISSING": tmp_path / "missing",
    }
    given = [places.get(item, item) for item in arguments]
    assert_one_line_error(t5g2("compare", *given), code)
    assert t5g2("compare", *given, "--json").error["code"] == code


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_a_missing_device_is_exit_2(t5g2: CommandLine, demo_source: Path, output: Path, text: Path) -> None:
    assert_one_line_error(t5g2("compare", demo_source, output, "--text", text, "--device", "cuda"), 2)


def test_nothing_is_written(t5g2: CommandLine, demo_source: Path, output: Path, text: Path, tmp_path: Path) -> None:
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    t5g2("compare", demo_source, output, "--text", text)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
