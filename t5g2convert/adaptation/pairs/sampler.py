"""The order of pairs, as a function of the seed and a sample's number, and the pairs that are held out."""

from collections.abc import Sequence
from fractions import Fraction
from typing import Protocol

from t5g2convert.adaptation.ul2.permutation import (
    HELD_OUT,
    PAIR_SHARES,
    PAIRS,
    permutation_keys,
    permuted,
    philox,
    sample_number,
    words,
)
from t5g2convert.adaptation.ul2.shares import Shares


class Order(Protocol):
    """An order of pairs."""

    def pair(self, i: int) -> tuple[int, int]:
        """Return the corpus of sample i, and the number of its pair there."""


class PairSampler:
    """The order in which pairs are trained: each epoch has every pair of a corpus once, those held out excepted.

    The pairs of a corpus are divided once, by a permutation: its first pairs are held out. Each epoch has its own
    permutation of the others.

    Args:
        counts: Pairs of each corpus.
        weights: The weight of each corpus: its share of the pairs that are drawn. Corpora without pairs have none.
        held_out: Pairs of each corpus that are held out; fewer than it has.
        seed: 0 to 2**64 - 1.
    """

    def __init__(
        self, counts: Sequence[int], weights: Sequence[Fraction], held_out: Sequence[int], *, seed: int
    ) -> None:
        self._seed, self._counts, self._held = seed, tuple(counts), tuple(held_out)
        self._corpora = [number for number, count in enumerate(counts) if count]
        chosen = [weights[number] for number in self._corpora]
        self._shares = Shares(chosen, words(philox(seed, 0, PAIR_SHARES), len(chosen)).tolist())
        self.shares = dict(zip(self._corpora, self._shares.shares, strict=True))
        """The share of each corpus that has pairs."""

    @property
    def trained(self) -> dict[int, int]:
        """The number of pairs of each corpus that are trained."""
        return {number: self._counts[number] - self._held[number] for number in self._corpora}

    def pair(self, i: int) -> tuple[int, int]:
        """Return the corpus of sample i, and the number of its pair there.

        Raises:
            UsageError: The number is out of range.
        """
        which, number = self._shares.draw(sample_number(i))
        corpus = self._corpora[which]
        count = self._counts[corpus] - self._held[corpus]
        epoch, place = divmod(number, count)
        place = permuted(place, count, permutation_keys(self._seed, epoch, PAIRS, corpus=corpus))
        return corpus, self._divided(corpus, self._held[corpus] + place)

    def held_out(self, corpus: int) -> list[int]:
        """Return the numbers of the pairs of a corpus that are held out."""
        return [self._divided(corpus, place) for place in range(self._held[corpus])]

    def _divided(self, corpus: int, place: int) -> int:
        keys = permutation_keys(self._seed, 0, HELD_OUT, corpus=corpus)
        return permuted(place, self._counts[corpus], keys)


class FixedOrder:
    """Pairs of one corpus, in a given order.

    Args:
        numbers: The numbers of the pairs.
        corpus: The corpus.
    """

    def __init__(self, numbers: Sequence[int], corpus: int = 0) -> None:
        self._numbers, self._corpus = numbers, corpus

    def pair(self, i: int) -> tuple[int, int]:
        """Return the corpus, and the number of pair i."""
        return self._corpus, self._numbers[i]


def chosen(count: int, most: int, *, seed: int) -> list[int]:
    """Return at most `most` of `count` pairs, chosen by the seed."""
    keys = permutation_keys(seed, 0, HELD_OUT)
    return [permuted(place, count, keys) for place in range(min(most, count))]
