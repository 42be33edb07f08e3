"""The order of samples: which task and which text each sample has, as a function of the seed and its number.

A run therefore resumes from one integer, with any number of processes and workers, and keeps no order in memory.
"""

from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

import numpy as np

from t5g2convert.adaptation.ul2.mixture import Mixture
from t5g2convert.adaptation.ul2.permutation import (
    BLOCK,
    DOCUMENTS,
    IMAGE_SHARES,
    SAMPLE,
    TEXT_SHARES,
    WORD,
    permutation_keys,
    permuted,
    philox,
    sample_number,
    words,
)
from t5g2convert.adaptation.ul2.shares import Shares
from t5g2convert.adaptation.ul2.texts import Chunks, Pieces
from t5g2convert.errors import DataError, UsageError


class Text(NamedTuple):
    """A stretch of text: tokens [start, stop) of a corpus."""

    corpus: int
    start: int
    stop: int


class Sampler:
    """The order of text samples.

    Samples come in blocks. A block has as many samples of each task as its weight, in random order. Texts across
    documents have a sequence of corpora for each slot of the mixture's cycle, pieces of documents one for all; see
    `Shares`, `Chunks` and `Pieces`. The share of a corpus in all samples is such that its share of the tokens is its
    weight.

    Args:
        mixture: The tasks.
        raw_lengths: Most raw tokens of a sample, by task.
        texts: The texts of each corpus that has any, all of one kind.
        weights: The weights of these corpora; by default there is one.
        seed: 0 to 2**64 - 1.

    Raises:
        UsageError: The seed is out of range.
    """

    def __init__(
        self,
        mixture: Mixture,
        raw_lengths: Sequence[int],
        texts: Sequence[Chunks | Pieces],
        *,
        weights: Sequence[Fraction] = (Fraction(1),),
        seed: int,
    ) -> None:
        if not 0 <= seed <= WORD:
            raise UsageError(f"seed must be between 0 and {WORD}, got {seed}")
        self.mixture, self.raw_lengths, self.texts, self.seed = mixture, tuple(raw_lengths), tuple(texts), seed
        self._cycle = mixture.cycle
        self.shares = tuple(weight / sum(weights) for weight in weights)
        """The share of each of these corpora in the tokens that are read."""
        scaled = [share * each.per_epoch / each.read for share, each in zip(self.shares, texts, strict=True)]
        self._shares = [_shares(scaled, seed, number, TEXT_SHARES) for number in range(texts[0].sequences)]
        # Samples are read in order, so keeping the last block suffices.
        self._last_block: tuple[int, tuple[int, ...]] | None = None

    def task(self, i: int) -> int:
        """Return the task of sample i, by its number in the mixture."""
        block, place = self._place(i)
        return self._cycle[self._slots(block)[place]]

    def text(self, i: int) -> Text:
        """Return the text of sample i."""
        texts, slot, number = self._draw(i)
        return Text(texts.corpus, *texts.text(slot, number))

    def length(self, i: int) -> int:
        """Return the number of raw tokens of sample i."""
        texts, slot, number = self._draw(i)
        return texts.length(slot, number)

    def rng(self, i: int) -> np.random.Generator:
        """Return the random generator of sample i: Philox, keyed by seed and number."""
        return np.random.Generator(philox(self.seed, sample_number(i), SAMPLE))

    def epochs(self, samples: int) -> tuple[Fraction, ...]:
        """Return how many times so many samples read each of these corpora."""
        pairs = zip(self._shares[0].shares, self.texts, strict=True)
        return tuple(samples * share / each.per_epoch for share, each in pairs)

    def _draw(self, i: int) -> tuple[Chunks | Pieces, int, int]:
        """Return the texts that a sample is from, and the slot and the number of its text there."""
        block, place = self._place(i)
        slot, number = (self._slots(block)[place], block) if len(self._shares) > 1 else (0, sample_number(i))
        which, number = self._shares[slot].draw(number)
        return self.texts[which], slot, number

    def _place(self, i: int) -> tuple[int, int]:
        """Return the block of a sample, and its place in the block."""
        return divmod(sample_number(i), len(self._cycle))

    def _slots(self, block: int) -> tuple[int, ...]:
        """Return the slots of the cycle in the order in which a block has them."""
        if self._last_block is None or self._last_block[0] != block:
            keys = words(philox(self.seed, block, BLOCK), len(self._cycle))
            self._last_block = block, tuple(np.argsort(keys, kind="stable").tolist())
        return self._last_block[1]


class DocumentSampler:
    """The order of documents with images; an epoch visits each document of a corpus once.

    Args:
        counts: Documents with images of each corpus.
        weights: The weight of each corpus: its share of the documents drawn. Corpora without such documents have none.
        seed: 0 to 2**64 - 1.

    Raises:
        DataError: There are no documents.
    """

    def __init__(self, counts: Sequence[int], weights: Sequence[Fraction] = (Fraction(1),), *, seed: int) -> None:
        if not any(counts):
            raise DataError("expected documents with images, found none")
        self._seed, self._counts = seed, tuple(counts)
        self._corpora = [number for number, count in enumerate(counts) if count]
        shares = _shares([weights[number] for number in self._corpora], seed, 0, IMAGE_SHARES)
        self._shares = shares
        self.shares = dict(zip(self._corpora, shares.shares, strict=True))
        """The share of each corpus that has such documents."""

    def document(self, i: int) -> tuple[int, int]:
        """Return the corpus of image sample i, and the number of its document there.

        Raises:
            UsageError: The number is out of range.
        """
        which, number = self._shares.draw(sample_number(i))
        corpus = self._corpora[which]
        count = self._counts[corpus]
        epoch, place = divmod(number, count)
        return corpus, permuted(place, count, permutation_keys(self._seed, epoch, DOCUMENTS, corpus=corpus))


def _shares(weights: Sequence[Fraction], seed: int, number: int, use: int) -> Shares:
    return Shares(weights, words(philox(seed, number, use), len(weights)).tolist())
