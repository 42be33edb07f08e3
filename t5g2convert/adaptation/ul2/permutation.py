"""Seeded random words, and permutations that are computed place by place: no order is kept in memory."""

from collections.abc import Sequence
from math import isqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from t5g2convert.errors import UsageError

SAMPLE, BLOCK, CHUNKS, DOCUMENTS, PIECES, TEXT_SHARES, IMAGE_SHARES, PAIRS, HELD_OUT, PAIR_SHARES = range(10)
"""Uses of randomness. Each has its own part of Philox' counter, so that equal keys give different words."""

ROUNDS: Final = 12
"""Rounds of a permutation. Large ones look random after 4; after 8 some orders of five items are still too frequent."""

WORD: Final = (1 << 64) - 1
"""The largest random word, seed and sample number."""


def permuted(place: int, count: int, keys: Sequence[int]) -> int:
    """Map `place` by the permutation of 0 to count - 1 that belongs to `ROUNDS` random words, in constant memory.

    A Feistel network over a grid that is slightly larger than `count`: a place is a pair (row, column), and each round
    moves one of them by an amount that depends on the other, which is invertible. If the result is out of range, the
    network is applied again until it is in range, so the map stays a permutation.
    """
    rows = isqrt(count - 1) + 1
    columns = -(-count // rows)
    while True:
        row, column = divmod(place, columns)
        for number, key in enumerate(keys):
            if number % 2:
                column = (column + _mixed(key, row)) % columns
            else:
                row = (row + _mixed(key, column)) % rows
        place = row * columns + column
        if place < count:
            return place


def _mixed(key: int, value: int) -> int:
    """Mix both into a word that depends on every bit: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    word = (key + value * 0x9E3779B97F4A7C15) & WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & WORD
    return word ^ (word >> 31)


def sample_number(i: int) -> int:
    """Return a sample's number as a Python int, in range: divmod of numpy's unsigned integers does not stay exact.

    Raises:
        UsageError: It is out of range.
    """
    if not 0 <= i <= WORD:
        raise UsageError(f"sample number must be between 0 and {WORD}, got {i}")
    return int(i)


def philox(seed: int, number: int, use: int, *, corpus: int = 0) -> np.random.Philox:
    """Return the generator for a use of randomness, keyed by the seed and a number."""
    return np.random.Philox(key=np.array([seed, number], np.uint64), counter=np.array([0, 0, corpus, use], np.uint64))


def words(source: np.random.Philox, count: int) -> NDArray[np.uint64]:
    """Return the next raw words; their sequence is the same in every version of numpy."""
    return source.random_raw(count)


def permutation_keys(seed: int, epoch: int, use: int, *, corpus: int = 0) -> list[int]:
    """Return the keys of an epoch's permutation."""
    found: list[int] = words(philox(seed, epoch, use, corpus=corpus), ROUNDS).tolist()
    return found
