"""RoPE, and softmax attention over one set of keys, or over two under one softmax (merged attention).

The eager kernel follows transformers' `eager_attention_forward`: scores in the dtype of the weights, softmax in
float32, probabilities rounded back before the product with the values. A softcap of the scores is applied if the config
has one; transformers 5.23 reads this setting for these two models but does not apply it (Gemma 3 has none).
"""

from typing import Final, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from t5g2convert.checkpoint.families.rope_config import Rope


class Rotation(NamedTuple):
    """Cosine and sine of the angle of every position and channel, each [T, D]."""

    cos_TD: Tensor
    sin_TD: Tensor


def rotation(rope: Rope, head_dim: int, positions_T: Tensor, dtype: torch.dtype) -> Rotation:
    """Return the rotation of each position; wavelengths are computed in float32, the result is rounded to `dtype`.

    This is rotary position embedding (RoPE; Su et al., arXiv 2104.09864), with linear interpolation of positions.

    Channels d and d + D/2 form a pair that turns by the angle position / (factor * theta ** (2 d / D)).
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device)
    frequencies = 1.0 / rope.rope_theta ** (channels / head_dim) / rope.linear_factor
    angles = positions_T.float()[:, None] * frequencies
    angles_TD = torch.cat((angles, angles), dim=-1)
    return Rotation(angles_TD.cos().to(dtype), angles_TD.sin().to(dtype))


def rotate(x_BHTD: Tensor, turn: Rotation) -> Tensor:
    """Turn every pair of channels by its angle."""
    half = x_BHTD.shape[-1] // 2
    turned = torch.cat((-x_BHTD[..., half:], x_BHTD[..., :half]), dim=-1)
    return x_BHTD * turn.cos_TD + turned * turn.sin_TD


Kernel = Literal["eager", "sdpa"]
"""`eager`: the order of operations of transformers' eager attention. `sdpa`: torch's fused attention, faster."""

BLOCK_SCORES: Final = 1 << 20
"""Number of scores to compute at once, which fits a processor's cache; more are computed in blocks of queries."""


class Keys(NamedTuple):
    """Keys, values, and the mask of those that each query may see."""

    k_BKSD: Tensor
    v_BKSD: Tensor
    seen_BTS: Tensor | None
    """[B or 1, 1, T, S]; None if each query sees all keys."""


def attend(q_BHTD: Tensor, groups: list[Keys], *, scale: float, softcap: float | None) -> Tensor:
    """Attend to the keys of all groups together; return [B, H, T, D].

    If every query sees part of every group, all scores are in one row, as in transformers. If a query sees nothing of a
    group, each group gets a separate softmax and a share by the weight of its scores: softmax([a, b]) is
    [softmax(a) * A / (A + B), softmax(b) * B / (A + B)], where A and B are the sums of the exponentials. A hidden group
    has the share 0, so the result is *exactly* the same as without it, at any length and on any device. In one long
    row, its keys would change the order in which a machine adds the others (2e-6 in float32 at 23 tokens).
    """
    if len(groups) > 1 and all(group.seen_BTS is None or bool(group.seen_BTS.any(-1).all()) for group in groups[1:]):
        groups = [_joined(groups, q_BHTD.shape[2])]
    batch, heads, queries, _ = q_BHTD.shape
    # Size the blocks by the first group only, so that they are the same with and without a hidden group.
    rows = max(1, BLOCK_SCORES // (batch * heads * groups[0].k_BKSD.shape[2]))
    blocks = [
        _attend_block(q_BHTD[:, :, start : start + rows], _block(groups, start, start + rows), scale, softcap)
        for start in range(0, queries, rows)
    ]
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, dim=2)


