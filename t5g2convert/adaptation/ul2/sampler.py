"""The order of samples: which task and which text each sample has, as a function of the seed and its number.

A run therefore resumes from one integer, with any number of processes and workers, and keeps no order in memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Final

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.ul2.mixture import Mixture
from t5g2convert.errors import DataError, UsageError

_SAMPLE, _BLOCK, _CHUNKS, _DOCUMENTS = range(4)
"""Uses of randomness. Each has its own quarter of Philox' counter, so that equal keys give different words."""

ROUNDS: Final = 12
"""Rounds of a permutation. Large ones look random after 4; after 8 some orders of five items are still too frequent."""

_WORD: Final = (1 << 64) - 1


class Sampler:
    """The order of samples.

    Samples come in blocks. A block has as many samples of each task as its weight, in random order. The corpus is cut
    into `chunks` chunks of `chunk` tokens, and each chunk into as many texts as a block has samples, one for each. An
    epoch reads every text of every chunk once: each place in the chunk has its own random order of the chunks, so that
    the texts of a block, and of a step, come from all over the corpus. Without that, a step would read a few documents
    in long runs. The order of the texts in the chunks differs by epoch. The rest of the corpus, less than a chunk, is
    skipped: some of it before the first chunk and some after the last, differently in each epoch.

    Args:
        mixture: The tasks.
        raw_lengths: Raw tokens per sample, by task.
        tokens: Tokens in the corpus.
        seed: 0 to 2**64 - 1.

    Raises:
        DataError: The corpus is smaller than a chunk.
        UsageError: The seed or the number of lengths is wrong.
    """

    def __init__(self, mixture: Mixture, raw_lengths: Sequence[int], tokens: int, seed: int) -> None:
        if not 0 <= seed <= _WORD:
            raise UsageError(f"seed must be between 0 and {_WORD}, got {seed}")
        if len(raw_lengths) != len(mixture.tasks):
            raise UsageError(f"expected {len(mixture.tasks)} raw lengths, one per task, got {len(raw_lengths)}")
        self.mixture, self.raw_lengths, self.tokens, self.seed = mixture, tuple(raw_lengths), tokens, seed
        self._cycle = mixture.cycle
        self.chunk = sum(self.raw_lengths[task] for task in self._cycle)
        self.chunks = tokens // self.chunk
        if not self.chunks:
            raise DataError(
                f"the corpus has {tokens} tokens, but a block of {len(self._cycle)} samples needs {self.chunk}",
                hint="pack more text, or reduce --encoder-length and --decoder-length",
            )
        # Samples are read in order, so keeping the last block and epoch suffices.
        self._last_block: tuple[int, tuple[int, ...]] | None = None
        self._last_epoch: _Epoch | None = None

    def task(self, i: int) -> int:
        """Return the task of sample i, by its number in the mixture."""
        block, place = self._place(i)
        return self._cycle[self._slots(block)[place]]

    def text_range(self, i: int) -> tuple[int, int]:
        """Return the text of sample i: tokens [start, stop) of the corpus."""
        block, place = self._place(i)
        slot = self._slots(block)[place]
        number, at = divmod(block, self.chunks)
        epoch = self._epoch(number)
        start = permuted(at, self.chunks, epoch.keys[slot]) * self.chunk + epoch.starts[slot]
        return start, start + self.raw_lengths[self._cycle[slot]]

    def rng(self, i: int) -> np.random.Generator:
        """Return the random generator of sample i: Philox, keyed by seed and number."""
        self._place(i)
        return np.random.Generator(_philox(self.seed, i, _SAMPLE))

    def _place(self, i: int) -> tuple[int, int]:
        """Return the block of a sample, and its place in the block."""
        return divmod(_number(i), len(self._cycle))

    def _slots(self, block: int) -> tuple[int, ...]:
        """Return the slots of the cycle in the order in which a block has them."""
        if self._last_block is None or self._last_block[0] != block:
            keys = _words(_philox(self.seed, block, _BLOCK), len(self._cycle))
            self._last_block = block, tuple(np.argsort(keys, kind="stable").tolist())
        return self._last_block[1]

    def _epoch(self, number: int) -> "_Epoch":
        if self._last_epoch is None or self._last_epoch.number != number:
            source, count = _philox(self.seed, number, _CHUNKS), len(self._cycle)
            offset = int(_words(source, 1)[0]) % (self.tokens - self.chunks * self.chunk + 1)
            starts = [0] * count
            for slot in np.argsort(_words(source, count), kind="stable").tolist():
                starts[slot] = offset
                offset += self.raw_lengths[self._cycle[slot]]
            keys = tuple(_words(source, ROUNDS).tolist() for _ in range(count))
            self._last_epoch = _Epoch(number, tuple(starts), keys)
        return self._last_epoch


@dataclass(frozen=True, slots=True)
class _Epoch:
    """An epoch: by slot of the cycle, where its text starts in the first chunk, and the keys of its order of chunks."""

    number: int
    starts: tuple[int, ...]
    keys: tuple[list[int], ...]


def document_of(seed: int, i: int, count: int) -> int:
    """Return the document of image sample i, among `count`; an epoch visits each once.

    Raises:
        DataError: There are no documents.
        UsageError: The number is out of range.
    """
    if count < 1:
        raise DataError("expected documents with images, found none")
    epoch, place = divmod(_number(i), count)
    return permuted(place, count, _words(_philox(seed, epoch, _DOCUMENTS), ROUNDS).tolist())


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
    word = (key + value * 0x9E3779B97F4A7C15) & _WORD
    word = ((word ^ (word >> 30)) * 0xBF58476D1CE4E5B9) & _WORD
    word = ((word ^ (word >> 27)) * 0x94D049BB133111EB) & _WORD
    return word ^ (word >> 31)


def _number(i: int) -> int:
    """Return a sample's number as a Python int, in range: divmod of numpy's unsigned integers does not stay exact."""
    if not 0 <= i <= _WORD:
        raise UsageError(f"sample number must be between 0 and {_WORD}, got {i}")
    return int(i)


def _philox(seed: int, number: int, use: int) -> np.random.Philox:
    return np.random.Philox(key=np.array([seed, number], np.uint64), counter=np.array([0, 0, 0, use], np.uint64))


def _words(source: np.random.Philox, count: int) -> NDArray[np.uint64]:
    """Return the next raw words; their sequence is the same in every version of numpy."""
    return source.random_raw(count)
