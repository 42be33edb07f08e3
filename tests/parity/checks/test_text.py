import json
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

from t5g2convert import CheckpointError
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.parity.batches import Batch, ImageBatch, image_ids, pixels, token_batch
from t5g2convert.parity.checks.text import ExpectedStacks, judge_text
from t5g2convert.parity.reports.report import Check
from t5g2convert.parity.side_by_side import (
    Pair,
    Track,
    advance_side_by_side,
    both_logits,
    causal_encoder_run,
    hidden_memory_run,
)
from t5g2convert.reference import stack
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from tests.conftest import TwinFolder

LAYERS = ["embed_tokens", *(f"layers.{layer}" for layer in range(8)), "norm"]


def silent(_: str) -> None:
    pass


@dataclass
class Models:
    """Gemma 3 with images, its (possibly changed) conversion, and their inputs."""

    source: Gemma3Reference
    target: T5Gemma2Reference
    batch: Batch
    images: ImageBatch

    def judge(self, tolerance: float = 0.0, *, images: bool = True, **options: Any) -> dict[str, Check]:
        """Return both checks by name."""
        checks = judge_text(
            ExpectedStacks.both(self.source),
            self.target,
            self.batch,
            self.images if images else None,
            tolerance=tolerance,
            progress=options.get("progress", silent),
        )
        return {check.name: check for check in checks}


Open = Callable[..., Models]


@pytest.fixture
def models(twin_folder: TwinFolder, converted_twin: TwinFolder, tmp_path: Path) -> Open:
    """Return images-float32 and its conversion, with the given changes."""

    def make(change: Callable[[dict[str, Tensor]], object] | None = None, **decoder: object) -> Models:
        folder = converted_twin("images-float32")
        if change is not None or decoder:
            shutil.copytree(folder, tmp_path / "out")
            folder = tmp_path / "out"
            tensors = load_file(folder / "model.safetensors")
            if change is not None:
                change(tensors)
            save_file(tensors, folder / "model.safetensors")
            config = json.loads((folder / "config.json").read_text())
            config["decoder"] |= decoder
            (folder / "config.json").write_text(json.dumps(config))
        source = Gemma3Reference(open_checkpoint(twin_folder("images-float32")))
        target = T5Gemma2Reference(open_checkpoint(folder))
        assert source.vision is not None
        batch = token_batch(300, 31, never={291, 292}, placed=291)
        features = source.vision.features(pixels(source.vision, 1, torch.float32))
        return Models(source, target, batch, ImageBatch(image_ids(300, 4, never={291, 292}), features))

    return make


def changing(name: str, value: float = 0.5) -> Callable[[dict[str, Tensor]], object]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] += value

    return change


# Sound conversions


@pytest.mark.parametrize("images", [True, False])
def test_a_conversion_computes_the_same_as_its_source(images: bool, models: Open) -> None:
    progress: list[str] = []
    checks = models().judge(images=images, progress=progress.append)
    assert list(checks) == ["decoder_parity", "encoder_parity"]
    for check in checks.values():
        assert check.passed
        assert check.figures is not None
        assert (check.figures.max_abs, check.figures.departs) == (0.0, None)
        assert [drift.layer for drift in check.figures.drifts] == LAYERS
        assert all(drift.max_abs == drift.relative == 0 for drift in check.figures.drifts)
    decoder, encoder = (check.figures for check in checks.values())
    assert decoder is not None
    assert encoder is not None
    # 31 tokens, of them 26 without padding; with an image the encoder reads 14 more.
    assert decoder.compared == 57 * 300
    assert encoder.compared == (57 + 14 * images) * 24
    assert (decoder.kl, decoder.agreement) == (0.0, 1.0)
    assert (encoder.kl, encoder.agreement) == (None, None)
    assert len(progress) >= 8


