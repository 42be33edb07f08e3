"""Distributed checkpoints (torch.distributed.checkpoint): their table of contents, and torch's own loading, made safe.

A checkpoint is a folder: `.metadata` says which tensors there are, in which pieces they were saved and where each piece
lies in the `.distcp` files, of which every process wrote its own.

What is trusted: the numbers, which are the user's own training. Nothing is executed, or made by name: pickles are read
as data (`adaptation.pickles`), and numbers as bytes (`adaptation.pieces`). Links and files that no checkpoint has are
refused. `Reader` gives torch's own loading, into tensors that are spread over processes, the same table and numbers.
"""

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch.distributed.checkpoint.filesystem import FileSystemReader, _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from t5g2convert.adaptation.train.checkpoint_manifest import TABLE_FILE
from t5g2convert.adaptation.train.pickles import Made, Name, Pairs, read_pickle
from t5g2convert.adaptation.train.pieces import MAX_DIMENSIONS, SIZE, Piece, SavedTensor, extents, located, place
from t5g2convert.checkpoint.file_store import regular_file
from t5g2convert.errors import CheckpointError

MAX_METADATA_BYTES: Final = 100_000_000
"""Largest table of contents: about a million pieces."""

_DATA_FILE: Final = re.compile(r"__[0-9]+_[0-9]+\.distcp")
_METADATA: Final = "torch.distributed.checkpoint.metadata"
_TABLE, _TENSOR = Name(_METADATA, "Metadata"), Name(_METADATA, "TensorStorageMetadata")
_CHUNK, _INDEX = Name(_METADATA, "ChunkStorageMetadata"), Name(_METADATA, "MetadataIndex")
_PROPERTIES: Final = Name(_METADATA, "TensorProperties")
_INFO: Final = Name("torch.distributed.checkpoint.filesystem", "_StorageInfo")
_NAMED: Final = frozenset(
    {
        _TABLE, _TENSOR, _CHUNK, _INDEX, _PROPERTIES, _INFO, SIZE,
        *(Name(_METADATA, name) for name in ("BytesStorageMetadata", "StorageMeta", "_MEM_FORMAT_ENCODING")),
        Name("torch.serialization", "_get_layout"),
        *(Name(module, name) for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "PurePosixPath")),
    }
)  # fmt: skip
"""What a table of contents names, beside dtypes."""


@dataclass(frozen=True, slots=True)
class _Contents:
    """A table of contents.

    Attributes:
        tensors: By their whole names.
        others: Names of what else was saved.
        paths: For each name the keys that it is made of.
    """

    tensors: Mapping[str, SavedTensor]
    others: tuple[str, ...]
    paths: Mapping[str, tuple[str | int, ...]]


def read_metadata(folder: Path, root: str, *, beside: frozenset[str] = frozenset()) -> Mapping[str, SavedTensor]:
    """The tensors of a checkpoint that was saved of `{root: {NAME: tensor}, ...}`, by NAME.

    Args:
        folder: The checkpoint.
        root: The key of the dict.
        beside: Names of other files that may be there.

    Raises:
        CheckpointError: It is no checkpoint, is damaged, has links or strange files in it, or nothing under that key.
    """
    check_entries(folder, beside)
    contents = _read_contents(folder)
    tensors = {}
    for key, path in contents.paths.items():
        if len(path) == 2 and path[0] == root:
            name, found = str(path[1]), contents.tensors.get(key)
            if found is None:
                raise CheckpointError(f"{key!r} is not a tensor", where=folder / TABLE_FILE)
            tensors[name] = SavedTensor(name, found.shape, found.dtype, found.pieces)
    if not tensors:
        raise CheckpointError(f"has no tensors under {root!r}", where=folder / TABLE_FILE)
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
        self._pieces: dict[tuple[str, tuple[int, ...]], Piece] = {}

    def read_metadata(self, *_: Any, **__: Any) -> Metadata:
        """The table of contents.

        Raises:
            CheckpointError: It is none, or damaged; the folder has links or strange files in it; or not all that was
                saved is tensors.
        """
        check_entries(self._folder, self._beside)
        contents = _read_contents(self._folder)
        if contents.others:
            raise CheckpointError(f"{contents.others[0]} is not a tensor", where=self._folder / TABLE_FILE)
        entries, places = {}, {}
        for name, tensor in contents.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(each.first), torch.Size(each.shape)) for each in tensor.pieces]
            properties = TensorProperties(dtype=tensor.dtype)
            entries[name] = TensorStorageMetadata(properties, torch.Size(tensor.shape), chunks)
            for piece in tensor.pieces:
                self._pieces[name, piece.first] = piece
                index = MetadataIndex(name, torch.Size(piece.first))
                places[index] = _StorageInfo(piece.file.name, piece.start, piece.size)
        return Metadata(
            state_dict_metadata={**entries},
            planner_data={**contents.paths},
            storage_data=places,
            storage_meta=StorageMeta(load_id=self.load_id),
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> "Future[None]":
        """Fill the tensors of a plan.

        Raises:
            CheckpointError: A file cannot be read, or is damaged.
        """
        for item in plan.items:
            name, offset = item.storage_index.fqn, tuple(item.storage_index.offset or ())
            numbers = located(self._pieces[name, offset], name).mapped()
            ranges = zip(item.storage_offsets, item.lengths, strict=True)
            part = np.array(numbers[tuple(slice(at, at + length) for at, length in ranges)])
            target = planner.resolve_tensor(item).detach()
            target.copy_(torch.from_numpy(part))
            planner.commit_tensor(item, target)
        done: Future[None] = Future()
        done.set_result(None)
        return done


def check_entries(folder: Path, beside: frozenset[str]) -> list[str]:
    """Refuse a folder with anything in it that a checkpoint does not have; the names of the checkpoint's own files.

    Args:
        folder: The checkpoint.
        beside: Names of files that may be there beside the checkpoint's own.

    Raises:
        CheckpointError: It has links, folders or other files in it, or cannot be read.
    """
    try:
        items = sorted(folder.iterdir())
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=folder) from None
    for item in items:
        if item.is_symlink() or not item.is_file():
            raise CheckpointError("is a link or no file, which a checkpoint has none of", where=item)
        if item.name not in {TABLE_FILE, *beside} and not _DATA_FILE.fullmatch(item.name):
            raise CheckpointError("is not a file of a checkpoint", where=item, hint="move it elsewhere")
    return [item.name for item in items if item.name not in beside]


