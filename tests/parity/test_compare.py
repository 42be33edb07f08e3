import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional
from transformers import (
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    PreTrainedModel,
    T5Gemma2ForConditionalGeneration,
)

from t5g2convert import CheckpointError, Comparison, T5g2Error, UsageError, compare, convert
from t5g2convert.parity.compare import Reading
from t5g2convert.reference import stack
from t5g2convert.reference.prompts import TextCodec
from tests.conftest import TwinFolder
from tests.models.gemma_tokenizer import write_tokenizer
from tests.models.twins import BY_NAME
from tests.reference.models import loaded

TEXT = "The quick brown fox jumps over the lazy dog; then it sleeps."


@dataclass(frozen=True)
class Models:
    """Gemma 3 and a T5Gemma 2, both with a tokenizer, and a text."""

    gemma3: Path
    t5gemma2: Path
    text: Path

    @property
    def tokens(self) -> list[int]:
        return TextCodec(self.t5gemma2).encode(self.text.read_text())

    def compare(self, **options: Any) -> Comparison:
        return compare(self.gemma3, self.t5gemma2, self.text, **options)


Make = Callable[..., Models]


@pytest.fixture
def models(twin_folder: TwinFolder, demo_source: Path, tmp_path: Path) -> Make:
    def make(name: str = "text-8", trained: float = 0.0) -> Models:
        source, output, text = tmp_path / "source", tmp_path / "out", tmp_path / "text"
        shutil.copytree(twin_folder(name), source)
        if BY_NAME[name].vocab < 262_144:
            shutil.copy(demo_source / "tokenizer.json", source)
        else:
            write_tokenizer(source)
        convert(source, output, flush=False)
        if trained:
            train(output, trained)
        text.write_text(TEXT)
        return Models(source, output, text)

    return make


def train(folder: Path, amount: float) -> None:
    """Shift every parameter of encoder and decoder by a random amount."""
    tensors = load_file(folder / "model.safetensors")
    generator = torch.Generator().manual_seed(5)
    for name in sorted(tensors):
        if ".layers." in name:
            tensors[name] += (torch.randn(tensors[name].shape, generator=generator) * amount).to(tensors[name].dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def set_config(folder: Path, path: str, value: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    *keys, last = path.split(".")
    section = config
    for key in keys:
        section = section[key]
    if value is None:
        del section[last]
    else:
        section[last] = value
    (folder / "config.json").write_text(json.dumps(config))


def strict_json(document: object) -> object:
    def refuse(number: str) -> None:
        raise AssertionError(f"{number} is no JSON")

    return json.loads(json.dumps(document), parse_constant=refuse)


# Fresh and trained models


@pytest.mark.sampled
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("text-8", None),
        ("text-8", "float32"),
        ("text-13", "bfloat16"),
        ("images-8", None),
        ("images-8", "float32"),
        ("images-with-fill", None),
    ],
)
def test_a_fresh_conversion_has_not_moved(name: str, dtype: str | None, models: Make) -> None:
    both = models(name)
    found = both.compare(dtype=dtype)
    alone = found.decoder_alone
    assert alone.tokens == len(both.tokens) - 1
    assert (alone.kl, alone.agreement) == (0.0, 1.0)
    assert alone.gemma3_perplexity == alone.t5gemma2_perplexity > 1
    assert found.drifts
    assert all(drift.max_abs == drift.relative == 0 for drift in found.drifts)
    # A fresh conversion has not learned to read the first half in the encoder.
    assert found.prefix_in_encoder.tokens == len(both.tokens) - len(both.tokens) // 2
    assert found.prefix_in_encoder.kl > 0


def test_a_trained_model_has_moved_and_more_training_moves_it_more(models: Make) -> None:
    both = models()
    found = [both.compare()]
    for amount in (0.002, 0.05):
        train(both.t5gemma2, amount)
        found.append(both.compare())
    kls = [comparison.decoder_alone.kl for comparison in found]
    assert kls[0] == 0 < kls[1] < kls[2]
    assert found[2].decoder_alone.agreement < 1
    assert found[2].decoder_alone.gemma3_perplexity == found[0].decoder_alone.gemma3_perplexity
    assert found[2].decoder_alone.t5gemma2_perplexity != found[0].decoder_alone.t5gemma2_perplexity
    layers = [drift.layer for drift in found[1].drifts]
    assert layers == ["embed_tokens", *(f"layers.{number}" for number in range(8))]
    assert [drift.max_abs > 0 for drift in found[1].drifts] == [False] + [True] * 8


