"""Sentinels: the token ids that replace spans, a descending run of unused ids near the end of the vocabulary.

The k-th span of a sample, counted from 0, is replaced by `first - k`. If the run is too short for all spans, that is an
error: clamping or wrapping would lose text.

Google's models begin with `<unused6237>`, id 262139 of Gemma 3's vocabulary, and descend from there (notebook
Research/[T5Gemma_2]Example.ipynb in google-gemma/cookbook). It is not established what 262140 to 262143 are for.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Self

from t5g2convert.checkpoint.families.t5gemma2 import FIRST_SENTINEL
from t5g2convert.errors import DataError

SHOWN_IDS = 5
"""Offending ids listed in an error."""


@dataclass(frozen=True, slots=True)
class Sentinels:
    """The ids `first`, `first - 1`, ..., `count` of them."""

    first: int
    count: int

    def __post_init__(self) -> None:
        if not 0 <= self.count <= self.first + 1:
            raise DataError(f"expected 0 to {self.first + 1} sentinels from id {self.first} down, got {self.count}")

    def __contains__(self, token: int) -> bool:
        return self.first - self.count < token <= self.first

    @property
    def last(self) -> int:
        """The lowest id of the run."""
        return self.first - self.count + 1

    @classmethod
    def available(cls, *, vocabulary: int, reserved: Collection[int], first: int | None = None) -> Self:
        """Return a run of ids below `vocabulary` that are not reserved: 262143 to 256002 for Gemma 3.

        Args:
            vocabulary: Rows of the embedding table.
            reserved: Ids that cannot be sentinels.
            first: The highest id of the run; by default, the highest that is not reserved.
        """
        if first is None:
            first = vocabulary - 1
            while first in reserved:
                first -= 1
        below = max((token for token in reserved if token < first), default=-1)
        return cls(first, first - below)

    @classmethod
    def of(cls, *, vocabulary: int, reserved: Collection[int], needed: int, first: int | None = None) -> Self:
        """Return the `needed` highest ids of a run without a reserved id.

        Args:
            vocabulary: Rows of the embedding table.
            reserved: Ids that cannot be sentinels: bos, eos, pad, the image tokens, mode tokens.
            needed: Most spans of a sample, from `needed_sentinels`.
            first: The highest id; by default, the highest that is not reserved.

        Raises:
            DataError: The run is too short.
        """
        run = cls.available(vocabulary=vocabulary, reserved=reserved, first=first)
        if run.count < needed:
            raise DataError(
                f"samples of these lengths need {needed} sentinels, but {run.count} are available: "
                f"{_range(run)} of a vocabulary of {vocabulary}",
                hint="reduce the lengths, or use a mixture with longer spans",
            )
        return cls(run.first, needed)


@dataclass(frozen=True, slots=True)
class FirstSentinel:
    """The first sentinel: its id, and its name in the tokenizer or otherwise its id, as a run records it."""

    id: int
    recorded: str | int

    @classmethod
    def find(
        cls, wanted: str | int | None, names: Mapping[str, int], *, vocabulary: int, reserved: Collection[int]
    ) -> Self:
        """Find the first sentinel of a mixture in a tokenizer.

        Args:
            wanted: Its name or id; None for that of Google's models, or, in a tokenizer without it, for the highest id
                that is not reserved.
            names: The ids of the tokenizer's tokens, by name.
            vocabulary: Rows of the embedding table.
            reserved: Ids that cannot be sentinels.

        Raises:
            DataError: The tokenizer does not have the token, the table has no row for it, or it is reserved.
        """
        if wanted is None:
            wanted = FIRST_SENTINEL
            if names.get(wanted) not in range(vocabulary):
                wanted = Sentinels.available(vocabulary=vocabulary, reserved=reserved).first
        found = names.get(wanted) if isinstance(wanted, str) else wanted
        if found is None:
            raise DataError(f"the tokenizer has no token {wanted}, the mixture's first_sentinel")
        if found >= vocabulary or found in reserved:
            fault = "a reserved token" if found in reserved else f"beyond the table of {vocabulary} rows"
            raise DataError(f"the mixture's first_sentinel, id {found}, is {fault}", hint="choose an unused token")
        named = next((name for name, token in names.items() if token == found), None)
        return cls(found, found if named is None else named)


def check_reserved(
    sentinels: Sentinels,
    *,
    special: Mapping[str, int],
    mode_tokens: Collection[int] = (),
    highest: int,
    occurrences: Mapping[int, int],
    absent: Collection[str] = (),
) -> None:
    """Refuse sentinels, special tokens and mode tokens that collide with each other or with the data.

    Args:
        sentinels: The sentinels of the samples.
        special: Ids of the model's special tokens by name: bos, eos, pad, boi, eoi, image.
        mode_tokens: Mode tokens of the mixture.
        highest: Highest token id in the data.
        occurrences: Occurrences by id in the data, for all ids from the last sentinel on and for special and mode
            tokens; absent ids do not occur.
        absent: Names of special tokens that must not occur in the data.

    Raises:
        DataError: Ids collide; the message names them.
    """
    _check_apart(sentinels, special, mode_tokens)
    among = {token for token in (highest, *occurrences) if token in sentinels}
    taken = dict.fromkeys(among, f"a sentinel, {_range(sentinels)}")
    taken |= dict.fromkeys(mode_tokens, "a mode token")
    taken |= {special[name]: f"{name}, which must not occur in this data" for name in absent}
    found = sorted((token for token in taken if occurrences.get(token) or token == highest), reverse=True)
    if found:
        others = f", and {_counted(len(found) - 1, 'more such id')}" if len(found) > 1 else ""
        known = [token for token in found if token in occurrences]
        raise DataError(
            f"token {found[0]} of the data is {taken[found[0]]}{others}",
            hint="pack the text without special tokens, or choose unused ids for mode tokens",
            details=[f"id {token} occurs {_counted(occurrences[token], 'time')}" for token in known[:SHOWN_IDS]],
        )


def _check_apart(sentinels: Sentinels, special: Mapping[str, int], mode_tokens: Collection[int]) -> None:
    """Refuse ids with two meanings."""
    names = {token: name for name, token in special.items()}
    for token in names:
        if token in sentinels:
            raise DataError(f"{names[token]}, id {token}, is among the sentinels, {_range(sentinels)}")
    for token in mode_tokens:
        if token in sentinels or token in names:
            other = names.get(token, "a sentinel")
            raise DataError(f"the mode token {token} is also {other}", hint="choose an unused id")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _range(sentinels: Sentinels) -> str:
    if not sentinels.count:
        return "no id"
    return f"ids {sentinels.last} to {sentinels.first}"
