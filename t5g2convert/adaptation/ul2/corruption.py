"""UL2 corruption: a text becomes the encoder's input and the labels, by T5's span corruption or as a prefix task.

::

    raw        a b [c d] e f g [h i j]              kept and removed pieces alternate, the first kept, the last removed
    encoder    bos mode a b s0 e f g s1 eos         bos, mode and eos only if frame and task have them
    labels     s0 c d s1 h i j eos
    positions  -1 2 3 -1 7 8 9 -1

Every raw token occurs once, in the encoder's input or in the labels. Sentinels descend, s_k = s_0 - k; the prefix task
uses one only on request. No length is random, so the raw length that fills the budgets is known in advance.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.example import NO_POSITION, Example
from t5g2convert.adaptation.ul2.mixture import Mixture, Task
from t5g2convert.adaptation.ul2.sentinels import Sentinels
from t5g2convert.errors import DataError, UsageError


@dataclass(frozen=True, slots=True)
class Frame:
    """The ids around the encoder's input and at the end of the labels."""

    encoder_bos: int | None
    encoder_eos: int | None
    eos: int


def spans(length: int, task: Task) -> tuple[int, int]:
    """Return the number of noise tokens and spans of a text, by T5's rule.

    noise = round(length * rate), at least 1 and at most length - 1; spans = round(noise / mean_span), at least 1. Both
    are computed in float64 and rounded half to even. (In float32, as TensorFlow computes, 0.15 is a little more, and a
    text of 190 tokens has 29 noise tokens instead of 28.)

    Args:
        length: Raw tokens, at least 2.

    Raises:
        DataError: The text is too short, or too few tokens remain to separate the spans.
    """
    if length < 2:
        raise DataError(f"task {task.name!r} needs texts of at least 2 tokens, got {length}")
    noise, pieces = _counts(length, task)
    if pieces > length - noise:
        raise DataError(
            f"task {task.name!r} removes {pieces} spans from {length} tokens, but only {length - noise} remain between "
            "them",
            hint="give the task a longer mean_span or a lower rate",
        )
    return noise, pieces


def _counts(length: int, task: Task) -> tuple[int, int]:
    noise = min(max(round(length * task.rate), 1), length - 1)
    return noise, 1 if task.mean_span is None else max(1, round(noise / task.mean_span))


def lengths(length: int, task: Task, frame: Frame) -> tuple[int, int]:
    """Return the number of encoder tokens and labels that `corrupt` makes from `length` raw tokens.

    Raises:
        DataError: As in `spans`.
    """
    return _lengths(length, *spans(length, task), task, frame)


def _lengths(length: int, noise: int, pieces: int, task: Task, frame: Frame) -> tuple[int, int]:
    marks = pieces if task.sentinel else 0
    framing = sum(token is not None for token in (frame.encoder_bos, task.mode_token, frame.encoder_eos))
    return length - noise + marks + framing, noise + marks + 1


def longest(task: Task, frame: Frame, *, encoder: int, decoder: int) -> int:
    """Return the most raw tokens for which the encoder's input and the labels stay within their budgets.

    Neither length decreases with the text, so one more token exceeds a budget.

    Raises:
        UsageError: Not even two tokens fit.
        DataError: As in `spans`, for the result.
    """

    def fits(length: int) -> bool:
        needed = _lengths(length, *_counts(length, task), task, frame)
        return needed[0] <= encoder and needed[1] <= decoder

    if not fits(2):
        needed = lengths(2, task, frame)
        raise UsageError(
            f"task {task.name!r} needs at least {needed[0]} encoder tokens and {needed[1]} labels, "
            f"got {encoder} and {decoder}"
        )
    # Every raw token takes a position in one of the two.
    low, high = 2, encoder + decoder + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    spans(low, task)
    return low


def needed_sentinels(mixture: Mixture, raw_lengths: tuple[int, ...]) -> int:
    """Return the most sentinels in a sample, for the raw length of each task."""
    pairs = zip(mixture.tasks, raw_lengths, strict=True)
    return max(spans(length, task)[1] if task.sentinel else 0 for task, length in pairs)


def composition(total: int, pieces: int, rng: np.random.Generator) -> NDArray[np.int64]:
    """Split `total` into `pieces` non-empty pieces, uniformly at random; return their lengths, int64 [pieces].

    A split chooses pieces - 1 of the total - 1 gaps between tokens: the gaps with the lowest random keys. The keys are
    raw words of the bit generator: unlike the results of its methods, they are the same in every version of numpy.
    """
    if pieces == 1:
        return np.array([total])
    while True:
        keys = rng.bit_generator.random_raw(total - 1)
        highest = np.partition(keys, pieces - 2)[pieces - 2]
        cuts = np.flatnonzero(keys <= highest)
        if cuts.size == pieces - 1:  # otherwise two keys are equal, and the choice would not be uniform
            return np.diff(cuts + 1, prepend=0, append=total)


def corrupt(
    raw: NDArray[np.uint32], task: Task, sentinels: Sentinels, frame: Frame, rng: np.random.Generator, *, index: int = 0
) -> Example:
    """Corrupt a text: make a sample of a spans or prefix task.

    Args:
        raw: uint32 [L], L at least 2.
        rng: Source of randomness; the same state gives the same sample.
        index: Number of the task in its mixture.

    Raises:
        DataError: As in `spans`; or a token of the text is a sentinel, or there are too few sentinels.
    """
    noise, pieces = spans(raw.size, task)
    taken = composition(noise, pieces, rng)
    kept = composition(raw.size - noise, pieces, rng)
    return _assemble(raw, kept, taken, frame, sentinels, marks=task.sentinel, mode_token=task.mode_token, index=index)


def split_prefix(
    raw: NDArray[np.uint32], at: int, frame: Frame, *, task: Task, sentinels: Sentinels, index: int = 0
) -> Example:
    """Make a sample of the prefix task with the prefix raw[:at].

    Args:
        raw: uint32 [L].
        at: Tokens in the prefix.
        task: Gives the mode token, and whether a sentinel replaces the rest.

    Raises:
        DataError: The prefix or the rest is empty; or as in `corrupt`.
    """
    if not 0 < at < raw.size:
        raise DataError(f"the prefix of {raw.size} tokens must have 1 to {raw.size - 1}, got {at}")
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
    """Build the sample from alternating kept and removed pieces; the first is kept."""
    _check_raw(raw, sentinels)
    is_taken = np.repeat(np.tile([False, True], kept.size), np.stack([kept, taken], axis=1).ravel())
    inputs, positions = raw[~is_taken], np.flatnonzero(is_taken)
    targets = raw[positions]
    if marks:
        if kept.size > sentinels.count:
            raise DataError(
                f"a sample of {raw.size} tokens needs {kept.size} sentinels, but {sentinels.count} are available"
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
        raise DataError(f"expected uint32 tokens in one dimension, got {raw.dtype} of shape {raw.shape}")
    # Unsigned subtraction wraps, so one comparison covers the whole range.
    among = raw - np.uint32(sentinels.last) < np.uint32(sentinels.count)
    if among.any():
        at = int(np.argmax(among))
        raise DataError(
            f"token {raw[at]} at position {at} of the sample is a sentinel ({sentinels.last} to {sentinels.first})"
        )
