"""Two models side by side on the same tokens, one layer of each in memory at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from t5g2convert.checkpoint.families.rope_config import LayerType
from t5g2convert.parity.batches import MEMORY_TOKENS, Batch, generator
from t5g2convert.parity.first_difference import first_difference
from t5g2convert.parity.measures import Difference
from t5g2convert.parity.reports.report import Drift
from t5g2convert.reference.encoder_decoder import EncoderDecoder
from t5g2convert.reference.gemma2 import Gemma2Reference
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.masks import causal
from t5g2convert.reference.stack import Run, Stack
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.weights import Weights, not_finite

LayerComparison = Callable[[int, nn.Module, nn.Module, Tensor], None]
"""Number of a layer, the source's layer, the target's layer, and the source's states [B, T, C] before its layer."""


@dataclass
class Pair:
    """A batch on its way through the source and through a stack of the target; `kept_BT` is False at padding."""

    expected: Run
    found: Run
    kept_BT: Tensor


@dataclass
class Track:
    """One stack of the target, compared with the source's layer by layer.

    Attributes:
        name: `encoder` or `decoder`.
        stack: The target's stack.
        pairs: The batches.
        drifts: The differences so far.
        departs: The first module that differs; None if all are equal so far.
        also_compare: A further comparison of every two layers while they are in memory.
        source_lost: The first layer after which the source's own states are not finite.
    """

    name: str
    stack: Stack
    pairs: list[Pair]
    drifts: list[Drift] = field(default_factory=list)
    departs: str | None = None
    also_compare: LayerComparison | None = None
    source_lost: str | None = None

    def compare(self, layer: str) -> Difference:
        """Record and return the difference between the current states."""
        difference = Difference()
        for pair in self.pairs:
            difference.add(pair.expected.hidden_BTC[pair.kept_BT], pair.found.hidden_BTC[pair.kept_BT])
        self.drifts.append(difference.drift(layer))
        if not difference.expected_finite and self.source_lost is None:
            self.source_lost = layer
        return difference

    def require_finite_source(self, weights: Weights) -> None:
        """Refuse a source that computes NaN or infinity; `weights` are the source's.

        Raises:
            CheckpointError: The source's own states are not finite.
            UsageError: float16 overflows.
        """
        if self.source_lost is not None:
            raise not_finite(f"the source's own states after {self.source_lost}", weights)

    def compare_embeddings(self) -> None:
        """Record the difference before the first layer, and the first token that differs."""
        if not self.compare("embed_tokens").max_abs:
            return
        self.departs = "embed_tokens"
        for pair in self.pairs:
            differs_BT = (pair.expected.hidden_BTC != pair.found.hidden_BTC).any(-1) & pair.kept_BT
            if bool(differs_BT.any()):
                row, column = differs_BT.nonzero()[0].tolist()
                self.departs = f"embed_tokens, at token {column} of sequence {row}"
                return


def walk(
    source: Gemma2Reference | Gemma3Reference,
    tracks: list[Track],
    progress: Callable[[str], None],
    *,
    layers: Sequence[int] | None = None,
) -> str | None:
    """Take all tracks through all layers; if depths differ, return why that is impossible.

    Args:
        source: The source.
        tracks: The stacks to compare with it.
        progress: Called with a few words at every layer.
        layers: The numbers of the source's layers that the stacks have, if not all.

    Raises:
        CheckpointError: The source's own states are not finite.
        UsageError: float16 overflows.
    """
    depth = len(source.text) if layers is None else len(layers)
    unequal = [
        f"the source has {depth} layers, the {track.name} has {len(track.stack)}"
        for track in tracks
        if len(track.stack) != depth
    ]
    if unequal:
        return "; ".join(unequal)
    for track in tracks:
        track.compare_embeddings()
    advance_side_by_side(source.text, tracks, progress, layers=layers)
    for track in tracks:
        track.require_finite_source(source.weights)
    progress("softmax")
    return None