def figures(expected: Tensor, found: Tensor, labels: Tensor) -> Reading:
    log_p, log_q = (functional.log_softmax(logits.double(), -1) for logits in (expected, found))
    return Reading(
        len(labels),
        float((log_p.exp() * (log_p - log_q)).sum(-1).mean()),
        float((expected.argmax(-1) == found.argmax(-1)).double().mean()),
        *(math.exp(float(functional.nll_loss(side, labels))) for side in (log_p, log_q)),
    )


@pytest.mark.parametrize("rows", [16_384, 101])
@pytest.mark.parametrize(
    ("name", "kind"), [("text-8", Gemma3ForCausalLM), ("images-13", Gemma3ForConditionalGeneration)]
)
@torch.no_grad()
def test_both_readings_equal_those_of_transformers(
    name: str, kind: type[PreTrainedModel], rows: int, models: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stack, "HEAD_ROWS", rows)
    both = models(name, trained=0.02)
    found = both.compare(dtype="float32")
    parent, child = loaded(kind, both.gemma3), loaded(T5Gemma2ForConditionalGeneration, both.t5gemma2)
    ids = torch.tensor([both.tokens])
    half = ids.shape[1] // 2
    parents = parent(input_ids=ids).logits[0]
    alone = child(input_ids=ids[:, :4], attention_mask=torch.zeros_like(ids[:, :4]), decoder_input_ids=ids).logits[0]
    start = torch.full((1, 1), child.config.decoder.bos_token_id)
    written = torch.cat((start, ids[:, half:-1]), 1)
    split = child(input_ids=ids[:, :half], decoder_input_ids=written).logits[0]
    for reading, expected in (
        (found.decoder_alone, figures(parents[:-1], alone[:-1], ids[0, 1:])),
        (found.prefix_in_encoder, figures(parents[half - 1 : -1], split, ids[0, half:])),
    ):
        assert reading.tokens == expected.tokens
        assert reading.kl > 0.001
        for field in ("kl", "agreement", "gemma3_perplexity", "t5gemma2_perplexity"):
            assert getattr(reading, field) == pytest.approx(getattr(expected, field), rel=1e-4), field


@pytest.mark.parametrize("count", [8, 9, 17, 10_000])
def test_only_the_requested_tokens_are_read(count: int, models: Make) -> None:
    both = models()
    found = both.compare(max_tokens=count)
    read = min(count, len(both.tokens))
    assert found.decoder_alone.tokens == read - 1
    assert found.prefix_in_encoder.tokens == read - read // 2


def test_progress_is_reported(models: Make) -> None:
    progress: list[str] = []
    models().compare(progress=progress.append)
    assert len(progress) >= 8


def test_json_has_both_readings_and_the_drifts(models: Make) -> None:
    found = models(trained=0.02).compare()
    document = strict_json(found.to_json())
    assert isinstance(document, dict)
    assert set(document) == {"decoder_alone", "prefix_in_encoder", "drifts"}
    assert Reading(**document["decoder_alone"]) == found.decoder_alone
    assert Reading(**document["prefix_in_encoder"]) == found.prefix_in_encoder
    assert [drift["layer"] for drift in document["drifts"]] == [drift.layer for drift in found.drifts]


def test_json_of_a_model_that_is_not_finite_is_json(models: Make) -> None:
    both = models()
    tensors = load_file(both.t5gemma2 / "model.safetensors")
    tensors["model.decoder.norm.weight"][3] = math.nan
    save_file(tensors, both.t5gemma2 / "model.safetensors")
    found = both.compare()
    assert math.isnan(found.decoder_alone.kl)
    document = strict_json(found.to_json())
    assert isinstance(document, dict)
    assert document["decoder_alone"]["kl"] is None


# What cannot be compared


def test_a_text_that_is_too_short_is_refused(models: Make) -> None:
    both = models()
    both.text.write_text("short")
    with pytest.raises(UsageError, match="has 5 tokens, expected at least 8"):
        both.compare()
    both.text.write_text("12345678")
    assert both.compare().decoder_alone.tokens == 7


