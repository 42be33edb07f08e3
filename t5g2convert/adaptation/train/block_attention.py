"""Attention without dense masks: torch's flex_attention, with masks by blocks of 128 queries and 128 keys.

At 16,384 tokens on either side, a dense mask of the merged attention has 16,384 x 32,768 elements, and more than half
of the scores are hidden. Here a mask is a formula and two lists of blocks: blocks that a query sees whole, and blocks
where the formula decides. Other blocks are never computed. transformers' own flex masks do not fit, because its class
joins dense masks of both stacks.

A query q sees a key k if k is not padding, and k is of the encoder's output or near enough::

    k >= own  or  -ahead <= q - k <= back

where `own` is the number of keys of the query's own stack. Legend of shape suffixes: B samples, Q queries, K keys,
M and N blocks of them.
"""

import warnings
from collections.abc import Mapping
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from torch.nn.functional import pad

from t5g2convert.adaptation.train.model import quiet_transformers
from t5g2convert.errors import UsageError

NAME: Final = "t5g2_block_attention"
"""The name of this attention in transformers' configs."""

BLOCK: Final = 128

_NO_MASKS: Final = {"full_attention": torch.empty(0), "sliding_attention": torch.empty(0)}
"""The class makes dense masks unless it is given masks, and joins those of both stacks; these are not used."""


def use_block_attention(model: nn.Module) -> None:
    """Let both stacks of a T5Gemma 2 attend by blocks.

    Raises:
        UsageError: The model is not of transformers' class.
    """
    config: Any = getattr(model, "config", None)
    if config is None or getattr(config, "model_type", None) != "t5gemma2":
        raise UsageError("this model has no attention by blocks", hint="pass --attention dense")
    quiet_transformers().AttentionInterface.register(NAME, _attend)
    for part in (config.encoder.text_config, config.decoder):
        part._attn_implementation = NAME


def run_by_blocks(model: Any, batch: Mapping[str, Tensor], pixels: Mapping[str, Tensor]) -> Tensor:
    """Return the decoder's last hidden states, [B, Q, C], of a model after `use_block_attention`.

    Args:
        model: A T5Gemma2ForConditionalGeneration.
        batch: From `ul2.dataset.collate`.
        pixels: `pixel_values`, if there are images.
    """
    read_BK, written_BK = batch["attention_mask"].bool(), batch["decoder_attention_mask"].bool()
    encoded = model.model.encoder(
        input_ids=batch["input_ids"],
        attention_mask=_NO_MASKS,
        block_masks=encoder_masks(read_BK, model.config.encoder.text_config.sliding_window),
        **pixels,
    ).last_hidden_state
    states: Tensor = model.model.decoder(
        input_ids=batch["decoder_input_ids"],
        attention_mask=_NO_MASKS,
        encoder_hidden_states=encoded,
        encoder_attention_mask=_NO_MASKS,
        block_masks=decoder_masks(written_BK, read_BK, model.config.decoder.sliding_window),
    ).last_hidden_state
    return states


def encoder_masks(kept_BK: Tensor, window: int) -> dict[str, BlockMask]:
    """Return the encoder's masks by kind of layer; see `reference.masks.bidirectional`."""
    tokens = kept_BK.shape[1]
    return {
        "full_attention": block_mask(kept_BK, queries=tokens, own=tokens, back=tokens, ahead=tokens),
        "sliding_attention": block_mask(
            kept_BK, queries=tokens, own=tokens, back=(window + 1) // 2 - 1, ahead=window // 2
        ),
    }


def decoder_masks(kept_BQ: Tensor, read_BK: Tensor, window: int) -> dict[str, BlockMask]:
    """Return the masks of the merged attention by kind of layer: causal on own tokens, then the encoder's output."""
    tokens, kept_BK = kept_BQ.shape[1], torch.cat([kept_BQ, read_BK], dim=1)
    return {
        "full_attention": block_mask(kept_BK, queries=tokens, own=tokens, back=tokens, ahead=0),
        "sliding_attention": block_mask(kept_BK, queries=tokens, own=tokens, back=window - 1, ahead=0),
    }


def block_mask(kept_BK: Tensor, *, queries: int, own: int, back: int, ahead: int) -> BlockMask:
    """Return the mask of a kind of layer, from the bounds of each block.

    Args:
        kept_BK: False at padding.
        queries: Number of queries.
        own: Keys of the queries' own stack, which come first.
        back: How far back a query sees its own stack.
        ahead: How far ahead.
    """
    keys, device = kept_BK.shape[1], kept_BK.device
    first_M1, last_M1 = (bound[:, None] for bound in _bounds(queries, device))
    first_N, last_N = _bounds(keys, device)
    nearest_MN = first_M1 - last_N.clamp(max=own - 1)
    farthest_MN = last_M1 - first_N
    is_own_N, is_read_N = first_N < own, last_N >= own
    some_MN = (is_own_N & (farthest_MN >= -ahead) & (nearest_MN <= back)) | is_read_N
    all_MN = (~is_read_N & (nearest_MN >= -ahead) & (farthest_MN <= back)) | ~is_own_N
    kept_BNK = pad(kept_BK, (0, -keys % BLOCK)).reshape(len(kept_BK), -1, BLOCK)
    whole_BMN = all_MN & kept_BNK.all(-1)[:, None]
    partial_BMN = some_MN & kept_BNK.any(-1)[:, None] & ~whole_BMN
    # Tensors, since a compiled kernel would be compiled again for each new number.
    own_, back_, ahead_ = (torch.tensor(number, device=device) for number in (own, back, ahead))

    def sees(sample: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        near = (query - key <= back_) & (key - query <= ahead_)
        return kept_BK[sample, key] & ((key >= own_) | near)

    return BlockMask.from_kv_blocks(
        *_listed(partial_BMN), *_listed(whole_BMN), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(queries, keys)
    )


def _bounds(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the first and the last item of each block."""
    first = torch.arange(0, count, BLOCK, device=device)
    return first, (first + BLOCK - 1).clamp(max=count - 1)


def _listed(chosen_BMN: Tensor) -> tuple[Tensor, Tensor]:
    """Return how many key blocks each query block has, [B, 1, M], and their numbers first, [B, 1, M, N]; int32."""
    order = chosen_BMN.int().argsort(stable=True, dim=-1, descending=True)
    return chosen_BMN.sum(-1, dtype=torch.int32)[:, None], order.int()[:, None]


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    block_masks: Mapping[str, BlockMask],
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend, as transformers calls an attention: tensors are [B, heads, tokens, width]."""
    states = _kernel(query.device.type)(
        query, key, value, block_mask=block_masks[module.layer_type], scale=scaling, enable_gqa=True
    )
    return states.transpose(1, 2).contiguous(), None


@cache
def _kernel(device: str) -> Any:
    """Return flex_attention; compiled on a GPU, where it skips hidden blocks. On the CPU it has no backward pass."""
    if device == "cpu":
        warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
        return flex_attention
    return torch.compile(flex_attention, dynamic=True)
