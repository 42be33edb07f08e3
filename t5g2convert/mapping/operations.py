"""The closed set of operations: how a target tensor's bytes come about from the source tensor that its row names.

An operation stands in a row as one key, `op: {take_rows: vocab}`; a row without `op` is a copy. Each class is both the
schema of that key and the rule for the target's shape; the bytes are made by `conversion.contents`, which has one rule
for each class (a test compares the two lists).
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Size = Annotated[int, Field(ge=0)] | str
"""A size in a map: a number, or the name of a dimension."""


def _only_true(value: bool) -> bool:
    if not value:
        raise ValueError("expected true; without zeros leave the operation out")
    return value


class Operation(BaseModel):
    """What all operations share."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    carries: ClassVar[bool] = True
    """Whether the source tensor is accounted for by this row (False: it is only looked at)."""

    def target_shape(self, source: tuple[Size, ...]) -> tuple[Size, ...]:
        """The target's shape, from the row's `shape`."""
        return source

    def sizes(self) -> Iterator[Size]:
        """The sizes that the operation itself names."""
        yield from ()


class Copy(Operation):
    """All bytes as they are (cast first where the conversion changes the dtype)."""


class TakeRows(Operation):
    """The first rows of a table, `take_rows: COUNT`; the rest is left behind."""

    take_rows: Size

    def target_shape(self, source: tuple[Size, ...]) -> tuple[Size, ...]:
        """The first axis becomes the row count."""
        return (self.take_rows, *source[1:])

    def sizes(self) -> Iterator[Size]:
        """The row count."""
        yield self.take_rows


class ScaledRow(Operation):
    """One row of a table times the square root of its width, `scaled_row: TOKEN`, rounded as the source model rounds.

    A vector of zeros where the table has no such row.
    """

    carries: ClassVar[bool] = False

    scaled_row: Size

    def target_shape(self, source: tuple[Size, ...]) -> tuple[Size, ...]:
        """The row axis goes."""
        return source[1:]

    def sizes(self) -> Iterator[Size]:
        """The row's number."""
        yield self.scaled_row


class Zeros(Operation):
    """A constant tensor of zeros that needs no source, `zeros: true`; the row has no `from`."""

    carries: ClassVar[bool] = False

    zeros: Annotated[bool, AfterValidator(_only_true)]


class AlignedWith(BaseModel):
    """Where an aligned matrix leads, and the tables that say how."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    to: Size = Field(description="The width that it leads to.")
    tables: str = Field(description="Pattern of the embedding table, in the donor and in the source.")


class Aligned(Operation):
    """A projector of the donor carried into the source's space, `aligned: {to: WIDTH, tables: PATTERN}`.

    The map between the spaces is the least-squares one between both embedding tables.
    """

    aligned: AlignedWith

    def target_shape(self, source: tuple[Size, ...]) -> tuple[Size, ...]:
        """The last axis becomes the width."""
        return (*source[:-1], self.aligned.to)

    def sizes(self) -> Iterator[Size]:
        """The width."""
        yield self.aligned.to


AnyOperation = TakeRows | ScaledRow | Zeros | Aligned
"""What `op:` may hold; without it a row is a `Copy`."""
