"""Pieces of tensors in a distributed checkpoint: where their numbers lie, read as bytes, a few rows at a time.

A piece is what `torch.save` writes of one tensor: a zip archive of the numbers and a pickle, which is read as data.
"""

import io
import math
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray

from t5g2convert.adaptation.train.pickles import Made, Name, Stored, read_pickle
from t5g2convert.checkpoint.file_store import regular_file
from t5g2convert.errors import CheckpointError
from t5g2convert.interrupts import raise_interruption

BLOCK_ELEMENTS: Final = 1 << 20
"""Numbers that are read at once; a row at least."""

MAX_PICKLE_BYTES: Final = 1 << 16
"""Largest description of one piece; torch writes some 200 bytes."""

MAX_DIMENSIONS: Final = 8
MAX_EXTENT: Final = 1 << 48
"""Largest size of a dimension, and largest place in a file."""

SIZE: Final = Name("torch", "Size")
_REBUILT: Final = Name("torch._utils", "_rebuild_tensor_v2")
_FLOATS: Final = Name("torch", "FloatStorage")
_NAMED: Final = frozenset({_REBUILT, _FLOATS, Name("collections", "OrderedDict")})
"""What a piece names: a tensor of float32, and hooks, of which there are none."""


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a tensor: its first index and extent in every dimension, and where it was saved."""

    first: tuple[int, ...]
    shape: tuple[int, ...]
    file: Path
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class SavedTensor:
    """A tensor of a checkpoint: its shape, its dtype, and the pieces that it was saved in."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[Piece, ...]

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Its numbers, in order: whole rows, as many as make about `BLOCK_ELEMENTS`; float32 alone.

        Raises:
            CheckpointError: A file cannot be read, or is damaged.
        """
        rows, width = (self.shape[0], self.shape[1:]) if self.shape else (1, ())
        step = max(1, BLOCK_ELEMENTS // max(1, math.prod(width)))
        places = [(piece, located(piece, self.name)) for piece in self.pieces]
        for start in range(0, rows, step):
            block = np.full((min(step, rows - start), *width), np.nan, np.float32)
            for piece, numbers in places:
                _fill(block, start, piece, numbers)
            yield block


def place(value: Any) -> int:
    """A size, or a place in a file.

    Raises:
        ValueError: It is none.
    """
    if type(value) is not int or not 0 <= value <= MAX_EXTENT:
        raise ValueError("a size or a place is not a whole number that makes sense")
    return value


def extents(value: Any) -> tuple[int, ...]:
    """A torch.Size, or a tuple in its place.

    Raises:
        ValueError: It is none.
    """
    if isinstance(value, Made) and value.of == SIZE and len(value.arguments) == 1:
        value = value.arguments[0]
    if not isinstance(value, tuple | list) or len(value) > MAX_DIMENSIONS:
        raise ValueError("a shape is not one")
    return tuple(place(extent) for extent in value)


class _Slice(io.RawIOBase):
    """A range of a file, as a file."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._file, self._start, self._size, self._at = path.open("rb"), start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        room = memoryview(buffer)[: max(0, self._size - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(room)
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@dataclass(frozen=True, slots=True)
class Numbers:
    """Where the numbers of a piece lie: a file, the bytes in it, and the first number's place and the strides there."""

    file: Path
    start: int
    size: int
    offset: int
    strides: tuple[int, ...]
    shape: tuple[int, ...]

    def mapped(self) -> NDArray[np.float32]:
        """They, where they are: nothing is read before it is looked at, or kept when the array is dropped."""
        if not self.size:
            return np.empty(self.shape, np.float32)
        flat = np.memmap(self.file, np.dtype("<f4"), "r", self.start, (self.size // 4,))
        strides = [4 * stride for stride in self.strides]
        return np.lib.stride_tricks.as_strided(flat[self.offset :], self.shape, strides, writeable=False)


def located(piece: Piece, name: str) -> Numbers:
    """Where the numbers of a piece lie.

    Raises:
        CheckpointError: The file cannot be read, or is damaged there.
    """
    if not math.prod(piece.shape):
        return Numbers(piece.file, 0, 0, 0, (), piece.shape)
    try:
        if piece.start + piece.size > regular_file(piece.file).stat().st_size:
            raise ValueError("the file is too short")
        with _Slice(piece.file, piece.start, piece.size) as file:
            archive = zipfile.ZipFile(cast(IO[bytes], file))
            record, described = (_record(archive, ending) for ending in ("/data/0", "/data.pkl"))
            if described.file_size > MAX_PICKLE_BYTES:
                raise ValueError("its description is too long")
            tensor = read_pickle(archive.read(described), _NAMED.__contains__)
            # Behind the fixed part of the record's own header there are its name and a padding.
            file.seek(record.header_offset)
            header = file.read(30) or b""
            start = record.header_offset + 30 + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        offset, shape, strides = _layout(tensor)
        if shape != piece.shape or len(strides) != len(shape):
            raise ValueError("its shape is another")
        reach = sum((extent - 1) * stride for extent, stride in zip(shape, strides, strict=True))
        inside = record.header_offset >= 0 and start + record.file_size <= piece.size
        if not inside or 4 * (offset + reach + 1) > record.file_size:
            raise ValueError("it is too short")
    except (OSError, ValueError, LookupError, RuntimeError, EOFError, zipfile.BadZipFile) as error:
        raise_interruption()
        raise CheckpointError(f"a piece of {name} cannot be read: {error}", where=piece.file) from None
    return Numbers(piece.file, piece.start + start, record.file_size, offset, strides, piece.shape)


def _record(archive: zipfile.ZipFile, ending: str) -> zipfile.ZipInfo:
    """The one record whose name ends so; torch compresses none."""
    found = [item for item in archive.infolist() if item.filename.endswith(ending)]
    if len(found) != 1 or found[0].compress_type != zipfile.ZIP_STORED:
        raise ValueError(f"it does not have one record {ending}")
    return found[0]


def _layout(tensor: Any) -> tuple[int, tuple[int, ...], tuple[int, ...]]:
    """The first number's place, the shape and the strides of a tensor, as torch.save describes one of float32."""
    if not isinstance(tensor, Made) or tensor.of != _REBUILT or len(tensor.arguments) < 4:
        raise ValueError("it is not a tensor")
    arguments: Sequence[Any] = tensor.arguments
    key = arguments[0].key if isinstance(arguments[0], Stored) else None
    if not isinstance(key, tuple) or len(key) < 2 or key[0] != "storage" or key[1] != _FLOATS:
        raise ValueError("its dtype is another")
    return place(arguments[1]), extents(arguments[2]), extents(arguments[3])


def _fill(block: NDArray[np.float32], start: int, piece: Piece, numbers: Numbers) -> None:
    """Copy what a piece has of the rows from `start` on."""
    if not piece.shape:
        block[:] = numbers.mapped()
        return
    begin, end = max(start, piece.first[0]), min(start + len(block), piece.first[0] + piece.shape[0])
    if begin < end:
        columns = tuple(slice(at, at + size) for at, size in zip(piece.first[1:], piece.shape[1:], strict=True))
        block[(slice(begin - start, end - start), *columns)] = numbers.mapped()[
            begin - piece.first[0] : end - piece.first[0]
        ]