def test_masked_memory_does_not_change_the_decoder(models: Open) -> None:
    both = models()
    states = []
    for scale in (1.0, 100.0, 0.0):
        run = hidden_memory_run(both.target, both.batch)
        assert run.memory_BMC is not None
        assert run.memory_seen_BTM is not None
        assert float(run.memory_BMC.std()) > 0.5
        assert not bool(run.memory_seen_BTM.any())
        run.memory_BMC = run.memory_BMC * scale
        states.append(run.through(both.target.decoder)[both.batch.kept_BT])
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_the_encoder_runs_with_causal_masks(models: Open) -> None:
    both = models()
    before = causal_encoder_run(both.target, both.batch).through(both.target.encoder)
    ids = both.batch.ids_BT.clone()
    ids[:, 20:] = 7
    after = causal_encoder_run(both.target, Batch(ids, both.batch.kept_BT)).through(both.target.encoder)
    assert torch.equal(before[0, :20], after[0, :20])
    assert not torch.equal(before[0, 20:], after[0, 20:])
    own = both.target.encode(both.batch.ids_BT, both.batch.kept_BT)
    assert not torch.allclose(own[0], before[0], atol=0.1)


def test_logits_of_both_models_come_in_slices_of_the_same_rows(models: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    both = models()
    states = torch.randn(5, 24, generator=torch.Generator().manual_seed(0))
    whole = both.target.decoder.logits(states)
    monkeypatch.setattr(stack, "HEAD_ROWS", 128)
    slices = list(both_logits(both.source.text, both.target.decoder, states, states + 1))
    assert [(start, ours.shape[1]) for start, ours, _ in slices] == [(0, 128), (128, 128), (256, 44)]
    assert torch.equal(torch.cat([ours for _, ours, _ in slices], 1), whole)
    assert torch.equal(torch.cat([theirs for _, _, theirs in slices], 1), both.target.decoder.logits(states + 1))
    assert models().judge()["decoder_parity"].passed


# Faults


@pytest.mark.parametrize("layer", [0, 5, 7])
@pytest.mark.parametrize("part", ["decoder", "encoder"])
def test_the_first_different_layer_and_module_are_named_only_in_their_part(part: str, layer: int, models: Open) -> None:
    checks = models(changing(f"model.{part}.layers.{layer}.self_attn.k_norm.weight")).judge()
    failed = checks.pop(f"{part}_parity")
    (other,) = checks.values()
    assert other.passed
    assert not failed.passed
    assert failed.figures is not None
    assert failed.figures.departs is not None
    kind = "full_attention" if layer == 5 else "sliding_attention"
    for word in (part, f"layers.{layer} ", kind, "self_attn.k_norm"):
        assert word in failed.figures.departs
    assert failed.figures.departs in failed.detail
    first = LAYERS.index(f"layers.{layer}")
    assert [drift.max_abs > 0 for drift in failed.figures.drifts] == [number >= first for number in range(len(LAYERS))]


def test_the_final_norm_is_named(models: Open) -> None:
    failed = models(changing("model.encoder.norm.weight")).judge()["encoder_parity"]
    assert not failed.passed
    assert failed.figures is not None
    assert failed.figures.departs == "encoder norm"
    assert [drift.layer for drift in failed.figures.drifts if drift.max_abs] == ["norm"]


def test_a_decoder_setting_is_found_in_the_first_layer_it_affects(models: Open) -> None:
    failed = models(sliding_window=6).judge()["decoder_parity"]
    assert not failed.passed
    assert failed.figures is not None
    assert "layers.0 (sliding_attention)" in str(failed.figures.departs)
    assert "windows" in str(failed.figures.departs)


def test_a_different_embedding_is_named_by_its_position(models: Open) -> None:
    checks = models(changing("model.encoder.embed_tokens.eoi_embedding")).judge()
    for check in checks.values():
        assert not check.passed
        assert check.figures is not None
        assert "embed_tokens" in str(check.figures.departs)
        # The end-of-image token was first put a third of the way into the sequence.
        assert "token 10 of sequence 0" in str(check.figures.departs)


def test_a_changed_output_row_without_input_token_is_found(models: Open) -> None:
    unread = next(row for row in range(300) if row not in models().batch.ids_BT and row not in models().images.ids_BT)

    def change(tensors: dict[str, Tensor]) -> None:
        tensors["model.encoder.embed_tokens.weight"][unread] += 0.5

    checks = models(change).judge()
    assert checks["encoder_parity"].passed
    failed = checks["decoder_parity"]
    assert not failed.passed
    assert failed.figures is not None
    assert failed.figures.departs == "embed_tokens as the softmax, or final_logit_softcapping"
    assert failed.figures.kl is not None
    assert failed.figures.kl > 0


def test_an_image_read_only_by_the_encoder_is_checked(models: Open) -> None:
    both = models()
    assert both.target.vision is not None
    sound = both.judge()["encoder_parity"]
    both.images = ImageBatch(both.images.ids_BT, both.images.features_ITC * torch.nan)
    assert sound.passed
    with pytest.raises(CheckpointError, match="source's own states after embed_tokens are not finite"):
        both.judge()


def test_the_figures_cover_the_whole_vocabulary(models: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stack, "HEAD_ROWS", 77)
    both = models(changing("model.decoder.layers.3.mlp.up_proj.weight", 0.1))
    figures = both.judge(images=False)["decoder_parity"].figures
    kept = both.batch.kept_BT
    a = both.source.logits(both.batch.ids_BT, kept)[kept]
    b = both.target.decoder.logits(hidden_memory_run(both.target, both.batch).through(both.target.decoder))[kept]
    assert figures is not None
    assert figures.max_abs == pytest.approx(float((a - b).abs().max()), rel=1e-5)
    assert figures.relative == pytest.approx(figures.max_abs / float(a.abs().max()), rel=1e-5)
    log_p, log_q = functional.log_softmax(a.double(), -1), functional.log_softmax(b.double(), -1)
    assert figures.kl == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()), rel=1e-4)
    assert figures.agreement == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).double().mean()))
    assert figures.agreement is not None
    assert 0 < figures.agreement < 1


