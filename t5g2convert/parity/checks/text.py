"""decoder_parity and encoder_parity: a parent and both stacks of its child side by side, a layer of each at a time."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Protocol

import torch
from torch import Tensor, nn

from t5g2convert.checkpoint.families.rope_config import LayerType
from t5g2convert.parity.batches import MEMORY_TOKENS, Batch, ImageBatch, generator
from t5g2convert.parity.expected_stacks import Ancestors
from t5g2convert.parity.first_difference import first_departure
from t5g2convert.parity.measures import Difference, Distributions
from t5g2convert.parity.reports.report import Check, Drift
from t5g2convert.reference.encoder_decoder import EncoderDecoder
from t5g2convert.reference.gemma3 import Gemma3Reference, image_blocks
from t5g2convert.reference.masks import causal
from t5g2convert.reference.overflow import not_finite
from t5g2convert.reference.stack import Run, Stack
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.weights import Weights


class Parent(Protocol):
    """A decoder-only model: `text` are its layers, `weights` its tensors."""

    text: Stack
    weights: Weights


class Probe(Protocol):
    """What else is compared of two layers while they are in memory."""

    def look(self, number: int, layer: nn.Module, other: nn.Module, states_BTC: Tensor) -> None:
        """Compare.

        Args:
            number: Which layers they are.
            layer: The parent's.
            other: The child's.
            states_BTC: What the parent's was given.
        """


@dataclass
class Pair:
    """A batch on its way through the parent, and the same batch through a stack of the child."""

    expected: Run
    found: Run
    kept_BT: Tensor


@dataclass
class Track:
    """One stack of the child beside the parent's, and what was seen of them so far."""

    name: str
    stack: Stack
    pairs: list[Pair]
    drifts: list[Drift] = field(default_factory=list)
    departs: str | None = None
    probe: Probe | None = None
    parent_lost: str | None = None  # the first place behind which the parent's own states are not finite

    def compare(self, layer: str) -> Difference:
        """Note how far the states are apart now."""
        difference = Difference()
        for pair in self.pairs:
            difference.add(pair.expected.hidden_BTC[pair.kept_BT], pair.found.hidden_BTC[pair.kept_BT])
        self.drifts.append(difference.drift(layer))
        if not difference.expected_finite and self.parent_lost is None:
            self.parent_lost = layer
        return difference

    def require_finite_parent(self, weights: Weights) -> None:
        """Refuse to compare with a parent that gives NaN or infinity; `weights` are the parent's."""
        if self.parent_lost is not None:
            raise not_finite(f"the source's own states behind {self.parent_lost}", weights)

    def compare_embeddings(self) -> None:
        """The same before the first layer, and the first token that differs."""
        if not self.compare("embed_tokens").max_abs:
            return
        self.departs = "embed_tokens"
        for pair in self.pairs:
            differs_BT = (pair.expected.hidden_BTC != pair.found.hidden_BTC).any(-1) & pair.kept_BT
            if bool(differs_BT.any()):
                row, column = differs_BT.nonzero()[0].tolist()
                self.departs = f"embed_tokens, at token {column} of sequence {row}"
                return


@torch.inference_mode()
def judge_text(
    parents: Ancestors,
    target: T5Gemma2Reference,
    batch: Batch,
    images: ImageBatch | None,
    *,
    tolerance: float,
    progress: Callable[[str], None],
) -> list[Check]:
    """Both parities: in one walk through the layers where both stacks have the same, and in one for each otherwise.

    Args:
        parents: What encoder and decoder should compute.
        target: T5Gemma 2.
        batch: What both stacks and Gemma 3 read.
        images: What the encoder and its parent read besides, if they have images.
        tolerance: Largest relative difference that passes; 0 is exact.
        progress: Told what is being done.

    Raises:
        CheckpointError: A Gemma 3 itself does not give finite states.
        UsageError: float16 overflows.
    """
    encoder_from, decoder_from = parents.encoder, parents.decoder
    first = decoder_from.gemma.start(batch.ids_BT, batch.kept_BT)
    second = first if parents.alike else encoder_from.gemma.start(batch.ids_BT, batch.kept_BT)
    decoder = Track("decoder", target.decoder, [Pair(first, hidden_memory_run(target, batch), batch.kept_BT)])
    encoder = Track("encoder", target.encoder, [Pair(second, causal_encoder_run(target, batch), batch.kept_BT)])
    if images is not None:
        encoder.pairs.append(_image_pair(encoder_from.gemma, target, images))
    if parents.alike:
        unequal = walk(decoder_from.gemma, [decoder, encoder], progress, layers=decoder_from.layers)
    else:
        reasons = [
            walk(ancestor.gemma, [track], partial(_told_of, track, progress), layers=ancestor.layers)
            for ancestor, track in ((decoder_from, decoder), (encoder_from, encoder))
        ]
        unequal = "; ".join(reason for reason in reasons if reason is not None)
    if unequal:
        return [Check(f"{part}_parity", False, unequal) for part in ("decoder", "encoder")]
    return [
        judge_decoder(decoder_from.gemma.text, decoder, batch, tolerance),
        judge_encoder(encoder_from.gemma.text, encoder, batch, images, tolerance),
    ]


