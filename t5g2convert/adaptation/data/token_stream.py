"""Files of packed data as memory-mapped arrays: concatenated tokens in shards, and tables of fixed rows."""

import math
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.index import INDEX_FILE, StreamEntry, check_regular
from t5g2convert.errors import DataError

TOKEN: Final = np.dtype("<u4")
END: Final = np.dtype("<u8")


class TokenStream:
    """Concatenated documents in memory-mapped shards.

    Args:
        folder: The folder of packed data.
        name: Prefix of the file names: `text` or `image`.
        entry: The entry in the index.

    Raises:
        DataError: A file is missing or has another size.
    """

    def __init__(self, folder: Path, name: str, entry: StreamEntry) -> None:
        self.tokens = entry.tokens
        total = sum(shard.tokens for shard in entry.shards)
        if total != entry.tokens:
            raise DataError(
                f"the shards of {name} have {total} tokens, but the index says {entry.tokens}",
                where=folder / INDEX_FILE,
            )
        self.paths = tuple(folder / shard_name(name, number) for number in range(len(entry.shards)))
        self._shards = [
            mapped_array(path, TOKEN, (shard.tokens,)) for path, shard in zip(self.paths, entry.shards, strict=True)
        ]
        self._starts = np.cumsum([0, *(shard.tokens for shard in entry.shards)])

    def read(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Return a copy of the tokens from `start` to `stop`, [stop - start].

        Raises:
            IndexError: The range is out of bounds.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens}")
        result = np.empty(stop - start, dtype=np.uint32)
        position = start
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while position < stop:
            end = min(stop, int(self._starts[number + 1]))
            first = int(self._starts[number])
            result[position - start : end - start] = self._shards[number][position - first : end - first]
            position, number = end, number + 1
        return result


def shard_name(stream: str, number: int) -> str:
    """Return the file name of a shard of tokens or of images."""
    return f"{stream}-{number:05d}.bin"


def check_size(path: Path, expected: int) -> None:
    """Refuse a file that is not regular, or has another size than the index says.

    Raises:
        DataError: It is missing, not a regular file, or has another size.
    """
    check_regular(path)
    try:
        size = path.stat().st_size
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None
    if size != expected:
        raise DataError(
            f"has {size} bytes, but the index says {expected}", where=path, hint="copy it again, or pack the data again"
        )


def mapped_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Memory-map a file as an array, and refuse a size that differs from the index."""
    expected = math.prod(shape) * dtype.itemsize
    check_size(path, expected)
    try:
        # An empty file cannot be mapped.
        return np.memmap(path, dtype, "r", shape=shape) if expected else np.empty(shape, dtype)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None
