"""Draws from several corpora by weights: which corpus draw n comes from, and how many of its draws came before."""

from collections.abc import Sequence
from fractions import Fraction


class Shares:
    """The corpus of each draw of a sequence.

    Of the first n draws, floor(n * s + phase) come from the first corpus, where s is its share of all weights. The
    other draws are divided in the same way among the other corpora. Therefore any n draws from the start contain
    n times its share of each corpus, with a difference of less than the number of corpora (of less than 1 for two).

        >>> shares = Shares([Fraction(2), Fraction(1)], phases=[0, 0])
        >>> [shares.draw(n) for n in range(6)]
        [(1, 0), (0, 0), (0, 1), (1, 1), (0, 2), (0, 3)]

    Args:
        weights: The weight of each corpus; each is positive.
        phases: A random word for each corpus, 0 to 2**64 - 1.
    """

    def __init__(self, weights: Sequence[Fraction], phases: Sequence[int]) -> None:
        self.shares = tuple(weight / sum(weights) for weight in weights)
        self._parts: list[tuple[int, int, int]] = []
        rest = Fraction(1)
        for share, phase in zip(self.shares, phases, strict=True):
            part = share / rest
            self._parts.append((part.numerator, part.denominator, part.denominator * phase >> 64))
            rest -= share

    def draw(self, number: int) -> tuple[int, int]:
        """Return the corpus of a draw, and how many draws before it came from the same corpus."""
        last = len(self._parts) - 1
        for corpus, (numerator, denominator, phase) in enumerate(self._parts[:last]):
            taken = number * numerator + phase
            before = taken // denominator
            if (taken + numerator) // denominator > before:
                return corpus, before
            number -= before
        return last, number
