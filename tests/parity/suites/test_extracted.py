"""Verification of an encoder or decoder extracted from a T5Gemma 2, and of damaged ones."""

import json
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import CheckpointError, convert, verify
from tests.conftest import TwinFolder
from tests.parity.mutations import (
    OPERATORS,
    Bench,
    Document,
    Tally,
    check_of,
    close,
    departs,
    double,
    exchange,
    leaves,
    message_of,
    plausible,
    put,
    shift_rows,
)

PARTS = {"encoder": "encoder_parity", "decoder": "decoder_parity"}
MakeExtract = Callable[[str, str], Bench]


@pytest.fixture
def extract(converted_twin: TwinFolder, tmp_path: Path) -> MakeExtract:
    """Return a part of a converted twin that the test may damage."""

    def make(name: str, part: str) -> Bench:
        folder = tmp_path / f"{name}.{part}"
        convert(converted_twin(name), folder, part=part)
        return Bench.of(converted_twin(name), folder, tmp_path / f"{name}.{part}.damaged")

    return make


def parity_of(name: str, part: str) -> str:
    """Return the parity check that computes with a tensor."""
    return "vision_parity" if "vision_tower" in name or "multi_modal_projector" in name else PARTS[part]


@pytest.mark.sampled
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["text-8", "text-13", "text-float32", "text-sharded", "images-8", "images-float32"])
def test_an_extracted_part_passes_exactly(name: str, part: str, extract: MakeExtract) -> None:
    report = extract(name, part).judge()
    assert report.passed
    assert report.complete
    assert "difference 0" in check_of(report, PARTS[part]).detail
    vision = {"vision_parity"} if name.startswith("images") else set()
    assert {check.name for check in report.checks} >= {
        "integrity",
        "provenance",
        "config",
        "runs",
        PARTS[part],
        *vision,
    }


@pytest.mark.sampled
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_cast_part_passes(part: str, dtype: str, converted_twin: TwinFolder, tmp_path: Path) -> None:
    convert(converted_twin("text-float16"), tmp_path / "out", part=part, dtype=dtype)
    report = verify(tmp_path / "out", converted_twin("text-float16"), record=False)
    assert report.passed
    assert any("were cast from float16" in remark for remark in report.remarks)


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_a_fine_tuned_model_passes(part: str, converted_twin: TwinFolder, tmp_path: Path) -> None:
    """None of its tensors equals a Gemma 3's, and both stacks differ."""
    trained = tmp_path / "trained"
    trained.mkdir()
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(converted_twin("images-8") / "model.safetensors")
    moved = {
        name: (x.float() + 0.05 * torch.randn(x.shape, generator=generator)).to(x.dtype) for name, x in tensors.items()
    }
    save_file(moved, trained / "model.safetensors", {"format": "pt"})
    (trained / "config.json").write_bytes((converted_twin("images-8") / "config.json").read_bytes())
    (trained / "generation_config.json").write_bytes(
        (converted_twin("images-8") / "generation_config.json").read_bytes()
    )
    convert(trained, tmp_path / "out", part=part)
    report = verify(tmp_path / "out", trained, record=False)
    assert report.passed, report.failed
    assert not verify(tmp_path / "out", converted_twin("images-8"), record=False).passed


def test_a_part_with_raw_module_names_passes(converted_twin: TwinFolder, tmp_path: Path) -> None:
    """A raw state dict uses module names and repeats tied tensors."""
    raw = tmp_path / "raw"
    raw.mkdir()
    (raw / "config.json").write_bytes((converted_twin("images-8") / "config.json").read_bytes())
    names = {}
    tensors = load_file(converted_twin("images-8") / "model.safetensors")
    for name, tensor in tensors.items():
        stack = name.startswith(("model.encoder.layers.", "model.encoder.embed_tokens.", "model.encoder.norm."))
        names[name.replace("model.encoder.", "model.encoder.text_model.") if stack else name] = tensor
    table, ending = (f"model.encoder.text_model.embed_tokens.{name}" for name in ("weight", "eoi_embedding"))
    names["model.decoder.embed_tokens.weight"] = names["lm_head.out_proj.weight"] = names[table].clone()
    names["model.decoder.embed_tokens.eoi_embedding"] = names[ending].clone()
    names["lm_head.out_proj.weight"] = names[table].clone()
    save_file(names, raw / "model.safetensors", {"format": "pt"})
    for part in PARTS:
        for source in (raw, converted_twin("images-8")):
            convert(source, tmp_path / f"{source.name}.{part}", part=part)
        found, expected = ((tmp_path / f"{name}.{part}/model.safetensors") for name in ("raw", "images-8"))
        assert found.read_bytes() == expected.read_bytes()
        assert verify(tmp_path / f"raw.{part}", raw, record=False).passed
    names["lm_head.out_proj.weight"][3, 2] += 1
    save_file(names, raw / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"lm_head\.out_proj\.weight"):
        convert(raw, tmp_path / "untied", part="decoder")


