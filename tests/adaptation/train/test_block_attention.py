"""Attention by blocks: the same masks, states and gradients as with dense masks."""

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention.flex_attention import BlockMask
from transformers import T5Gemma2ForConditionalGeneration

from t5g2convert.adaptation.train import block_attention
from t5g2convert.adaptation.train.block_attention import (
    block_mask,
    decoder_masks,
    encoder_masks,
    use_block_attention,
)
from t5g2convert.adaptation.train.evaluation import hide_encoder
from t5g2convert.adaptation.train.loss import IGNORED, ModelWithLoss
from t5g2convert.adaptation.train.model import recompute_activations
from t5g2convert.errors import UsageError
from t5g2convert.reference import masks as dense
from tests.conftest import TwinFolder


def kept(*counts: int, of: int) -> Tensor:
    """Return which tokens are kept, [B, of]: the first of each sample."""
    return torch.arange(of) < torch.tensor(counts)[:, None]


def seen(mask: BlockMask, queries: int, keys: int) -> Tensor:
    """Return the scores that a kernel computes, [B, Q, K]: whole blocks, and partial ones where the formula says so."""
    samples = mask.kv_num_blocks.shape[0]
    grid = torch.meshgrid(torch.arange(samples), torch.arange(queries), torch.arange(keys), indexing="ij")
    formula = mask.mask_mod(grid[0], torch.tensor(0), grid[1], grid[2])
    result = torch.zeros(samples, queries, keys, dtype=torch.bool)
    for sample in range(samples):
        for row in range(mask.kv_num_blocks.shape[2]):
            rows = slice(128 * row, 128 * row + 128)
            for column in mask.kv_indices[sample, 0, row, : mask.kv_num_blocks[sample, 0, row]].tolist():
                columns = slice(128 * column, 128 * column + 128)
                result[sample, rows, columns] = formula[sample, rows, columns]
            for column in mask.full_kv_indices[sample, 0, row, : mask.full_kv_num_blocks[sample, 0, row]].tolist():
                result[sample, rows, 128 * column : 128 * column + 128] = True
    return result


@pytest.mark.parametrize("window", [1, 2, 100, 128, 129, 300])
@pytest.mark.parametrize("tokens", [5, 128, 517])
def test_the_encoders_masks_equal_the_dense_ones(window: int, tokens: int) -> None:
    keep = kept(tokens, max(1, tokens // 3), 1, of=tokens)
    for kind, mask in encoder_masks(keep, window).items():
        expected = dense.bidirectional(kind, window, keep)[:, 0].expand(-1, tokens, -1)
        assert torch.equal(seen(mask, tokens, tokens), expected), kind


@pytest.mark.parametrize("window", [1, 100, 128, 129, 300])
@pytest.mark.parametrize(("own", "read"), [(5, 3), (128, 256), (130, 300), (517, 129)])
def test_the_merged_masks_equal_the_dense_ones(window: int, own: int, read: int) -> None:
    written, reading = kept(own, own // 2, 1, of=own), kept(read, 0, read // 2, of=read)
    for kind, mask in decoder_masks(written, reading, window).items():
        memory = dense.memory(own, reading)
        expected = torch.cat([dense.causal(kind, window, written), memory], dim=-1)[:, 0]
        assert torch.equal(seen(mask, own, own + read), expected), kind


def test_blocks_that_are_seen_whole_are_not_masked_and_hidden_ones_not_computed() -> None:
    mask = block_mask(kept(1024, of=1024), queries=1024, own=1024, back=255, ahead=0)
    assert mask.full_kv_num_blocks is not None
    # A query block sees its own block and the second before it in part, and the block between them whole.
    assert mask.kv_num_blocks[0, 0].tolist() == [1, 1, 2, 2, 2, 2, 2, 2]
    assert mask.full_kv_num_blocks[0, 0].tolist() == [0, 1, 1, 1, 1, 1, 1, 1]


def test_masks_of_long_samples_are_small() -> None:
    masks = decoder_masks(kept(16_384, of=16_384), kept(16_384, of=16_384), 512)
    for mask in masks.values():
        assert sum(each.nbytes for each in mask.as_tuple() if isinstance(each, torch.Tensor)) < 1 << 20


def padded_batch() -> dict[str, Tensor]:
    """Return samples of several blocks, with padding."""
    generator = torch.Generator().manual_seed(5)
    read, written = kept(300, 140, 17, of=300), kept(150, 90, 133, of=150)
    return {
        "input_ids": torch.randint(4, 280, (3, 300), generator=generator),
        "attention_mask": read.long(),
        "decoder_input_ids": torch.randint(4, 280, (3, 150), generator=generator),
        "decoder_attention_mask": written.long(),
        "labels": torch.randint(4, 280, (3, 150), generator=generator).masked_fill(~written, IGNORED),
        "tasks": torch.tensor([0, 1, 0]),
    }


def module_of(folder: Path, *, by_blocks: bool) -> ModelWithLoss:
    model = T5Gemma2ForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).train()
    if by_blocks:
        use_block_attention(model)
    return ModelWithLoss(model, tasks=2, softcap=None, chunk=50, by_blocks=by_blocks)


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("twin", ["text-13", "images-8"])
@torch.no_grad()
def test_losses_equal_those_with_dense_masks(twin: str, hidden: bool, converted_twin: TwinFolder) -> None:
    batch = hide_encoder(padded_batch()) if hidden else padded_batch()
    dense_sums, sums = (module_of(converted_twin(twin), by_blocks=each)(batch)[1] for each in (False, True))
    assert torch.allclose(sums, dense_sums, rtol=1e-6)


def by_formula(query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, scale: float, **_: Any) -> Tensor:
    """Attend with the scores that blocks and formula leave: torch's kernel has no backward pass on the CPU."""
    mask = seen(block_mask, query.shape[2], key.shape[2])[:, None]
    return functional.scaled_dot_product_attention(query, key, value, mask, scale=scale, enable_gqa=True)


@pytest.mark.parametrize("recompute", [None, "selective", "full"])
def test_gradients_equal_those_with_dense_masks(
    recompute: Literal["selective", "full"] | None, converted_twin: TwinFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_attention, "_kernel", lambda _: by_formula)
    found = []
    for by_blocks in (False, True):
        module = module_of(converted_twin("images-8"), by_blocks=by_blocks)
        if recompute is not None:
            recompute_activations(module.model, recompute)
        module(padded_batch())[0].backward()
        found.append({name: each.grad for name, each in module.named_parameters() if each.grad is not None})
    expected, ours = found
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-4 * float(gradient.abs().max())), name


def test_models_of_other_classes_are_refused() -> None:
    with pytest.raises(UsageError, match="--attention dense"):
        use_block_attention(nn.Linear(2, 2))