def _told_of(track: Track, progress: Callable[[str], None], told: str) -> None:
    progress(f"{told} of the {track.name}")


def walk(
    source: Parent, tracks: list[Track], progress: Callable[[str], None], *, layers: Sequence[int] | None = None
) -> str | None:
    """Take all tracks through all layers, and note where each departs; why that cannot be, where depths differ.

    Args:
        source: The parent.
        tracks: What is compared with it.
        progress: Told what is being done.
        layers: The numbers of the parent's layers that the tracks' stacks have, if not all.

    Raises:
        CheckpointError: The parent itself does not give finite states.
        UsageError: float16 overflows.
    """
    depth = len(source.text) if layers is None else len(layers)
    unequal = [
        f"the source has {depth} layers, the {track.name} {len(track.stack)}"
        for track in tracks
        if len(track.stack) != depth
    ]
    if unequal:
        return "; ".join(unequal)
    for track in tracks:
        track.compare_embeddings()
    advance_side_by_side(source.text, tracks, progress, layers=layers)
    for track in tracks:
        track.require_finite_parent(source.weights)
    progress("softmax")
    return None


def hidden_memory_run(target: T5Gemma2Reference, batch: Batch) -> Run:
    """A decoder batch whose memory, seeded noise, is hidden by its mask."""
    count, device = batch.ids_BT.shape[0], batch.ids_BT.device
    memory_BMC = torch.randn((count, MEMORY_TOKENS, target.decoder.settings.hidden_size), generator=generator())
    hidden_BM = torch.zeros(count, MEMORY_TOKENS, dtype=torch.bool, device=device)
    memory_BMC = memory_BMC.to(device=device, dtype=target.decoder.embed(batch.ids_BT[:1, :1]).dtype)
    return target.start_decoder(batch.ids_BT, batch.kept_BT, memory_BMC, hidden_BM)


def causal_encoder_run(target: EncoderDecoder, batch: Batch, blocks_BT: Tensor | None = None) -> Run:
    """An encoder batch under its parent's masks, with the encoder's own window."""
    return target.start_encoder(batch.ids_BT, _causal_masks(target.encoder, batch.kept_BT, blocks_BT))


def _causal_masks(stack: Stack, kept_BT: Tensor, blocks_BT: Tensor | None) -> dict[LayerType, Tensor]:
    window, kinds = stack.settings.sliding_window, set(stack.settings.layer_types)
    return {kind: causal(kind, window, kept_BT, blocks_BS=blocks_BT) for kind in kinds}


def _image_pair(source: Gemma3Reference, target: T5Gemma2Reference, images: ImageBatch) -> Pair:
    """Text with an image: both get the source's image features, so that a faulty tower is told by its own check."""
    assert source.vision is not None
    assert target.vision is not None
    token = target.vision.tokens.image_token_index
    ids_BT, kept_BT = images.with_token(token), torch.ones_like(images.ids_BT, dtype=torch.bool)
    expected = source.start(images.with_token(source.vision.tokens.image_token_index), kept_BT, images.features_ITC)
    masks = _causal_masks(target.encoder, kept_BT, image_blocks(ids_BT, token))
    return Pair(expected, target.start_encoder(ids_BT, masks, images.features_ITC), kept_BT)


def advance_side_by_side(
    source: Stack,
    tracks: list[Track],
    progress: Callable[[str], None],
    *,
    layers: Sequence[int] | None = None,
    trace: bool = True,
) -> None:
    """Take every pair through all layers, a layer of each stack at a time.

    Args:
        source: What the tracks' stacks should compute.
        tracks: Those stacks, all of one depth.
        progress: Told what is being done.
        layers: The numbers of the source's layers that they have, if not all.
        trace: Note where a track first departs from the source.
    """
    numbers = range(len(source)) if layers is None else layers
    runs = list({id(pair.expected): pair.expected for track in tracks for pair in track.pairs}.values())
    for number, original in enumerate(numbers):
        kind = source.settings.layer_types[original]
        progress(f"layer {number + 1} of {len(numbers)}")
        layer = source.layer(original)
        before = {id(run): run.hidden_BTC for run in runs}
        for run in runs:
            run.advance(layer, kind, number)
        for track in tracks:
            other, other_kind = track.stack.layer(number), track.stack.settings.layer_types[number]
            entered = [pair.found.hidden_BTC for pair in track.pairs]
            for pair in track.pairs:
                pair.found.advance(other, other_kind, number)
            if track.probe is not None:
                track.probe.look(number, layer, other, before[id(track.pairs[0].expected)])
            difference = track.compare(f"layers.{number}")
            if trace and difference.max_abs and track.departs is None:
                places = [
                    first_departure(
                        layer,
                        [before[id(pair.expected)], *pair.expected.arguments(kind, number)],
                        other,
                        [states, *pair.found.arguments(other_kind, number)],
                        pair.kept_BT,
                    )
                    for pair, states in zip(track.pairs, entered, strict=True)
                    if not torch.equal(pair.expected.hidden_BTC[pair.kept_BT], pair.found.hidden_BTC[pair.kept_BT])
                ]
                inside = next(iter(places), None) or "the sums behind attention and MLP"
                which = other_kind if original == number else f"{other_kind}, the parent's layers.{original}"
                track.departs = f"{track.name} layers.{number} ({which}), {inside}"
            del other
        # The next layers are read before the names are bound anew.
        del layer


