"""The closed set of operations that make a target tensor from the source tensor of its row.

A row has an operation under the key `op`, like `op: {take_rows: vocab}`; without `op` it is a copy. Each class is the
schema of its operation and the rule for the target's shape; `conversion` has one rule for the bytes of each class (a
test compares them).
"""

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Size = Annotated[int, Field(ge=0)] | str
"""A size in a map: a number, or the name of a dimension."""


def _only_true(value: bool) -> bool:
    if not value:
        raise ValueError("expected true; leave the operation out for a copy")
    return value


class Operation(BaseModel):
    """The base of all operations."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    carries: ClassVar[bool] = True
    """Whether the row accounts for the source tensor; if False, another row must use it too."""

    def target_shape(self, source: tuple[Size, ...]) -> tuple[Size, ...]:
        """Return the target's shape for the row's `shape`."""
        return source

    def sizes(self) -> Iterator[Size]:
        """Yield the sizes that the operation itself names."""
        yield from ()


class Copy(Operation):
    """All values unchanged, cast first if the conversion changes the dtype."""


class TakeRows(Operation):
    """The first rows of a table, `take_rows: COUNT`; the other rows are not used."""

    take_rows: Size

    def target_shape(self, source: tuple[Size, ...]) -> tuple[Size, ...]:
        return (self.take_rows, *source[1:])

    def sizes(self) -> Iterator[Size]:
        yield self.take_rows


class ScaledRow(Operation):
    """One row of a table times the square root of its width, `scaled_row: TOKEN`, rounded as the source model rounds.

    If the table lacks the row, the result is a vector of zeros.
    """

    carries: ClassVar[bool] = False

    scaled_row: Size

    def target_shape(self, source: tuple[Size, ...]) -> tuple[Size, ...]:
        return source[1:]

    def sizes(self) -> Iterator[Size]:
        yield self.scaled_row


class Zeros(Operation):
    """A tensor of zeros, `zeros: true`; the row has no `from`."""

    carries: ClassVar[bool] = False

    zeros: Annotated[bool, AfterValidator(_only_true)]


class AlignedWith(BaseModel):
    """The target width of an aligned matrix, and the tables from which it is computed."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    to: Size = Field(description="Width of the result.")
    tables: str = Field(description="Pattern of the embedding table of both donor and source.")


class Aligned(Operation):
    """A donor's projector mapped into the source's space, `aligned: {to: WIDTH, tables: PATTERN}`.

    The linear map between the spaces is the least-squares fit of one embedding table to the other.
    """

    aligned: AlignedWith

    def target_shape(self, source: tuple[Size, ...]) -> tuple[Size, ...]:
        return (*source[:-1], self.aligned.to)

    def sizes(self) -> Iterator[Size]:
        yield self.aligned.to


AnyOperation = TakeRows | ScaledRow | Zeros | Aligned
"""The values of `op:`; a row without it is a `Copy`."""
