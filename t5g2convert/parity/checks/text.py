"""decoder_parity and encoder_parity: both stacks of T5Gemma 2 compute what Gemma 3 computes."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from t5g2convert.parity.batches import Batch, ImageBatch
from t5g2convert.parity.measures import Difference, Distributions
from t5g2convert.parity.reports.report import Check
from t5g2convert.parity.side_by_side import (
    Pair,
    Track,
    both_logits,
    causal_encoder_run,
    causal_masks,
    hidden_memory_run,
    normed_states,
    walk,
)
from t5g2convert.reference.gemma3 import Gemma3Reference, image_blocks
from t5g2convert.reference.stack import Stack
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.weights import not_finite


@dataclass(frozen=True)
class ExpectedStack:
    """The expected computation of a T5Gemma 2 stack: layers of a Gemma 3, in order.

    Attributes:
        gemma: Gemma 3, with the embedding table that the target has.
        layers: The numbers of its layers: layer i of the stack is layer `layers[i]` of Gemma 3.
        norm: The one factor of its final norm; None for Gemma 3's norm.
    """

    gemma: Gemma3Reference
    layers: tuple[int, ...]
    norm: float | None = None

    @classmethod
    def whole(cls, gemma: Gemma3Reference) -> "ExpectedStack":
        """Expect all layers."""
        return cls(gemma, tuple(range(len(gemma.text))))


@dataclass(frozen=True)
class ExpectedStacks:
    """What both stacks of T5Gemma 2 must compute."""

    encoder: ExpectedStack
    decoder: ExpectedStack

    @classmethod
    def both(cls, gemma: Gemma3Reference) -> "ExpectedStacks":
        """Expect one Gemma 3, whole, in both stacks."""
        return cls(ExpectedStack.whole(gemma), ExpectedStack.whole(gemma))

    @property
    def alike(self) -> bool:
        """True if both have the same layers of the same model."""
        return self.encoder.gemma is self.decoder.gemma and self.encoder.layers == self.decoder.layers


@torch.inference_mode()
def judge_text(
    expected: ExpectedStacks,
    target: T5Gemma2Reference,
    batch: Batch,
    images: ImageBatch | None,
    *,
    tolerance: float,
    progress: Callable[[str], None],
) -> tuple[Check, Check]:
    """Make decoder_parity and encoder_parity, in one walk through the layers if both stacks have the same ones.

    Args:
        expected: What encoder and decoder must compute.
        target: T5Gemma 2.
        batch: Tokens for both stacks and Gemma 3.
        images: Text with an image for the encoder and Gemma 3, if they read images.
        tolerance: Largest relative difference that passes; 0 is exact.
        progress: Called with a few words at every layer.

    Raises:
        CheckpointError: Gemma 3's own states are not finite.
        UsageError: float16 overflows.
    """
    encoder_from, decoder_from = expected.encoder, expected.decoder
    first = decoder_from.gemma.start(batch.ids_BT, batch.kept_BT)
    second = first if expected.alike else encoder_from.gemma.start(batch.ids_BT, batch.kept_BT)
    decoder = Track("decoder", target.decoder, [Pair(first, hidden_memory_run(target, batch), batch.kept_BT)])
    encoder = Track("encoder", target.encoder, [Pair(second, causal_encoder_run(target, batch), batch.kept_BT)])
    if images is not None:
        encoder.pairs.append(_image_pair(encoder_from.gemma, target, images))
    if expected.alike:
        unequal = walk(decoder_from.gemma, [decoder, encoder], progress, layers=decoder_from.layers)
    else:
        reasons = [
            walk(stack.gemma, [track], partial(_progress_of, track, progress), layers=stack.layers)
            for stack, track in ((decoder_from, decoder), (encoder_from, encoder))
        ]
        unequal = "; ".join(reason for reason in reasons if reason is not None)
    if unequal:
        return Check("decoder_parity", False, unequal), Check("encoder_parity", False, unequal)
    return (
        judge_decoder(decoder_from.gemma.text, decoder, batch, tolerance),
        judge_encoder(encoder_from.gemma.text, encoder, batch, images, tolerance, norm=encoder_from.norm),
    )


def _progress_of(track: Track, progress: Callable[[str], None], step: str) -> None:
    progress(f"{step} of the {track.name}")


def _image_pair(source: Gemma3Reference, target: T5Gemma2Reference, images: ImageBatch) -> Pair:
    """Start both on text with an image; both get the source's features, so only vision_parity judges the tower."""
    assert source.vision is not None
    assert target.vision is not None
    token = target.vision.tokens.image_token_index
    ids_BT, kept_BT = images.with_token(token), torch.ones_like(images.ids_BT, dtype=torch.bool)
    expected = source.start(images.with_token(source.vision.tokens.image_token_index), kept_BT, images.features_ITC)
    masks = causal_masks(target.encoder, kept_BT, image_blocks(ids_BT, token))
    return Pair(expected, target.start_encoder(ids_BT, masks, images.features_ITC), kept_BT)


