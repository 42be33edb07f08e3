"""A text taken apart for an encoder-decoder: span corruption by T5's rule, and a prefix with its continuation.

::

    raw        a b [c d] e f g [h i j]              kept and taken pieces alternate, kept first and taken last
    encoder    bos mode a b s0 e f g s1 eos         bos, mode, eos: where frame and task have them
    labels     s0 c d s1 h i j eos
    positions  -1 2 3 -1 7 8 9 -1

Every raw token stands once, in the encoder's input or in the labels. Sentinels descend, s_k = s_0 - k; the prefix task
has none unless it asks for one. No length depends on chance: the raw length that fills the budgets is known beforehand.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.ul2.mixture import Mixture, Task
from t5g2convert.adaptation.ul2.sentinels import Sentinels
from t5g2convert.errors import DataError, UsageError

NO_POSITION = -1
"""Position of a label that is no raw token: a sentinel, or the final eos."""


@dataclass(frozen=True, slots=True)
class Frame:
    """The ids around the encoder's input and at the end of the labels."""

    encoder_bos: int | None
    encoder_eos: int | None
    eos: int


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sample.

    Attributes:
        encoder: uint32 [E], the encoder's input.
        labels: uint32 [D], what the decoder is to write; the last is eos.
        positions: int64 [D], where in `raw` a label stands, -1 for a sentinel and for the final eos.
        raw: uint32 [L], the text.
        task: The number of the task in its mixture.
    """

    encoder: NDArray[np.uint32]
    labels: NDArray[np.uint32]
    positions: NDArray[np.int64]
    raw: NDArray[np.uint32]
    task: int


def spans(length: int, task: Task) -> tuple[int, int]:
    """Noise tokens and spans of a text, by T5's rule.

    noise = round(length * rate), at least 1 and at most length - 1; spans = round(noise / mean_span), at least 1. Both
    are computed in float64 and rounded half to even. (In float32, as TensorFlow computes, 0.15 is a little more, and a
    text of 190 tokens has 29 noise tokens instead of 28.)

    Args:
        length: Raw tokens, at least 2.

    Raises:
        DataError: The text is too short, or has fewer tokens to keep than spans to keep apart.
    """
    if length < 2:
        raise DataError(f"task {task.name!r} takes apart texts of at least 2 tokens, found {length}")
    noise, pieces = _counts(length, task)
    if pieces > length - noise:
        raise DataError(
            f"task {task.name!r} takes {pieces} spans out of {length} tokens, and keeps {length - noise} to part them",
            hint="give the task a longer mean_span or a lower rate",
        )
    return noise, pieces


def _counts(length: int, task: Task) -> tuple[int, int]:
    noise = min(max(round(length * task.rate), 1), length - 1)
    return noise, 1 if task.mean_span is None else max(1, round(noise / task.mean_span))


def lengths(length: int, task: Task, frame: Frame) -> tuple[int, int]:
    """Encoder tokens and labels that `corrupt` makes of `length` raw tokens, whatever the chance.

    Raises:
        DataError: As `spans`.
    """
    return _lengths(length, *spans(length, task), task, frame)


def _lengths(length: int, noise: int, pieces: int, task: Task, frame: Frame) -> tuple[int, int]:
    marks = pieces if task.sentinel else 0
    framing = sum(token is not None for token in (frame.encoder_bos, task.mode_token, frame.encoder_eos))
    return length - noise + marks + framing, noise + marks + 1


def longest(task: Task, frame: Frame, *, encoder: int, decoder: int) -> int:
    """The most raw tokens for which the encoder's input and the labels both stay within their budgets.

    Neither length falls as the text grows, so that one more token breaks one of them.

    Raises:
        UsageError: Two tokens do not fit.
        DataError: As `spans`, for the length found.
    """

    def fits(length: int) -> bool:
        needed = _lengths(length, *_counts(length, task), task, frame)
        return needed[0] <= encoder and needed[1] <= decoder

    if not fits(2):
        needed = lengths(2, task, frame)
        raise UsageError(
            f"task {task.name!r} needs at least {needed[0]} encoder tokens and {needed[1]} labels, "
            f"found {encoder} and {decoder}"
        )
    # Every raw token takes a place in one of both.
    low, high = 2, encoder + decoder + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    spans(low, task)
    return low


def needed_sentinels(mixture: Mixture, raw_lengths: tuple[int, ...]) -> int:
    """The most sentinels in a sample, of the raw length of each task."""
    pairs = zip(mixture.tasks, raw_lengths, strict=True)
    return max(spans(length, task)[1] if task.sentinel else 0 for task, length in pairs)


def composition(total: int, pieces: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Lengths of `pieces` non-empty pieces of `total`, int64 [pieces]; every such list is equally likely.

    A list is a choice of pieces - 1 of the total - 1 places between two tokens: those with the lowest of as many random
    keys. The keys are the bit generator's raw words, whose sequence is the same in every numpy, unlike the methods'.
    """
    if pieces == 1:
        return np.array([total])
    while True:
        keys = rng.bit_generator.random_raw(total - 1)
        highest = np.partition(keys, pieces - 2)[pieces - 2]
        cuts = np.flatnonzero(keys <= highest)
        if cuts.size == pieces - 1:  # else two keys are equal, and the choice would not be uniform
            return np.diff(cuts + 1, prepend=0, append=total)