def attend_fused(q_BHTD: Tensor, k_BKSD: Tensor, v_BKSD: Tensor, seen_BTS: Tensor | None, *, scale: float) -> Tensor:
    """Attend with torch's fused kernel; return [B, H, T, D]."""
    grouped = q_BHTD.shape[1] != k_BKSD.shape[1]
    if grouped and q_BHTD.shape[2] == 1:
        # The heads of a single query that share keys are like queries of one head; on a CPU this is 10 times as fast.
        batch, heads, _, width = q_BHTD.shape
        q_BKGD = q_BHTD.reshape(batch, k_BKSD.shape[1], -1, width)
        out_BKGD = functional.scaled_dot_product_attention(q_BKGD, k_BKSD, v_BKSD, attn_mask=seen_BTS, scale=scale)
        return out_BKGD.reshape(batch, heads, 1, width)
    return functional.scaled_dot_product_attention(
        q_BHTD, k_BKSD, v_BKSD, attn_mask=seen_BTS, scale=scale, enable_gqa=grouped
    )


def _joined(groups: list[Keys], queries: int) -> Keys:
    k_BKSD = torch.cat([group.k_BKSD for group in groups], dim=2)
    v_BKSD = torch.cat([group.v_BKSD for group in groups], dim=2)
    masks = []
    for group in groups:
        shape = (k_BKSD.shape[0], 1, queries, group.k_BKSD.shape[2])
        seen_BTS = k_BKSD.new_ones((), dtype=torch.bool) if group.seen_BTS is None else group.seen_BTS
        masks.append(seen_BTS.expand(shape))
    return Keys(k_BKSD, v_BKSD, torch.cat(masks, dim=-1))


def _block(groups: list[Keys], start: int, stop: int) -> list[Keys]:
    return [
        Keys(group.k_BKSD, group.v_BKSD, None if group.seen_BTS is None else group.seen_BTS[:, :, start:stop])
        for group in groups
    ]


def _attend_block(q_BHTD: Tensor, groups: list[Keys], scale: float, softcap: float | None) -> Tensor:
    scores = [_scores(q_BHTD, group, scale, softcap) for group in groups]
    weights = [torch.softmax(part, dim=-1, dtype=torch.float32) for part in scores]
    if len(groups) > 1:
        shares = _shares(scores, weights)
        weights = [part * shares[..., number, None] for number, part in enumerate(weights)]
    outputs = [_weighted(part.to(q_BHTD.dtype), group.v_BKSD) for part, group in zip(weights, groups, strict=True)]
    return outputs[0] if len(outputs) == 1 else torch.stack(outputs).sum(0)


def _shares(scores: list[Tensor], weights: list[Tensor]) -> Tensor:
    """Return the share of each group in the softmax over all groups, [B, H, T, groups], float32.

    The largest weight of a group is 1 / (sum of its exponentials, relative to its largest score), so no logarithm is
    needed.
    """
    peaks = torch.stack([part.amax(dim=-1).float() for part in scores], dim=-1)
    tops = torch.stack([part.amax(dim=-1) for part in weights], dim=-1)
    sums = torch.exp(peaks - peaks.amax(dim=-1, keepdim=True)) / tops
    return sums / sums.sum(dim=-1, keepdim=True)


def _scores(q_BHTD: Tensor, group: Keys, scale: float, softcap: float | None) -> Tensor:
    """Return scaled scores, [B, H, T, S]; hidden keys get the lowest number of the dtype."""
    batch, heads, queries, width = q_BHTD.shape
    # The query heads of one key-value head are rows of one product, so keys are not repeated in memory.
    q_BKGD = q_BHTD.reshape(batch, group.k_BKSD.shape[1], -1, width)
    scores_BHTS = torch.matmul(q_BKGD, group.k_BKSD.transpose(2, 3)).view(batch, heads, queries, -1) * scale
    if softcap is not None:
        scores_BHTS = torch.tanh(scores_BHTS / softcap) * softcap
    if group.seen_BTS is None:
        return scores_BHTS
    return scores_BHTS.masked_fill(~group.seen_BTS, torch.finfo(scores_BHTS.dtype).min)


def _weighted(weights_BHTS: Tensor, v_BKSD: Tensor) -> Tensor:
    """Return the weighted sum of the values, [B, H, T, D]."""
    batch, heads, queries, keys = weights_BHTS.shape
    grouped = weights_BHTS.view(batch, v_BKSD.shape[1], -1, keys)
    return torch.matmul(grouped, v_BKSD).view(batch, heads, queries, -1)
