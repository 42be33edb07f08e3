"""The tensors of a checkpoint, checked and read from its safetensors files in blocks of rows.

torch.distributed.checkpoint writes one set of files per process, each with this process's rows of every tensor, and the
first row's number in the header (`DCP_SHARDING_INFO`). The number of processes makes no difference to a reader.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.train.checkpoint_manifest import (
    CHECKPOINT_FILE,
    CheckpointManifest,
    read_checkpoint_manifest,
)
from t5g2convert.checkpoint.folder import check_folder
from t5g2convert.checkpoint.header import Header, TensorEntry, read_header
from t5g2convert.checkpoint.strictjson import parse_object
from t5g2convert.errors import CheckpointError

if TYPE_CHECKING:
    import torch

BLOCK_ELEMENTS: Final = 1 << 20
"""Values read at once; at least one row."""

MODEL: Final = "model."
OPTIMIZER: Final = "optimizer."
_OFFSETS: Final = "DCP_SHARDING_INFO"


@dataclass(frozen=True, slots=True)
class Shard:
    """Consecutive rows of a tensor in one file: the number of the first, and where they are stored."""

    first: int
    entry: TensorEntry
    file: Path

    @property
    def rows(self) -> int:
        """Number of rows; a scalar counts as one."""
        return self.entry.shape[0] if self.entry.shape else 1

    def read(self, start: int, stop: int) -> NDArray[np.float32]:
        """Read rows `start` to `stop` of the tensor, as far as this shard has them."""
        start, stop = max(start, self.first), min(stop, self.first + self.rows)
        shape = self.entry.shape[1:]
        count = max(0, stop - start) * math.prod(shape)
        offset = self.entry.start + 4 * (start - self.first) * math.prod(shape)
        if not count:
            return np.empty((0, *shape), np.float32)
        try:
            values = np.fromfile(self.file, np.dtype("<f4"), count, offset=offset)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=self.file) from None
        if values.size != count:
            raise CheckpointError("was truncated while it was read", where=self.file)
        return values.reshape(stop - start, *shape)


class CheckpointReader:
    """The trained values of one checkpoint.

    Attributes:
        folder: The checkpoint.
        manifest: Its checkpoint.json.
        names: Shapes of the trained tensors by their published names.

    Args:
        folder: The checkpoint.

    Raises:
        CheckpointError: The folder is not a checkpoint of a run, is incomplete, or contains links, other files or
            tensors that are not float32.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        self.folder, self.manifest = folder, read_checkpoint_manifest(folder)
        self._shards = read_shards(folder, self.manifest)
        self.names: Mapping[str, tuple[int, ...]] = {
            name.removeprefix(MODEL): shape_of(shards)
            for name, shards in self._shards.items()
            if name.startswith(MODEL)
        }

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        """Read a tensor in blocks of rows, `BLOCK_ELEMENTS` values or one row each.

        Raises:
            CheckpointError: A file cannot be read.
        """
        shards, shape = self._shards[MODEL + name], self.names[name]
        rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
        step = max(1, BLOCK_ELEMENTS // max(1, width))
        for start in range(0, rows, step):
            block = np.concatenate([shard.read(start, start + step) for shard in shards])
            yield block if shape else block.reshape(())

    def read(self, name: str) -> "torch.Tensor":
        """Read a whole tensor, float32.

        Raises:
            CheckpointError: A file cannot be read.
        """
        import torch

        blocks = [block.reshape(-1) for block in self.pieces(name)]
        return torch.from_numpy(np.concatenate(blocks or [np.empty(0, np.float32)]).reshape(self.names[name]))


def read_shards(folder: Path, manifest: CheckpointManifest) -> dict[str, list[Shard]]:
    """Read the headers of a checkpoint: the shards of each tensor, in order.

    Names are `model.NAME` and `optimizer.NAME.MOMENT`; all tensors are float32 and split along their rows.

    Raises:
        CheckpointError: The folder has links or other files in it, a header is invalid, or rows are missing.
    """
    _check_entries(folder, manifest)
    found: dict[str, list[Shard]] = {}
    for file in sorted(manifest.files):
        header = read_header(folder / file)
        for name, first in _first_rows(header).items():
            found.setdefault(name, []).append(Shard(first, header.tensors[name], header.path))
    for name, shards in found.items():
        shards.sort(key=lambda shard: (shard.first, shard.rows))
        _check_rows(name, shards)
    return found


def shape_of(shards: list[Shard]) -> tuple[int, ...]:
    """Return the shape of a whole tensor."""
    shape = shards[0].entry.shape
    return (sum(shard.rows for shard in shards), *shape[1:]) if shape else shape


def _check_entries(folder: Path, manifest: CheckpointManifest) -> None:
    try:
        for item in sorted(folder.iterdir()):
            if item.name not in manifest.files and item.name != CHECKPOINT_FILE:
                raise CheckpointError("is not a file of this checkpoint", where=item, hint="move it elsewhere")
            if item.is_symlink() or not item.is_file():
                raise CheckpointError("is a link or not a regular file", where=item)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=folder) from None


def _first_rows(header: Header) -> dict[str, int]:
    """Return the number of the first row that a file has of each of its tensors."""
    text = header.metadata.get(_OFFSETS, "{}").encode()
    offsets = parse_object(text, header.path, f"{_OFFSETS} ")
    if offsets.keys() != header.tensors.keys():
        raise CheckpointError(f"{_OFFSETS} does not list the tensors of the file", where=header.path)
    return {name: _first_row(fields, header.tensors[name], header.path) for name, fields in offsets.items()}


def _first_row(fields: Any, entry: TensorEntry, path: Path) -> int:
    if entry.dtype != "F32":
        raise CheckpointError(f"{entry.name} is {entry.dtype}, expected F32", where=path)
    if not entry.name.startswith((MODEL, OPTIMIZER)):
        raise CheckpointError(f"{entry.name} is not a tensor of a model or an optimizer", where=path)
    at = fields.get("saved_offsets") if isinstance(fields, dict) and len(fields) == 1 else None
    if not isinstance(at, list) or len(at) != len(entry.shape) or any(type(each) is not int for each in at):
        raise CheckpointError(f"{entry.name} has no valid saved_offsets", where=path)
    if any(at[1:]) or (at and at[0] < 0):
        raise CheckpointError(f"{entry.name} starts at {at}, expected whole rows", where=path)
    return at[0] if at else 0


def _check_rows(name: str, shards: list[Shard]) -> None:
    """Refuse shards that do not cover a tensor's rows exactly once."""
    expected, width = 0, shards[0].entry.shape[1:]
    for shard in shards:
        if shard.first != expected or shard.entry.shape[1:] != width or (len(shards) > 1 and not shard.entry.shape):
            raise CheckpointError(
                f"rows of {name} are missing or stored twice: expected row {expected} next, found row {shard.first}",
                where=shard.file,
            )
        expected += shard.rows