def test_unreadable_inputs_are_reported(models: Make, tmp_path: Path) -> None:
    both = models()
    with pytest.raises(UsageError, match="cannot be read"):
        compare(both.gemma3, both.t5gemma2, tmp_path / "missing")
    with pytest.raises(CheckpointError, match="no such folder"):
        compare(tmp_path / "missing", both.t5gemma2, both.text)
    with pytest.raises(CheckpointError, match="is not Gemma 3"):
        compare(both.t5gemma2, both.t5gemma2, both.text)
    with pytest.raises(CheckpointError, match="is not T5Gemma 2"):
        compare(both.gemma3, both.gemma3, both.text)
    (both.t5gemma2 / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is missing"):
        both.compare()


def test_an_unknown_dtype_is_refused(models: Make) -> None:
    with pytest.raises(UsageError, match="dtype: Input should be"):
        models().compare(dtype="int8")


def test_models_of_different_width_are_not_compared(models: Make, twin_folder: TwinFolder) -> None:
    both = models()
    with pytest.raises(UsageError, match="hidden_size is 32 in Gemma 3 and 24 in the decoder"):
        compare(twin_folder("donor-wide"), both.t5gemma2, both.text)


def test_a_decoder_of_fewer_layers_is_compared_with_its_whole_parent(models: Make, tmp_path: Path) -> None:
    """With the last layer's outputs scaled to zero, the other layers compute the same."""
    both = models()
    tensors = load_file(both.gemma3 / "model.safetensors")
    for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
        tensors[f"model.layers.7.{name}.weight"].fill_(-1)
    save_file(tensors, both.gemma3 / "model.safetensors", {"format": "pt"})
    found = {}
    for layers in ("first:7", "0:7:2"):
        convert(both.gemma3, tmp_path / layers, decoder_layers=layers)
        for path in both.t5gemma2.glob("tokenizer*"):
            shutil.copy(path, tmp_path / layers)
        found[layers] = compare(both.gemma3, tmp_path / layers, both.text)
    assert found["first:7"].decoder_alone.kl == 0
    assert found["0:7:2"].decoder_alone.kl > 0.01
    assert [drift.layer for drift in found["0:7:2"].drifts] == ["embed_tokens"]


def test_a_decoder_without_a_start_token_is_refused(models: Make) -> None:
    both = models()
    config = json.loads((both.t5gemma2 / "config.json").read_text())
    config["decoder"]["bos_token_id"] = None
    (both.t5gemma2 / "config.json").write_text(json.dumps(config))
    with pytest.raises(UsageError, match="bos_token_id"):
        both.compare()


def test_without_a_config_dtype_the_tensors_dtype_is_used(models: Make) -> None:
    both = models()
    set_config(both.t5gemma2, "dtype", None)
    assert both.compare().decoder_alone.kl == 0


@pytest.mark.parametrize("rows", [-20, 20])
def test_models_of_different_vocabulary_read_only_shared_rows(rows: int, models: Make) -> None:
    both = models()
    tensors = load_file(both.t5gemma2 / "model.safetensors")
    table = tensors["model.encoder.embed_tokens.weight"]
    vocab = table.shape[0] + rows
    tensors["model.encoder.embed_tokens.weight"] = torch.cat((table, table))[:vocab].clone()
    save_file(tensors, both.t5gemma2 / "model.safetensors")
    for path in ("vocab_size", "decoder.vocab_size", "encoder.text_config.vocab_size"):
        set_config(both.t5gemma2, path, vocab)
    if rows < 0:
        # Both have the same shared rows, as when random fill was cut.
        assert both.compare().decoder_alone.kl == 0
    else:
        with pytest.raises(T5g2Error, match="vocab"):
            both.compare()


def test_a_token_beyond_the_table_is_refused(models: Make) -> None:
    both = models()
    path = both.t5gemma2 / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    for entry in tokenizer["added_tokens"]:
        if entry["id"] == 255:
            entry["id"] = 300
    tokenizer["model"]["vocab"]["<image_soft_token>"] = 300
    path.write_text(json.dumps(tokenizer))
    both.text.write_text(f"{TEXT} <image_soft_token>")
    assert max(both.tokens) == 300
    with pytest.raises(T5g2Error, match="300"):
        both.compare()
