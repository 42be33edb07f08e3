"""Equal rows of two embedding tables, read from their files in blocks, as float64."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from t5g2convert.checkpoint.dtypes import element_bytes
from t5g2convert.conversion.write.copy import read_exactly
from t5g2convert.conversion.write.numerics import first_nonfinite, widened
from t5g2convert.errors import CheckpointError
from t5g2convert.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROWS_AT_ONCE: Final = 2048
"""Rows of a block: enough that summing its products costs little compared to computing them."""


@dataclass(frozen=True, slots=True)
class Table:
    """An embedding table in an open safetensors file.

    Attributes:
        tensor: Its name.
        dtype: Its safetensors dtype: BF16, F16 or F32.
        rows: Number of rows, one per token.
        width: Number of columns.
        file: Name of the file.
        fd: Descriptor of the file.
        start: First byte of the table in the file.
    """

    tensor: str
    dtype: str
    rows: int
    width: int
    file: str
    fd: int
    start: int

    @property
    def where(self) -> str:
        """The table, for errors."""
        return f"{self.file}, tensor {self.tensor}"


def paired_blocks(
    donor: Table, target: Table, rows: int, progress: Progress
) -> Iterator[tuple["NDArray[np.float64]", "NDArray[np.float64]"]]:
    """Yield the same rows of both tables, [n, donor width] and [n, width]; the next block reuses the arrays.

    Raises:
        CheckpointError: A table cannot be read, or holds NaN or infinity.
    """
    import numpy as np

    tables = donor, target
    raw = [bytearray(ROWS_AT_ONCE * table.width * element_bytes(table.dtype)) for table in tables]
    blocks = [np.empty((ROWS_AT_ONCE, table.width)) for table in tables]
    for first in range(0, rows, ROWS_AT_ONCE):
        count = min(ROWS_AT_ONCE, rows - first)
        for table, memory, block in zip(tables, raw, blocks, strict=True):
            row_bytes = table.width * element_bytes(table.dtype)
            data = memoryview(memory)[: count * row_bytes]
            read_exactly(table.fd, data, table.start + first * row_bytes, table.file)
            found = first_nonfinite(data, table.dtype)
            if found is not None:
                row = first + found[0] // table.width
                raise CheckpointError(f"holds {found[1]} in row {row}, expected finite numbers", where=table.where)
            block[:count] = widened(data, table.dtype).reshape(count, table.width)
            progress(len(data))
        yield blocks[0][:count], blocks[1][:count]