def judge_decoder(
    source: Stack, track: Track, batch: Batch, tolerance: float, *, compared: str = "logits with hidden memory"
) -> Check:
    """Compare the logits after all layers; `compared` describes the comparison in the check's detail."""
    ((expected_NC, found_NC),) = normed_states(source, track)
    difference = Difference()
    for _, expected_NV, found_NV in both_logits(source, track.stack, expected_NC, found_NC):
        difference.add(expected_NV, found_NV)
    if not difference.expected_finite:
        raise not_finite("the source's own logits", source.weights)
    kl, agreement = 0.0, 1.0
    if difference.max_abs:
        # Equal logits give equal distributions; others need a second pass over the vocabulary.
        tokens = Distributions(len(expected_NC))
        for start, expected_NV, found_NV in both_logits(source, track.stack, expected_NC, found_NC):
            tokens.add(start, expected_NV, found_NV)
        kl, agreement = tokens.kl, tokens.agreement
        matrix = "embed_tokens as the softmax" if track.stack.head == track.stack.table else track.stack.head
        track.departs = track.departs or f"{matrix}, or final_logit_softcapping"
    passed = difference.within(tolerance)
    count, length = int(batch.kept_BT.sum()), batch.ids_BT.shape[1]
    detail = f"{compared}, {count} tokens in sequences of {length}: {difference}"
    if not passed:
        detail += f"; KL {kl:.3g}, top-1 agreement {agreement:.1%}; departs at {track.departs}"
    figures = difference.figures(departs=track.departs, drifts=tuple(track.drifts), kl=kl, agreement=agreement)
    return Check("decoder_parity", passed, detail, figures=figures)


def judge_encoder(
    source: Stack,
    track: Track,
    batch: Batch,
    images: ImageBatch | None,
    tolerance: float,
    *,
    masks: str = "causal masks",
    besides: str = "",
    norm: float | None = None,
) -> Check:
    """Compare the normed states after all layers.

    Args:
        source: The source's stack.
        track: The encoder's.
        batch: The tokens that both read.
        images: Text with an image that both read, if any.
        tolerance: Largest relative difference that passes.
        masks: The masks, for the detail.
        besides: Other things that are compared, for the detail.
        norm: The one factor of the encoder's final norm; None for the source's norm.
    """
    difference = Difference()
    for expected_NC, found_NC in normed_states(source, track, norm):
        difference.add(expected_NC, found_NC)
    passed = difference.within(tolerance)
    seen = " and with an image" if images is not None else ""
    normed = "" if norm is None else f", with the declared final norm of {norm:g}"
    detail = f"states under {masks}, {int(batch.kept_BT.sum())} tokens{seen}{besides}{normed}: {difference}"
    if not passed:
        detail += f"; departs at {track.departs}"
    return Check(
        "encoder_parity", passed, detail, figures=difference.figures(departs=track.departs, drifts=tuple(track.drifts))
    )
