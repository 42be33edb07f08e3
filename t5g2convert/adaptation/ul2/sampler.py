"""Which sample is made of what: every answer is a function of the seed and the sample's number alone.

So a run is resumed with one integer, by any number of processes and workers, and no order is kept in memory.
"""

from collections.abc import Sequence
from math import isqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.ul2.mixture import Mixture
from t5g2convert.errors import DataError, UsageError

_SAMPLE, _BLOCK, _CHUNKS, _DOCUMENTS = range(4)
"""Uses of chance. Each has a quarter of Philox' counter to itself, so that equal keys give unlike words."""

ROUNDS: Final = 12
"""Of a permutation. Large ones look random after 4; after 8 some orders of five places still come too often."""

_WORD: Final = (1 << 64) - 1


class Schedule:
    """The order of samples.

    Samples come in blocks in which each task comes as often as its weight says, in an order of the block's own. The
    samples of a block lie side by side in one chunk of the corpus, `chunk` tokens, so that they share nothing and leave
    nothing out. An epoch visits each of the `chunks` chunks once, in an order of its own. The rest of the corpus, less
    than a chunk, is left out, partly before the first chunk and partly behind the last, in each epoch otherwise.

    Args:
        mixture: The tasks.
        raw_lengths: Raw tokens of a sample of each task.
        tokens: Of the corpus.
        seed: 0 to 2**64 - 1.

    Raises:
        DataError: The corpus is smaller than a chunk.
        UsageError: The seed or the number of lengths is wrong.
    """

    def __init__(self, mixture: Mixture, raw_lengths: Sequence[int], tokens: int, seed: int) -> None:
        if not 0 <= seed <= _WORD:
            raise UsageError(f"expected a seed of 0 to {_WORD}, found {seed}")
        if len(raw_lengths) != len(mixture.tasks):
            raise UsageError(f"expected a raw length for each of {len(mixture.tasks)} tasks, found {len(raw_lengths)}")
        self.mixture, self.raw_lengths, self.tokens, self.seed = mixture, tuple(raw_lengths), tokens, seed
        self._cycle = mixture.cycle
        self.chunk = sum(self.raw_lengths[task] for task in self._cycle)
        self.chunks = tokens // self.chunk
        if not self.chunks:
            raise DataError(
                f"the corpus has {tokens} tokens; a block of {len(self._cycle)} samples takes {self.chunk}",
                hint="pack more text, or train with shorter inputs",
            )
        self._last: tuple[int, tuple[int, ...], tuple[int, ...]] | None = None

    def task(self, i: int) -> int:
        """The task of sample i, by its number in the mixture."""
        block, slot = self._place(i)
        return self._block(block)[0][slot]

    def stretch(self, i: int) -> tuple[int, int]:
        """The text of sample i: tokens [start, stop) of the corpus."""
        block, slot = self._place(i)
        tasks, starts = self._block(block)
        return starts[slot], starts[slot] + self.raw_lengths[tasks[slot]]

    def rng(self, i: int) -> np.random.Generator:
        """The generator of sample i, Philox keyed by seed and number."""
        self._place(i)
        return np.random.Generator(_philox(self.seed, i, _SAMPLE))

    def _place(self, i: int) -> tuple[int, int]:
        """The block of a sample, and its place therein."""
        return divmod(_number(i), len(self._cycle))

    def _block(self, block: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The tasks of a block's samples, and where their texts start."""
        # Samples of a block are asked for one after the other: the last block is kept.
        last = self._last
        if last is None or last[0] != block:
            keys = _words(_philox(self.seed, block, _BLOCK), len(self._cycle))
            tasks = tuple(self._cycle[slot] for slot in np.argsort(keys, kind="stable").tolist())
            epoch, place = divmod(block, self.chunks)
            source = _philox(self.seed, epoch, _CHUNKS)
            starts = [permuted(place, self.chunks, source) * self.chunk + self._offset(source)]
            for task in tasks[:-1]:
                starts.append(starts[-1] + self.raw_lengths[task])
            last = self._last = (block, tasks, tuple(starts))
        return last[1:]

    def _offset(self, source: np.random.Philox) -> int:
        """Where the first chunk of an epoch starts."""
        return int(_words(source, 1)[0]) % (self.tokens - self.chunks * self.chunk + 1)


def document_of(seed: int, i: int, count: int) -> int:
    """The document of the i-th sample of `count` documents with images: each once in an epoch of them.

    Raises:
        DataError: There are none.
        UsageError: There is no such sample.
    """
    if count < 1:
        raise DataError("expected documents with images, found none")
    epoch, place = divmod(_number(i), count)
    return permuted(place, count, _philox(seed, epoch, _DOCUMENTS))


def permuted(place: int, count: int, source: np.random.Philox) -> int:
    """Where a permutation of 0 to count - 1, chosen by `source`, takes `place`; in constant memory.

    A Feistel network over a grid that is hardly larger than `count`: a place is a pair (row, column), and each round
    moves one of them by an amount that depends on the other, which can be undone. Where it leads out of the range, it
    is applied again until it is back, which keeps it a permutation.
    """
    rows = isqrt(count - 1) + 1
    columns = -(-count // rows)
    keys = _words(source, ROUNDS).tolist()
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
    """A word that depends on every bit of both: the finaliser of SplitMix64 (Steele, Lea, Flood 2014)."""
    word = (key + value * 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _number(i: int) -> int:
    """The number of a sample, in range; numpy's have no divmod that keeps them whole."""
    if not 0 <= i <= _WORD:
        raise UsageError(f"expected the number of a sample, 0 to {_WORD}, found {i}")
    return int(i)


def _philox(seed: int, number: int, use: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, number], np.uint64), counter=np.array([0, 0, 0, use], np.uint64))


def _words(source: np.random.Philox, count: int) -> NDArray[np.uint64]:
    """The next raw words; their sequence is the same in every numpy."""
    return source.random_raw(count)
