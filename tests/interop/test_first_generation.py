"""Gemma 2 to T5Gemma: transformers loads the conversion and computes the same as for its parent."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5GemmaConfig, T5GemmaForConditionalGeneration, T5GemmaModuleConfig

from t5g2convert import convert, generate, verify
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.parity.checks.config import SHARED
from t5g2convert.reference.prompts import TextCodec
from tests.conftest import TwinFolder
from tests.interop.judge import judge
from tests.interop.test_conversion import judged_by_the_oldest, oldest, shards, tensors
from tests.models.twins import GEMMA2_TWINS, Twin, respell, rewrite_config

NAMES = [twin.name for twin in GEMMA2_TWINS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("twin", GEMMA2_TWINS, ids=lambda twin: twin.name)
def test_the_equalities_hold_exactly(
    twin: Twin, dtype: torch.dtype, twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    judgement = judge(twin_folder(twin.name), converted_twin(twin.name), dtype)
    assert judgement.complaints == []
    assert (judgement.decoder, judgement.encoder, judgement.cross) == (0.0, 0.0, 0.0)
    assert judgement.finite
    assert len(judgement.generated) > 1


@oldest
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gemma2-5", "gemma2-7-untied", "gemma2-float32"])
def test_the_oldest_transformers_judges_the_first_generation_the_same(
    name: str, dtype: str, twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    judgement = judged_by_the_oldest(twin_folder(name), converted_twin(name), dtype)
    assert judgement["complaints"] == []
    assert (judgement["decoder"], judgement["encoder"], judgement["cross"]) == (0.0, 0.0, 0.0)
    assert judgement["finite"]


@pytest.mark.parametrize("name", NAMES)
def test_verify_passes_with_every_check(name: str, twin_folder: TwinFolder, converted_twin: TwinFolder) -> None:
    report = verify(converted_twin(name), twin_folder(name), record=False)
    assert [(check.name, check.passed) for check in report.checks] == [
        (check, True)
        for check in (
            "integrity", "provenance", "config", "decoder_parity", "encoder_parity", "cross_parity", "runs",
        )
    ]  # fmt: skip
    assert report.skipped == {"tokenizer": "the output has no tokenizer"}
    parities = [check.figures for check in report.checks if check.figures is not None]
    assert [(figures.max_abs, figures.departs) for figures in parities] == [(0.0, None)] * 3
    assert len(parities[2].drifts) == json.loads((twin_folder(name) / "config.json").read_text())["num_hidden_layers"]


@pytest.mark.parametrize("name", NAMES)
def test_transformers_reads_every_setting_unchanged_and_adds_none(name: str, converted_twin: TwinFolder) -> None:
    ours = json.loads((converted_twin(name) / "config.json").read_text())
    theirs = T5GemmaConfig.from_pretrained(converted_twin(name)).to_dict()
    for part in ("encoder", "decoder"):
        found = theirs.pop(part)
        stack = ours.pop(part)
        assert stack == {key: found[key] for key in stack}
        assert T5GemmaModuleConfig().to_dict().keys() & {*SHARED, "tie_word_embeddings", "is_decoder"} <= stack.keys()
    assert ours == {key: theirs[key] for key in ours}


def test_without_its_source_a_folder_is_checked_as_far_as_possible(converted_twin: TwinFolder) -> None:
    report = verify(converted_twin("gemma2-5"), record=False)
    assert report.passed
    assert [check.name for check in report.checks] == ["integrity", "runs"]
    assert report.skipped.keys() >= {"decoder_parity", "encoder_parity", "cross_parity"}


@pytest.mark.parametrize("target", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["gemma2-float32", "gemma2-7-untied"])
def test_a_cast_conversion_equals_the_source_loaded_in_that_dtype(
    name: str, target: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source = twin_folder(name)
    convert(source, tmp_path / "out", dtype=target)
    judgement = judge(source, tmp_path / "out", getattr(torch, target))
    assert (judgement.complaints, judgement.decoder, judgement.encoder, judgement.cross) == ([], 0.0, 0.0, 0.0)
    assert verify(tmp_path / "out", source, record=False).passed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_another_factor_and_window_equal_a_gemma_2_with_them(
    dtype: torch.dtype, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source = twin_folder("gemma2-5")
    convert(source, tmp_path / "out", rope_scaling="linear:3", sliding_window=9)

    def change(text: dict[str, Any]) -> None:
        text["rope_parameters"] = {"rope_type": "linear", "rope_theta": 1e4, "factor": 3.0}
        text["sliding_window"] = 9

    rewrite_config(source, tmp_path / "changed", change)
    judgement = judge(tmp_path / "changed", tmp_path / "out", dtype)
    assert (judgement.complaints, judgement.decoder, judgement.encoder, judgement.cross) == ([], 0.0, 0.0, 0.0)
    assert judge(source, tmp_path / "out", dtype).decoder > 0
    report = verify(tmp_path / "out", source, record=False)
    assert report.passed
    assert any("rope_parameters.factor of both stacks was changed from 1.0 to 3.0" in note for note in report.remarks)


def _dialect_4_42(text: dict[str, Any]) -> None:
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "cache_implementation": "hybrid", "hidden_act": "gelu_pytorch_tanh"}
    text["rope_scaling"] = {"type": "linear", "factor": rope["factor"]} if rope["rope_type"] == "linear" else None
    for key in ("layer_types", "use_bidirectional_attention"):
        text.pop(key, None)


def _dialect_4_57(text: dict[str, Any]) -> None:
    layer_types = text["layer_types"]
    _dialect_4_42(text)
    text["layer_types"] = layer_types


@pytest.mark.parametrize("dialect", [_dialect_4_42, _dialect_4_57])
@pytest.mark.parametrize("name", ["gemma2-5", "gemma2-float32", "gemma2-7-untied"])
def test_every_config_dialect_gives_the_same_output(
    name: str, dialect: Callable[[dict[str, Any]], None], twin_folder: TwinFolder, tmp_path: Path
) -> None:
    rewrite_config(twin_folder(name), tmp_path / "rewritten", dialect)
    convert(twin_folder(name), tmp_path / "expected")
    convert(tmp_path / "rewritten", tmp_path / "found")
    assert shards(tmp_path / "found") == shards(tmp_path / "expected")
    assert (tmp_path / "found/config.json").read_bytes() == (tmp_path / "expected/config.json").read_bytes()


Tensors = dict[str, torch.Tensor]


def _bare(arrays: Tensors) -> Tensors:
    return {name.removeprefix("model."): tensor for name, tensor in arrays.items()}


def _with_head(arrays: Tensors) -> Tensors:
    return {**arrays, "lm_head.weight": arrays["model.embed_tokens.weight"].clone()}


@pytest.mark.parametrize("spelling", [_bare, _with_head])
def test_every_spelling_gives_the_same_tensors(
    spelling: Callable[[Tensors], Tensors], twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    respell(twin_folder("gemma2-5"), tmp_path / "respelled", spelling)
    convert(tmp_path / "respelled", tmp_path / "found")
    assert tensors(tmp_path / "found") == tensors(converted_twin("gemma2-5"))


def test_a_softmax_of_its_own_is_refused_where_the_config_ties_it(twin_folder: TwinFolder, tmp_path: Path) -> None:
    def untie(arrays: Tensors) -> Tensors:
        return {**arrays, "lm_head.weight": arrays["model.embed_tokens.weight"] + 1}

    respell(twin_folder("gemma2-5"), tmp_path / "source", untie)
    with pytest.raises(CheckpointError, match=r"differs from model\.embed_tokens\.weight at \[0, 0\]"):
        convert(tmp_path / "source", tmp_path / "out")


def test_a_missing_softmax_is_found_if_the_config_unties_it(twin_folder: TwinFolder, tmp_path: Path) -> None:
    def change(text: Mapping[str, Any]) -> None:
        text["tie_word_embeddings"] = False  # type: ignore[index]

    rewrite_config(twin_folder("gemma2-5"), tmp_path / "source", change)
    with pytest.raises(CheckpointError) as caught:
        convert(tmp_path / "source", tmp_path / "out")
    assert any("lm_head.weight" in line for line in (caught.value.message, *caught.value.details))


def test_an_untied_softmax_is_its_own_and_both_tables_are_the_embedding(
    twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    given, made = tensors(twin_folder("gemma2-7-untied")), tensors(converted_twin("gemma2-7-untied"))
    assert made["lm_head.out_proj.weight"] == given["lm_head.weight"] != given["model.embed_tokens.weight"]
    for part in ("encoder", "decoder"):
        assert made[f"model.{part}.embed_tokens.weight"] == given["model.embed_tokens.weight"]
    assert json.loads((converted_twin("gemma2-7-untied") / "config.json").read_text())["tie_word_embeddings"] is False


def with_tokenizer(model: Path, other: Path, folder: Path) -> None:
    """Write a model with another model's tokenizer that fits its table."""
    respell(model, folder, lambda arrays: arrays)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(other / name, folder / name)