def _read_contents(folder: Path) -> _Contents:
    with _told(folder):
        path = regular_file(folder / TABLE_FILE)
        if path.stat().st_size > MAX_METADATA_BYTES:
            raise ValueError(f"it is larger than {MAX_METADATA_BYTES} bytes")
        table = _made(read_pickle(path.read_bytes(), _may_be_named)).fields(_TABLE)
        places: dict[str, dict[tuple[int, ...], Mapping[str, Any]]] = {}
        for index, info in _pairs(table["storage_data"]):
            at = _made(index).fields(_INDEX)
            if at.get("offset") is not None:
                places.setdefault(_text(at["fqn"]), {})[extents(at["offset"])] = _made(info).fields(_INFO)
        tensors, others = {}, []
        for key, saved in _pairs(table["state_dict_metadata"]):
            name = _text(key)
            if _made(saved).of == _TENSOR:
                tensors[name] = _tensor(folder, name, _made(saved).fields(_TENSOR), places.get(name, {}))
            else:
                others.append(name)
        paths = {_text(key): _path(steps) for key, steps in _pairs(table["planner_data"])}
        return _Contents(tensors, tuple(others), paths)


@contextmanager
def _told(folder: Path) -> Iterator[None]:
    """What goes wrong with the table of contents is an error of that file."""
    path = folder / TABLE_FILE
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
    except KeyError as error:
        raise CheckpointError(
            f"is not the metadata of a distributed checkpoint: {error} is missing", where=path
        ) from None
    except ValueError as error:
        raise CheckpointError(f"is not the metadata of a distributed checkpoint: {error}", where=path) from None


def _may_be_named(name: Name) -> bool:
    return name in _NAMED or _dtype(name) is not None


def _dtype(name: Any) -> torch.dtype | None:
    """The dtype that a name is of, if it is one's."""
    found = getattr(torch, name.name, None) if isinstance(name, Name) and name.module == "torch" else None
    return found if isinstance(found, torch.dtype) else None


def _made(value: Any) -> Made:
    if not isinstance(value, Made):
        raise ValueError(f"found a {type(value).__name__}, expected an object")
    return value


def _pairs(value: Any) -> list[tuple[Any, Any]]:
    if not isinstance(value, Pairs):
        raise ValueError(f"found a {type(value).__name__}, expected a dict")
    return value.items


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"found a {type(value).__name__}, expected a name")
    return value


def _path(steps: Any) -> tuple[str | int, ...]:
    if not isinstance(steps, tuple) or len(steps) > MAX_DIMENSIONS or not all(isinstance(s, str | int) for s in steps):
        raise ValueError("the keys of a tensor are neither names nor numbers")
    return steps


def _tensor(
    folder: Path, name: str, saved: Mapping[str, Any], places: Mapping[tuple[int, ...], Mapping[str, Any]]
) -> SavedTensor:
    """One tensor of the table; raises what `_told` turns into an error of ours."""
    shape, properties = extents(saved["size"]), _made(saved["properties"])
    if properties.of != _PROPERTIES or not isinstance(properties.state, tuple) or not properties.state:
        raise ValueError(f"{name} has no properties")
    dtype = _dtype(properties.state[0])
    if dtype is None or not isinstance(saved["chunks"], list):
        raise ValueError(f"{name} has no dtype or no pieces")
    pieces = []
    for chunk in saved["chunks"]:
        fields = _made(chunk).fields(_CHUNK)
        first, extent = extents(fields["offsets"]), extents(fields["sizes"])
        info = places.get(first)
        if info is None:
            raise ValueError(f"{name} lies nowhere")
        if any(at + size > whole for at, size, whole in zip(first, extent, shape, strict=True)):
            raise ValueError(f"a piece of {name} lies outside of it")
        pieces.append(Piece(first, extent, folder / _file_of(name, info), place(info["offset"]), place(info["length"])))
    if sum(math.prod(piece.shape) for piece in pieces) != math.prod(shape):
        raise ValueError(f"the pieces of {name} do not make it up")
    return SavedTensor(name, shape, dtype, tuple(pieces))


def _file_of(name: str, info: Mapping[str, Any]) -> str:
    """The file of a piece, which must be one of the checkpoint, as torch.save writes it."""
    if info.get("transform_descriptors"):
        raise ValueError(f"{name} was packed in a way of its own")
    file = _text(info["relative_path"])
    if not _DATA_FILE.fullmatch(file):
        raise ValueError(f"{name} lies in {file!r}, expected a file of the checkpoint")
    return file