@pytest.mark.parametrize("part", PARTS)
def test_a_part_of_an_unbalanced_pair_passes(
    part: str, twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    """The decoder has other layers and another parent than the encoder."""
    whole = tmp_path / "whole"
    convert(twin_folder("text-8"), whole, decoder_from=twin_folder("text-13"), decoder_layers="1:13:3")
    convert(whole, tmp_path / "out", part=part)
    report = verify(tmp_path / "out", whole, record=False)
    assert report.passed, report.failed
    config = json.loads((tmp_path / "out/config.json").read_text())
    text = config["text_config"] if part == "encoder" else config
    assert text["num_hidden_layers"] == len(text["layer_types"]) == {"encoder": 8, "decoder": 4}[part]
    assert text["sliding_window"] == {"encoder": 7, "decoder": 6}[part]


@pytest.mark.slow
@pytest.mark.usefixtures("without_use")
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["text-float32", "images-8"])
def test_every_damaged_tensor_is_caught_by_its_parity_check(name: str, part: str, extract: MakeExtract) -> None:
    bench, tally = extract(name, part), Tally()
    with bench.tensors() as tensors:
        names = [item for item, tensor in tensors.items() if tensor.numel() and "position_embedding" not in item]
    # Doubling before a norm changes nothing after it.
    operators = [operator for operator in OPERATORS if operator is not double]
    for tensor, operator in zip(names, cycle(operators), strict=False):
        if tensor.endswith("k_proj.bias"):
            continue  # it adds the same value to all scores of a query
        if tensor.endswith("embed_tokens.weight"):
            operator = shift_rows  # no token may read the changed row
        before = {path.name: path.read_bytes() for path in bench.folder.iterdir()}
        with bench.tensors() as tensors:
            if not tensors[tensor].any():
                continue
            operator(tensors[tensor])
        if before == {path.name: path.read_bytes() for path in bench.folder.iterdir()}:
            continue
        report = bench.resealed()
        tally.add(f"{operator.__name__} {tensor}", report)
        failed = {check.name for check in report.failed}
        assert "provenance" in failed, tensor
        stub = name.startswith("text") and parity_of(tensor, part) == "vision_parity"
        if not (stub or "eoi_embedding" in tensor):
            assert parity_of(tensor, part) in failed, f"{operator.__name__} {tensor}"
    close(tally, f"{part} taken out, {name}")


@pytest.mark.parametrize("part", PARTS)
def test_the_first_different_layer_is_named(part: str, extract: MakeExtract) -> None:
    bench = extract("images-8", part)
    root = {"encoder": "", "decoder": "language_model.model."}[part]
    with bench.tensors() as tensors:
        shift_rows(tensors[f"{root}layers.5.mlp.up_proj.weight"])
    assert departs(bench.resealed(), PARTS[part]).startswith(f"{part} layers.5 (full_attention), mlp.up_proj")
    with bench.tensors() as tensors:
        shift_rows(tensors[f"{root}embed_tokens.weight"])
    assert departs(bench.resealed(), PARTS[part]).startswith("embed_tokens")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
def test_swapped_layers_are_caught(part: str, extract: MakeExtract) -> None:
    bench, tally = extract("images-8", part), Tally()
    root = {"encoder": "", "decoder": "language_model.model."}[part]
    for number in range(7):
        for module in ("self_attn.q_proj", "self_attn.k_norm", "mlp.down_proj"):
            with bench.tensors() as tensors:
                exchange(
                    tensors, f"{root}layers.{number}.{module}.weight", f"{root}layers.{number + 1}.{module}.weight"
                )
            report = bench.resealed()
            tally.add(f"{module} of {number}", report)
            assert {"provenance", PARTS[part]} <= {check.name for check in report.failed}
    close(tally, f"{part} taken out, exchanged")