def hidden_memory_run(target: T5Gemma2Reference, batch: Batch) -> Run:
    """Start a decoder on a batch; the mask hides its memory, which is seeded noise."""
    count, device = batch.ids_BT.shape[0], batch.ids_BT.device
    memory_BMC = torch.randn((count, MEMORY_TOKENS, target.decoder.settings.hidden_size), generator=generator())
    hidden_BM = torch.zeros(count, MEMORY_TOKENS, dtype=torch.bool, device=device)
    memory_BMC = memory_BMC.to(device=device, dtype=target.decoder.embed(batch.ids_BT[:1, :1]).dtype)
    return target.start_decoder(batch.ids_BT, batch.kept_BT, memory_BMC, hidden_BM)


def causal_encoder_run(target: EncoderDecoder, batch: Batch, blocks_BT: Tensor | None = None) -> Run:
    """Start an encoder on a batch under causal masks, with the encoder's own window."""
    return target.start_encoder(batch.ids_BT, causal_masks(target.encoder, batch.kept_BT, blocks_BT))


def causal_masks(stack: Stack, kept_BT: Tensor, blocks_BT: Tensor | None) -> dict[LayerType, Tensor]:
    """Return the masks of a decoder-only model for the layers of a stack, by kind of layer."""
    window, kinds = stack.settings.sliding_window, set(stack.settings.layer_types)
    return {kind: causal(kind, window, kept_BT, blocks_BS=blocks_BT) for kind in kinds}


def advance_side_by_side(
    source: Stack,
    tracks: list[Track],
    progress: Callable[[str], None],
    *,
    layers: Sequence[int] | None = None,
    trace: bool = True,
) -> None:
    """Take every pair through all layers, one layer of each stack at a time.

    Args:
        source: The source's stack.
        tracks: The target's stacks, all of one depth.
        progress: Called with a few words at every layer.
        layers: The numbers of the source's layers that the stacks have, if not all.
        trace: Whether to find the first module in which a track differs from the source.
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
            if track.also_compare is not None:
                track.also_compare(number, layer, other, before[id(track.pairs[0].expected)])
            difference = track.compare(f"layers.{number}")
            if trace and difference.max_abs and track.departs is None:
                which = other_kind if original == number else f"{other_kind}, the parent's layers.{original}"
                inside = _inside_layer(track, (layer, other), (kind, other_kind), number, before, entered)
                track.departs = f"{track.name} layers.{number} ({which}), {inside}"
            del other
        # Free these before the next layers are read.
        del layer


def _inside_layer(
    track: Track,
    layers: tuple[nn.Module, nn.Module],
    kinds: tuple[LayerType, LayerType],
    number: int,
    before: Mapping[int, Tensor],
    entered: Sequence[Tensor],
) -> str:
    """Return the first module inside a layer with another output than the source's.

    Args:
        track: The track, after the layer.
        layers: The source's layer, and the target's.
        kinds: The kinds of both layers.
        number: The number of the target's layer.
        before: The source's states before the layer, by the identity of their run.
        entered: The target's states before the layer, for every pair of the track.
    """
    for pair, states in zip(track.pairs, entered, strict=True):
        if torch.equal(pair.expected.hidden_BTC[pair.kept_BT], pair.found.hidden_BTC[pair.kept_BT]):
            continue
        inside = first_difference(
            layers[0],
            [before[id(pair.expected)], *pair.expected.arguments(kinds[0], number)],
            layers[1],
            [states, *pair.found.arguments(kinds[1], number)],
            pair.kept_BT,
        )
        return inside or "the sums after attention and MLP"
    return "the sums after attention and MLP"


def normed_states(source: Stack, track: Track, factor: float | None = None) -> list[tuple[Tensor, Tensor]]:
    """Return the states after the last norm of both models, without padding, and record their difference.

    Args:
        source: The source's stack.
        track: The target's.
        factor: The one factor that the target's norm must have instead of the source's.

    Raises:
        CheckpointError: The source's own states are not finite.
        UsageError: float16 overflows.
    """
    track.require_finite_source(source.weights)
    difference = Difference()
    states = []
    for pair in track.pairs:
        expected_NC = source.norm(pair.expected.hidden_BTC[pair.kept_BT], factor)
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
    """Yield logits of normed states over the target's vocabulary, a slice at a time, with the slice's first row."""
    rows = target.settings.vocab_size
    chunks = zip(source.logit_chunks(expected_NC, rows), target.logit_chunks(found_NC, rows), strict=True)
    for (start, expected_NV), (_, found_NV) in chunks:
        yield start, expected_NV, found_NV
