"""`compare`: how far a trained T5Gemma 2 has moved from Gemma 3, measured on a text."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.checkpoint.header import CONFIG_NAMES
from t5g2convert.checkpoint.hub.open_and_fetch import Origin
from t5g2convert.checkpoint.sources import SOURCE, Role, Sources, download_progress
from t5g2convert.command_options import takes_options
from t5g2convert.errors import UsageError
from t5g2convert.parity.batches import Batch, first_tokens
from t5g2convert.parity.measures import Distributions
from t5g2convert.parity.options import CompareOptions
from t5g2convert.parity.reports.report import Drift, writable
from t5g2convert.parity.side_by_side import Pair, Track, advance_side_by_side, both_logits, hidden_memory_run
from t5g2convert.progress import silent
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.prompts import TextCodec
from t5g2convert.reference.stack import Run, Stack
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.weights import ReadOptions, check_device, overflow


@dataclass(frozen=True, slots=True)
class Reading:
    """One way of reading the text.

    Attributes:
        tokens: Predicted tokens.
        kl: Mean of KL(Gemma 3 || T5Gemma 2) over tokens, in nats.
        agreement: Share of tokens with the same most probable successor.
        gemma3_perplexity: Perplexity of the text under Gemma 3.
        t5gemma2_perplexity: The same under T5Gemma 2.
    """

    tokens: int
    kl: float
    agreement: float
    gemma3_perplexity: float
    t5gemma2_perplexity: float


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of `compare`.

    Attributes:
        decoder_alone: The decoder reads the text, its memory hidden, as Gemma 3 does.
        prefix_in_encoder: The encoder reads the first half; decoder and Gemma 3 predict the second.
        drifts: How far the decoder's states are from Gemma 3's after every layer of the first reading; only for the
            embeddings if the depths differ.
    """

    decoder_alone: Reading
    prefix_in_encoder: Reading
    drifts: tuple[Drift, ...]

    def to_json(self) -> dict[str, Any]:
        """Return the comparison as `t5g2 compare --json` prints it."""
        return writable(asdict(self))


@takes_options(CompareOptions)
@torch.inference_mode()
def compare(gemma3: Origin, t5gemma2: Path, text: Path, options: CompareOptions) -> Comparison:
    """Compare two models on a text; differences are measured, not judged.

    Example:
        >>> compare("google/gemma-3-270m", Path("trained"), Path("text.txt")).decoder_alone.kl

    Args:
        gemma3: The Gemma 3 folder; a str may also be a model of the Hub, which is downloaded.
        t5gemma2: The T5Gemma 2 folder; its tokenizer reads the text.
        text: A UTF-8 text file.
        options: As keyword arguments; see `CompareOptions`.

    Raises:
        CheckpointError: A folder is damaged.
        HubError: The Hub does not have the model, refuses access, or cannot be reached.
        UsageError: The text cannot be read or is too short, the widths differ, or float16 overflows.
    """
    check_device(options.dtype, options.device)
    progress = options.progress or silent
    child, sources = open_checkpoint(t5gemma2), Sources.open(gemma3)
    reads: dict[Role, list[str]] = {SOURCE: list(sources.source.files)}
    size = sources.size(sources.missing(reads))
    parent = sources.fetch(reads, download_progress(size, progress)).source
    dtype = getattr(torch, options.dtype or CONFIG_NAMES.get(child.dtype, "float32"))
    reading: ReadOptions = {"dtype": dtype, "device": options.device}
    source, target = Gemma3Reference(parent, **reading), T5Gemma2Reference(child, **reading)
    _check_pair(source, target)
    tokens = first_tokens(TextCodec(t5gemma2, target.decoder.settings.vocab_size), text, options.max_tokens)
    if len(tokens) < 8:
        raise UsageError(f"{text} has {len(tokens)} tokens, expected at least 8")
    ids_BT = torch.tensor([tokens], device=options.device)
    everything = torch.ones_like(ids_BT, dtype=torch.bool)
    expected = source.start(ids_BT, everything)
    found = hidden_memory_run(target, Batch(ids_BT, everything))
    track = Track("decoder", target.decoder, [Pair(expected, found, everything)])
    track.compare("embed_tokens")
    if len(source.text) == len(target.decoder):
        advance_side_by_side(source.text, [track], progress, trace=False)
    else:
        _advance(source.text, expected, progress)
        _advance(target.decoder, found, progress)
    gemma_TC = source.text.norm(expected.hidden_BTC)[0]
    alone_TC = target.decoder.norm(found.hidden_BTC)[0]
    progress("softmax")
    alone = _reading(source, target, gemma_TC[:-1], alone_TC[:-1], ids_BT[0, 1:])
    half = len(tokens) // 2
    progress("the first half in the encoder")
    written_TC = _continue(target, ids_BT, half)
    # Gemma 3's state at the last token of the prefix predicts the token that the decoder predicts from its start token.
    together = _reading(source, target, gemma_TC[half - 1 : -1], written_TC, ids_BT[0, half:])
    return Comparison(alone, together, tuple(track.drifts))


def _check_pair(source: Gemma3Reference, target: T5Gemma2Reference) -> None:
    ours, theirs = source.text.settings, target.decoder.settings
    if ours.hidden_size != theirs.hidden_size:
        raise UsageError(
            f"the two cannot be compared: hidden_size is {ours.hidden_size} in Gemma 3 and {theirs.hidden_size} in the "
            "decoder"
        )
    if ours.vocab_size < theirs.vocab_size:
        raise UsageError(
            f"the two cannot be compared: vocab_size is {ours.vocab_size} in Gemma 3 and more, {theirs.vocab_size}, in "
            "the decoder"
        )


def _advance(stack: Stack, run: Run, progress: Callable[[str], None]) -> None:
    """Take a batch through all layers of one stack."""
    for number, kind in enumerate(stack.settings.layer_types):
        progress(f"layer {number + 1} of {len(stack)}")
        run.advance(stack.layer(number), kind, number)


def _continue(target: T5Gemma2Reference, ids_BT: Tensor, half: int) -> Tensor:
    """Return the normed decoder states, [T, C], that predict the second half of a text; the encoder reads the first."""
    prefix_BT, rest_BT = ids_BT[:, :half], ids_BT[:, half:]
    start = target.model.decoder.bos_token_id
    if start is None:
        raise UsageError("the decoder's config has no bos_token_id to start from")
    written_BT = torch.cat((torch.full_like(rest_BT[:, :1], start), rest_BT[:, :-1]), dim=1)
    kept_BT = torch.ones_like(prefix_BT, dtype=torch.bool)
    memory_BMC = target.encode(prefix_BT, kept_BT)
    return target.decode(written_BT, torch.ones_like(written_BT, dtype=torch.bool), memory_BMC, kept_BT)[0]


def _reading(
    source: Gemma3Reference, target: T5Gemma2Reference, expected_NC: Tensor, found_NC: Tensor, labels_N: Tensor
) -> Reading:
    tokens = Distributions(len(labels_N), labels_N)
    for start, expected_NV, found_NV in both_logits(source.text, target.decoder, expected_NC, found_NC):
        for model, logits_NV in ((source, expected_NV), (target, found_NV)):
            # A model that diverged in training can be compared, one that overflows float16 cannot.
            if not bool(torch.isfinite(logits_NV).all()) and (error := overflow("the logits", model.weights)):
                raise error
        tokens.add(start, expected_NV, found_NV)
    return Reading(len(labels_N), tokens.kl, tokens.agreement, *tokens.perplexities)