@pytest.mark.slow
@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("name", ["text-8", "images-8"])
def test_every_setting_of_a_part_is_checked(name: str, part: str, extract: MakeExtract) -> None:
    bench, tally = extract(name, part), Tally()
    config = json.loads((bench.folder / "config.json").read_text())
    for path, value in leaves(config):
        bench.edit("config.json", lambda document, path=path, value=value: put(document, path, plausible(path, value)))
        report = bench.resealed()
        tally.add(".".join(map(str, path)), report)
        assert "config" in {check.name for check in report.failed}, path
    close(tally, f"settings of a part, {name}")


FALSE_FIELDS: dict[str, Callable[[Document], object]] = {
    "mapping": lambda document: document["mapping"].update(name="gemma3"),
    "another part": lambda document: document["mapping"].update(name="t5gemma2-encoder"),
    "family": lambda document: document["source"].update(family="gemma3"),
    "layout": lambda document: document["source"]["layout"].update(encoder="model.encoder.text_model."),
    "dtype": lambda document: document.update(dtype="float16"),
    "parameters": lambda document: document["parameters"].update(decoder=1),
    "dropped": lambda document: document["dropped"].pop(),
    "options": lambda document: document.update(options={"dtype": "float32"}),
    "options of another model": lambda document: document.update(options={"sliding_window": 9}),
    "changes": lambda document: document.update(changes=[{"field": "vocab_size", "source": 300, "target": 299}]),
    "tokens": lambda document: document.update(tokens=[{"token": "a", "source": 1, "target": 2, "replaces": "b"}]),
}


@pytest.mark.sampled
@pytest.mark.parametrize("false_field", FALSE_FIELDS)
def test_a_false_field_in_the_manifest_is_caught(false_field: str, extract: MakeExtract) -> None:
    bench = extract("images-8", "decoder")
    bench.reseal(FALSE_FIELDS[false_field])
    assert not bench.judge().passed


def test_an_encoder_is_not_a_decoder(extract: MakeExtract) -> None:
    encoder, decoder = (extract("text-8", part) for part in PARTS)
    (encoder.folder / "model.safetensors").write_bytes((decoder.folder / "model.safetensors").read_bytes())
    encoder.reseal()
    failed = {check.name for check in encoder.judge().failed}
    assert {"provenance", "config", "encoder_parity", "runs"} <= failed


def test_a_part_is_compared_with_the_model_it_was_extracted_from(
    extract: MakeExtract, converted_twin: TwinFolder
) -> None:
    report = verify(extract("text-8", "decoder").folder, converted_twin("text-13"), record=False)
    assert not report.passed
    assert "7 layers" not in message_of(check_of(report, "decoder_parity"))


def test_a_gemma_3_is_not_the_source_of_a_part(extract: MakeExtract, twin_folder: TwinFolder) -> None:
    """The decoder has the same tensors but was not extracted from it."""
    with pytest.raises(CheckpointError, match="is not T5Gemma 2"):
        verify(extract("text-8", "decoder").folder, twin_folder("text-8"), record=False)


def test_without_a_source_integrity_and_use_of_a_part_are_checked(extract: MakeExtract) -> None:
    for part in PARTS:
        report = verify(extract("images-8", part).folder, record=False)
        assert report.passed
        assert [check.name for check in report.checks] == ["integrity", "runs"]
        assert set(report.skipped) == {"provenance", "config", "tokenizer", "vision_parity", PARTS[part]}


def test_a_part_that_ignores_its_input_fails_the_use_check(extract: MakeExtract) -> None:
    for part, root in (("encoder", ""), ("decoder", "language_model.model.")):
        bench = extract("images-8", part)
        with bench.tensors() as tensors:
            for name, tensor in tensors.items():
                if name.startswith(f"{root}layers.") and "self_attn.v_proj" in name:
                    tensor.zero_()
        check = check_of(bench.resealed(), "runs")
        assert not check.passed
        assert "do not depend on the order of words and text" in check.detail