def test_the_files_of_the_tokenizer_come_along_as_they_are(
    twin_folder: TwinFolder, demo_source: Path, tmp_path: Path
) -> None:
    with_tokenizer(twin_folder("gemma2-5"), demo_source, tmp_path / "source")
    (tmp_path / "source/tokenizer.model").write_bytes(bytes(range(256)))
    (tmp_path / "source/notes.txt").write_text("no part of a model")
    done = convert(tmp_path / "source", tmp_path / "out")
    carried = {path.name for path in (tmp_path / "source").iterdir()} & {path.name for path in done.output.iterdir()}
    assert carried >= {"tokenizer.json", "tokenizer_config.json", "tokenizer.model"}
    assert "notes.txt" not in carried
    for name in carried - {"config.json", "generation_config.json", "model.safetensors"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "source" / name).read_bytes()
    report = verify(tmp_path / "out", tmp_path / "source", record=False)
    assert report.passed
    assert "tokenizer" in {check.name for check in report.checks}


def test_a_changed_tokenizer_file_fails_the_check(twin_folder: TwinFolder, demo_source: Path, tmp_path: Path) -> None:
    with_tokenizer(twin_folder("gemma2-5"), demo_source, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    with (tmp_path / "source/tokenizer.json").open("a") as file:
        file.write(" ")
    report = verify(tmp_path / "out", tmp_path / "source", record=False)
    assert [check.name for check in report.failed] == ["provenance", "tokenizer"]
    assert report.failed[1].offenders == ("tokenizer.json differs from the source's",)


def test_the_reference_generates_the_same_as_transformers(
    twin_folder: TwinFolder, demo_source: Path, tmp_path: Path
) -> None:
    with_tokenizer(twin_folder("gemma2-float32"), demo_source, tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "out")
    codec = TextCodec(tmp_path / "out", 300)
    model = T5GemmaForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.float32, attn_implementation="eager"
    )
    ids = torch.tensor([codec.encode("Tell me a story")])
    theirs = model.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, 1:].tolist()
    expected = codec.decode(theirs[: theirs.index(1)] if 1 in theirs else theirs)
    assert "".join(generate(tmp_path / "out", "Tell me a story", max_new_tokens=12)) == expected != ""
    with pytest.raises(UsageError, match="no vision tower"):
        list(generate(tmp_path / "out", "Tell me", image=tmp_path / "picture.png"))


def test_nan_in_the_parent_is_not_a_fault_of_the_conversion(twin_folder: TwinFolder, tmp_path: Path) -> None:
    respell(twin_folder("gemma2-float32"), tmp_path / "source", lambda arrays: arrays)
    arrays = load_file(tmp_path / "source/model.safetensors")
    arrays["model.norm.weight"] = arrays["model.norm.weight"].clone()
    arrays["model.layers.0.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(arrays, tmp_path / "source/model.safetensors", {"format": "pt"})
    convert(tmp_path / "source", tmp_path / "out", allow_nonfinite=True)
    with pytest.raises(CheckpointError, match="not finite"):
        verify(tmp_path / "out", tmp_path / "source", record=False)