def test_a_tolerance_lets_a_small_difference_pass(models: Open) -> None:
    both = models(changing("model.decoder.layers.3.mlp.up_proj.weight", 1e-6))
    strict, lenient = both.judge()["decoder_parity"], both.judge(1e-3)["decoder_parity"]
    assert not strict.passed
    assert lenient.passed
    assert strict.figures == lenient.figures
    assert strict.figures is not None
    assert not both.judge(strict.figures.relative / 2)["decoder_parity"].passed


def test_padding_is_not_compared(models: Open) -> None:
    both = models()
    found = hidden_memory_run(both.target, both.batch)
    found.hidden_BTC = torch.where(both.batch.kept_BT[..., None], found.hidden_BTC, torch.nan)
    pair = Pair(both.source.start(both.batch.ids_BT, both.batch.kept_BT), found, both.batch.kept_BT)
    assert Track("decoder", both.target.decoder, [pair]).compare("embed_tokens").within(0)


def test_stacks_of_different_depth_are_not_compared(twin_folder: TwinFolder, converted_twin: TwinFolder) -> None:
    parents = ExpectedStacks.both(Gemma3Reference(open_checkpoint(twin_folder("text-8"))))
    target = T5Gemma2Reference(open_checkpoint(converted_twin("text-sharded")))
    other = T5Gemma2Reference(open_checkpoint(converted_twin("text-float16")), dtype=torch.bfloat16)
    batch = token_batch(300, 31, never=set())
    assert not any(check.passed for check in judge_text(parents, target, batch, None, tolerance=0, progress=silent))
    checks = judge_text(parents, other, batch, None, tolerance=0.9, progress=silent)
    assert [check.name for check in checks] == ["decoder_parity", "encoder_parity"]
    for check in checks:
        assert not check.passed
        assert check.figures is None
        assert "the source has 8 layers, the encoder has 6" in check.detail


def test_without_a_trace_no_layer_runs_twice(models: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    both = models(changing("model.decoder.layers.0.mlp.up_proj.weight"))

    def refuse(*_: object) -> str:
        raise AssertionError("a second run was asked for")

    monkeypatch.setattr("t5g2convert.parity.side_by_side.first_difference", refuse)
    expected = both.source.start(both.batch.ids_BT, both.batch.kept_BT)
    pair = Pair(expected, hidden_memory_run(both.target, both.batch), both.batch.kept_BT)
    track = Track("decoder", both.target.decoder, [pair])
    advance_side_by_side(both.source.text, [track], silent, trace=False)
    assert track.departs is None
    assert [drift.max_abs > 0 for drift in track.drifts] == [True] * 8