def _normed(source: Stack, track: Track) -> list[tuple[Tensor, Tensor]]:
    """States behind the last norm of both models, tokens that are no padding only; the difference is noted."""
    track.require_finite_parent(source.weights)
    difference = Difference()
    states = []
    for pair in track.pairs:
        expected_NC = source.norm(pair.expected.hidden_BTC[pair.kept_BT])
        found_NC = track.stack.norm(pair.found.hidden_BTC[pair.kept_BT])
        difference.add(expected_NC, found_NC)
        states.append((expected_NC, found_NC))
    track.drifts.append(difference.drift("norm"))
    if not difference.expected_finite:
        raise not_finite("the source's own normed states", source.weights)
    if difference.max_abs and track.departs is None:
        track.departs = f"{track.name} norm"
    return states


def both_logits(
    source: Stack, target: Stack, expected_NC: Tensor, found_NC: Tensor
) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Logits of normed states over the target's vocabulary, a slice of both tables at a time, with its first row."""
    rows = target.settings.vocab_size
    chunks = zip(source.logit_chunks(expected_NC, rows), target.logit_chunks(found_NC, rows), strict=True)
    for (start, expected_NV), (_, found_NV) in chunks:
        yield start, expected_NV, found_NV


def judge_decoder(
    source: Stack, track: Track, batch: Batch, tolerance: float, *, compared: str = "logits with hidden memory"
) -> Check:
    """decoder_parity: whether the logits are the source's, behind all layers; `compared` says under what."""
    ((expected_NC, found_NC),) = _normed(source, track)
    difference = Difference()
    for _, expected_NV, found_NV in both_logits(source, track.stack, expected_NC, found_NC):
        difference.add(expected_NV, found_NV)
    if not difference.expected_finite:
        raise not_finite("the source's own logits", source.weights)
    kl, agreement = 0.0, 1.0
    if difference.max_abs:
        # Equal logits are equal distributions; only others are worth a second look at the whole vocabulary.
        tokens = Distributions(len(expected_NC))
        for start, expected_NV, found_NV in both_logits(source, track.stack, expected_NC, found_NC):
            tokens.add(start, expected_NV, found_NV)
        kl, agreement = tokens.kl, tokens.agreement
        matrix = "embed_tokens as the softmax" if track.stack.head == track.stack.table else track.stack.head
        track.departs = track.departs or f"{matrix}, or final_logit_softcapping"
    passed = difference.within(tolerance)
    count, length = int(batch.kept_BT.sum()), batch.ids_BT.shape[1]
    said = f"{compared}, {count} tokens in sequences of {length}: {difference}"
    if not passed:
        said += f"; KL {kl:.3g}, top-1 agreement {agreement:.1%}; departs at {track.departs}"
    figures = difference.figures(departs=track.departs, drifts=tuple(track.drifts), kl=kl, agreement=agreement)
    return Check("decoder_parity", passed, said, figures=figures)


def judge_encoder(
    source: Stack,
    track: Track,
    batch: Batch,
    images: ImageBatch | None,
    tolerance: float,
    *,
    masks: str = "causal masks",
    besides: str = "",
) -> Check:
    """encoder_parity: whether the normed states are the source's, behind all layers.

    Args:
        source: The source's stack.
        track: The encoder's.
        batch: What both read.
        images: What both read besides, if anything.
        tolerance: Largest relative difference that passes.
        masks: Under which masks they read it.
        besides: What else is compared.
    """
    difference = Difference()
    for expected_NC, found_NC in _normed(source, track):
        difference.add(expected_NC, found_NC)
    passed = difference.within(tolerance)
    seen = " and with an image" if images is not None else ""
    said = f"states under {masks}, {int(batch.kept_BT.sum())} tokens{seen}{besides}: {difference}"
    if not passed:
        said += f"; departs at {track.departs}"
    return Check(
        "encoder_parity", passed, said, figures=difference.figures(departs=track.departs, drifts=tuple(track.drifts))
    )
