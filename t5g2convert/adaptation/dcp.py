"""Tensors of a distributed checkpoint (torch.distributed.checkpoint), read by one process, a few rows at a time.

A checkpoint is a folder: `.metadata` says which tensors there are, in which pieces they were saved and where each piece
lies in the `.distcp` files, of which every process wrote its own. A piece is what `torch.save` writes of one tensor.

What is trusted: the numbers, which are the user's own training. Nothing is executed: `.metadata` is a pickle, of which
only the classes are made that describe tensors; of a piece only its shape and strides are unpickled, by torch's own
restricted reader, and its numbers are read as bytes. Links and files that no checkpoint has are refused. `Reader` gives
torch's own loading, into tensors that are spread over processes, the same table of contents.
"""

import io
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from t5g2convert.checkpoint.place import regular_file
from t5g2convert.errors import CheckpointError
from t5g2convert.interrupts import raise_interruption

METADATA_FILE: Final = ".metadata"

BLOCK_ELEMENTS: Final = 1 << 20
"""Numbers that are read at once; a row at least."""

_DATA_FILE: Final = re.compile(r"__\d+_\d+\.distcp")
_BROKEN: Final = (zipfile.BadZipFile, pickle.PickleError)
_METADATA, _PATHS = "torch.distributed.checkpoint.metadata", ("PosixPath", "PurePosixPath")
_ALLOWED: Final = frozenset(
    {
        *((_METADATA, name) for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )),
        ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
        ("torch.serialization", "_get_layout"),
        ("torch", "Size"),
        *((module, name) for module in ("pathlib", "pathlib._local") for name in _PATHS),
    }
)  # fmt: skip
"""What `.metadata` is made of, beside plain values and the names of dtypes; none of it does anything."""


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it names {module}.{name}, which describes no tensor")
        return super().find_class(module, name)


@dataclass(frozen=True, slots=True)
class _Piece:
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
    pieces: tuple[_Piece, ...]

    def blocks(self) -> Iterator[NDArray[np.float32]]:
        """Its numbers, in order: whole rows, as many as make about `BLOCK_ELEMENTS`; float32 alone.

        Raises:
            CheckpointError: A file cannot be read, or is damaged.
        """
        rows, width = (self.shape[0], self.shape[1:]) if self.shape else (1, ())
        step = max(1, BLOCK_ELEMENTS // max(1, int(np.prod(width))))
        places = [(piece, _located(piece, self.name)) for piece in self.pieces]
        for start in range(0, rows, step):
            block = np.full((min(step, rows - start), *width), np.nan, np.float32)
            for piece, numbers in places:
                _fill(block, start, piece, numbers)
            yield block


def read_metadata(folder: Path, root: str, *, beside: frozenset[str] = frozenset()) -> Mapping[str, SavedTensor]:
    """The tensors of a checkpoint that was saved of `{root: {NAME: tensor}, ...}`, by NAME.

    Args:
        folder: The checkpoint.
        root: The key of the dict.
        beside: Names of other files that may be there.

    Raises:
        CheckpointError: It is no checkpoint, is damaged, has links or strange files in it, or nothing under that key.
    """
    _check_files(folder, beside)
    with _opened(folder) as metadata:
        saved = metadata.state_dict_metadata
        keys = [(key, at[1]) for key, at in metadata.planner_data.items() if len(at) == 2 and at[0] == root]
        tensors = {name: _tensor(folder, key, name, saved[key], metadata.storage_data) for key, name in keys}
    if not tensors:
        raise CheckpointError(f"has no tensors under {root!r}", where=folder / METADATA_FILE)
    return tensors


class Reader(FileSystemReader):
    """Torch's reader of a checkpoint folder, for `torch.distributed.checkpoint.load`, that executes nothing.

    Torch unpickles `.metadata` whole, and whatever this calls an object in place of a tensor.

    Args:
        folder: The checkpoint.
        beside: Names of other files that may be there.
    """

    def __init__(self, folder: Path, *, beside: frozenset[str] = frozenset()) -> None:
        super().__init__(folder)
        self._folder, self._beside = folder, beside

    def read_metadata(self) -> Metadata:
        """The table of contents.

        Raises:
            CheckpointError: It is none, or damaged; the folder has links or strange files in it; or not all that was
                saved is tensors.
        """
        _check_files(self._folder, self._beside)
        with _opened(self._folder) as metadata:
            for name, entry in metadata.state_dict_metadata.items():
                if not isinstance(entry, TensorStorageMetadata):
                    raise ValueError(f"{name} is no tensor")
            for index, info in metadata.storage_data.items():
                _check_place(index.fqn, info)
            metadata.storage_meta = StorageMeta(load_id=self.load_id)
        return metadata


@contextmanager
def _opened(folder: Path) -> Iterator[Any]:
    """The table of contents; what goes wrong with it, here or in the block, is told as the file's."""
    path = folder / METADATA_FILE
    try:
        with regular_file(path).open("rb") as file:
            metadata = _Unpickler(file).load()
        yield metadata
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
    except (pickle.UnpicklingError, EOFError, AttributeError, LookupError, TypeError, ValueError) as error:
        raise CheckpointError(f"is no metadata of a distributed checkpoint: {error}", where=path) from None


def _check_files(folder: Path, beside: frozenset[str]) -> None:
    try:
        items = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=folder) from None
    for item in items:
        if item.is_symlink() or not item.is_file():
            raise CheckpointError("is a link or no file, which a checkpoint has none of", where=item)
        if item.name not in {METADATA_FILE, *beside} and _DATA_FILE.fullmatch(item.name) is None:
            raise CheckpointError("is no file of a checkpoint", where=item, hint="move it elsewhere")


