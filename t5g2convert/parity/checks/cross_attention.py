"""cross_parity: each cross-attention of T5Gemma is the self-attention of Gemma 2 that it was copied from.

Both are applied to the same states as queries, keys and values, with nothing masked or rotated. They and the norms
around them must then give the same values. There is nothing else to check about cross-attention: T5Gemma never rotates
it, and always lets it see the whole output of the encoder.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from t5g2convert.parity.batches import Batch
from t5g2convert.parity.checks.text import judge_decoder, judge_encoder
from t5g2convert.parity.first_difference import first_difference
from t5g2convert.parity.measures import Difference
from t5g2convert.parity.reports.report import Check, Drift
from t5g2convert.parity.side_by_side import Pair, Track, causal_encoder_run, walk
from t5g2convert.reference.attention import Rotation
from t5g2convert.reference.gemma2 import Gemma2Reference
from t5g2convert.reference.layers import GemmaLayer
from t5g2convert.reference.masks import memory
from t5g2convert.reference.stack import Stack
from t5g2convert.reference.t5gemma import CrossDecoderLayer, T5GemmaReference
from t5g2convert.reference.weights import not_finite


class SelfBranch(nn.Module):
    """The self-attention of a layer of Gemma 2 with its norms, without rotation."""

    def __init__(self, layer: GemmaLayer) -> None:
        super().__init__()
        self.input_layernorm = layer.input_layernorm
        self.self_attn = layer.self_attn
        self.post_attention_layernorm = layer.post_attention_layernorm

    def forward(self, x_BTC: Tensor, seen_BTT: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        still = Rotation(x_BTC.new_ones(1), x_BTC.new_zeros(1))
        return self.post_attention_layernorm(self.self_attn(self.input_layernorm(x_BTC), still, seen_BTT))


class CrossBranch(nn.Module):
    """The cross-attention of a layer of T5Gemma with its norms; the queries' states are also the memory."""

    def __init__(self, layer: CrossDecoderLayer) -> None:
        super().__init__()
        self.pre_cross_attn_layernorm = layer.pre_cross_attn_layernorm
        self.cross_attn = layer.cross_attn
        self.post_cross_attn_layernorm = layer.post_cross_attn_layernorm

    def forward(self, x_BTC: Tensor, seen_BTT: Tensor) -> Tensor:
        """[B, T, C] to [B, T, C]."""
        queries_BTC = self.pre_cross_attn_layernorm(x_BTC)
        return self.post_cross_attn_layernorm(self.cross_attn(queries_BTC, queries_BTC, seen_BTT))


class CrossComparison:
    """Compares both attentions of every layer on Gemma 2's states at that layer; padding is masked."""

    def __init__(self, kept_BT: Tensor) -> None:
        self.kept_BT = kept_BT
        self.difference = Difference()
        self.drifts: list[Drift] = []
        self.departs: str | None = None

    def compare(self, number: int, layer: nn.Module, other: nn.Module, states_BTC: Tensor) -> None:
        """Compare one layer of each; see `LayerComparison`."""
        assert isinstance(layer, GemmaLayer)
        assert isinstance(other, CrossDecoderLayer)
        branches = SelfBranch(layer), CrossBranch(other)
        inputs = states_BTC, memory(states_BTC.shape[1], self.kept_BT)
        expected_BTC, found_BTC = (branch(*inputs) for branch in branches)
        here = Difference()
        here.add(expected_BTC[self.kept_BT], found_BTC[self.kept_BT])
        self.difference.add(expected_BTC[self.kept_BT], found_BTC[self.kept_BT])
        self.drifts.append(here.drift(f"layers.{number}"))
        if here.max_abs and self.departs is None:
            inside = first_difference(branches[0], inputs, branches[1], inputs, self.kept_BT)
            self.departs = f"decoder layers.{number}, {inside or 'the cross-attention'}"

    def check(self, tolerance: float) -> Check:
        """Return cross_parity, from all layers compared so far."""
        passed = self.difference.within(tolerance)
        detail = f"cross-attention on its own states in {len(self.drifts)} layers: {self.difference}"
        if not passed:
            detail += f"; departs at {self.departs}"
        figures = self.difference.figures(departs=self.departs, drifts=tuple(self.drifts))
        return Check("cross_parity", passed, detail, figures=figures)


@torch.inference_mode()
def judge_first_generation(
    source: Gemma2Reference,
    target: T5GemmaReference,
    batch: Batch,
    *,
    tolerance: float,
    progress: Callable[[str], None],
) -> tuple[Check, Check, Check]:
    """Make decoder_parity, encoder_parity and cross_parity in one walk through the layers.

    Args:
        source: Gemma 2.
        target: T5Gemma.
        batch: Tokens for both stacks and Gemma 2.
        tolerance: Largest relative difference that passes; 0 is exact.
        progress: Called with a few words at every layer.

    Raises:
        CheckpointError: Gemma 2's own states are not finite.
        UsageError: float16 overflows.
    """
    expected, cross = source.start(batch.ids_BT, batch.kept_BT), CrossComparison(batch.kept_BT)
    alone = target.start_decoder(batch.ids_BT, batch.kept_BT, None, None)
    tracks = [
        Track("decoder", target.decoder, [Pair(expected, alone, batch.kept_BT)], also_compare=cross.compare),
        Track("encoder", target.encoder, [Pair(expected, causal_encoder_run(target, batch), batch.kept_BT)]),
    ]
    if unequal := walk(source, tracks, progress):
        decoder, encoder, crossed = (
            Check(f"{name}_parity", False, unequal) for name in ("decoder", "encoder", "cross")
        )
        return decoder, encoder, crossed
    decoder = judge_decoder(source.text, tracks[0], batch, tolerance, compared="logits without cross-attention")
    encoder = judge_encoder(source.text, tracks[1], batch, None, tolerance, besides=" and all rows of its table")
    if not cross.difference.expected_finite:
        raise not_finite("the output of the source's attention on its own states", source.weights)
    # A tied softmax has already read every row.
    if target.decoder.head != target.decoder.table:
        decoder = with_table(decoder, source.text, tracks[0], tolerance)
    return decoder, with_table(encoder, source.text, tracks[1], tolerance), cross.check(tolerance)


def with_table(check: Check, source: Stack, track: Track, tolerance: float) -> Check:
    """Return a parity check that also covers every row of the embedding table, since no batch has all tokens."""
    difference, place = Difference(), ""
    for (start, ours), (_, theirs) in zip(source.table_chunks(), track.stack.table_chunks(), strict=True):
        difference.add(ours, theirs)
        if not place and not torch.equal(ours, theirs):
            place = f"{track.name} embed_tokens, row {start + int((ours != theirs).any(-1).nonzero()[0])}"
    if difference.within(tolerance) or check.figures is None:
        return check
    figures = replace(check.figures, departs=check.figures.departs or place)
    detail = f"{check.detail}; its table: {difference}, first at {place}"
    return replace(check, passed=False, detail=detail, figures=figures)