def corrupt(
    raw: NDArray[np.uint32], task: Task, sentinels: Sentinels, frame: Frame, rng: np.random.Generator, *, index: int = 0
) -> Example:
    """Take a text apart.

    Args:
        raw: uint32 [L], L at least 2.
        rng: Where chance comes from; of a generator on the same bits the same sample comes.
        index: The task's number in its mixture.

    Raises:
        DataError: As `spans`; or a token of the text is a sentinel, or there are fewer sentinels than spans.
    """
    noise, pieces = spans(raw.size, task)
    taken = composition(noise, pieces, rng)
    kept = composition(raw.size - noise, pieces, rng)
    return _assemble(raw, kept, taken, frame, sentinels, marks=task.sentinel, mode_token=task.mode_token, index=index)


def split_prefix(
    raw: NDArray[np.uint32], at: int, frame: Frame, *, task: Task, sentinels: Sentinels, index: int = 0
) -> Example:
    """The prefix task with a given prefix, raw[:at]; with images it ends with the last of them.

    Args:
        raw: uint32 [L].
        at: Tokens of the prefix.
        task: Says whether a sentinel stands for the rest, and the mode token.

    Raises:
        DataError: The prefix or the rest is empty; or as `corrupt`.
    """
    if not 0 < at < raw.size:
        raise DataError(f"expected a prefix of 1 to {raw.size - 1} tokens of {raw.size}, found one of {at}")
    kept, taken = np.array([at]), np.array([raw.size - at])
    return _assemble(raw, kept, taken, frame, sentinels, marks=task.sentinel, mode_token=task.mode_token, index=index)


def _assemble(
    raw: NDArray[np.uint32],
    kept: NDArray[np.int64],
    taken: NDArray[np.int64],
    frame: Frame,
    sentinels: Sentinels,
    *,
    marks: bool,
    mode_token: int | None,
    index: int,
) -> Example:
    """The sample in which kept and taken pieces alternate, kept first."""
    _check_raw(raw, sentinels)
    is_taken = np.repeat(np.tile([False, True], kept.size), np.stack([kept, taken], axis=1).ravel())
    inputs, positions = raw[~is_taken], np.flatnonzero(is_taken)
    targets = raw[positions]
    if marks:
        if kept.size > sentinels.count:
            raise DataError(
                f"{kept.size} sentinels are needed for a sample of {raw.size} tokens, {sentinels.count} are available"
            )
        ids = np.arange(sentinels.first, sentinels.first - kept.size, -1).astype(np.uint32)
        before = np.cumsum(taken) - taken
        inputs = np.insert(inputs, np.cumsum(kept), ids)
        targets, positions = np.insert(targets, before, ids), np.insert(positions, before, NO_POSITION)
    return Example(
        encoder=np.concatenate([_ids(frame.encoder_bos, mode_token), inputs, _ids(frame.encoder_eos)]),
        labels=np.concatenate([targets, _ids(frame.eos)]),
        positions=np.append(positions, NO_POSITION),
        raw=raw,
        task=index,
    )


def _ids(*tokens: int | None) -> NDArray[np.uint32]:
    return np.array([token for token in tokens if token is not None], np.uint32)


def _check_raw(raw: NDArray[np.uint32], sentinels: Sentinels) -> None:
    if raw.dtype != np.uint32 or raw.ndim != 1:
        raise DataError(f"expected tokens as uint32 in one dimension, found {raw.dtype} of shape {raw.shape}")
    # Unsigned numbers wrap below 0, so that one comparison finds what lies from the last sentinel to the first.
    among = raw - np.uint32(sentinels.last) < np.uint32(sentinels.count)
    if among.any():
        at = int(np.argmax(among))
        raise DataError(
            f"token {raw[at]} of the text, at {at} of the sample, is a sentinel ({sentinels.last} to {sentinels.first})"
        )