def _tensor(folder: Path, key: str, name: str, saved: Any, storage: Mapping[Any, Any]) -> SavedTensor:
    """One tensor of the metadata; raises what `read_metadata` turns into its own error."""
    places = {tuple(index.offset): info for index, info in storage.items() if index.fqn == key}
    shape = tuple(saved.size)
    pieces = []
    for chunk in saved.chunks:
        first, extent = tuple(chunk.offsets), tuple(chunk.sizes)
        info = places[first] if places else None
        if info is None:
            raise ValueError(f"{name} lies nowhere")
        _check_place(name, info)
        if any(not 0 <= at <= at + size <= whole for at, size, whole in zip(first, extent, shape, strict=True)):
            raise ValueError(f"a piece of {name} lies outside of it")
        pieces.append(_Piece(first, extent, folder / info.relative_path, info.offset, info.length))
    if sum(int(np.prod(piece.shape)) for piece in pieces) != int(np.prod(shape)):
        raise ValueError(f"the pieces of {name} do not make it up")
    return SavedTensor(name, shape, saved.properties.dtype, tuple(pieces))


def _check_place(name: str, info: Any) -> None:
    """Refuse a piece that does not lie in a file of the checkpoint as torch.save writes it."""
    if info.transform_descriptors:
        raise ValueError(f"{name} was packed in a way of its own")
    if _DATA_FILE.fullmatch(info.relative_path) is None:
        raise ValueError(f"{name} lies in {info.relative_path!r}, expected a file of the checkpoint")


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
class _Numbers:
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


def _located(piece: _Piece, name: str) -> _Numbers:
    """Where the numbers of a piece lie.

    Raises:
        CheckpointError: The file cannot be read, or is damaged there.
    """
    if not np.prod(piece.shape):
        return _Numbers(piece.file, 0, 0, 0, (), piece.shape)
    try:
        with _Slice(regular_file(piece.file), piece.start, piece.size) as file:
            told = torch.load(cast(IO[bytes], file), map_location="meta", weights_only=True)
            (record,) = (item for item in zipfile.ZipFile(file).infolist() if item.filename.endswith("/data/0"))
            # Behind the fixed part of the record's own header stand its name and a padding.
            file.seek(record.header_offset)
            header = file.read(30) or b""
            start = record.header_offset + 30 + sum(int.from_bytes(header[at : at + 2], "little") for at in (26, 28))
        if told.dtype != torch.float32 or tuple(told.shape) != piece.shape or record.compress_type:
            raise ValueError("its shape or dtype is another")
        reach = sum((extent - 1) * stride for extent, stride in zip(told.shape, told.stride(), strict=True))
        if 4 * (told.storage_offset() + reach + 1) > record.file_size or start + record.file_size > piece.size:
            raise ValueError("it is too short")
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, *_BROKEN) as error:
        raise_interruption()
        raise CheckpointError(f"a piece of {name} cannot be read: {error}", where=piece.file) from None
    return _Numbers(
        piece.file, piece.start + start, record.file_size, told.storage_offset(), tuple(told.stride()), piece.shape
    )


def _fill(block: NDArray[np.float32], start: int, piece: _Piece, numbers: _Numbers) -> None:
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
