"""The disk space and the memory that a conversion needs."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.dtypes import element_bytes
from t5g2convert.checkpoint.inputs import named
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.conversion.plan.types import Plan
from t5g2convert.conversion.write.copy import BUFFERS, CHUNK_BYTES
from t5g2convert.errors import OutputError

ASSET_BYTES: Final = 64 << 20
"""Room kept for the files beside the shards; the largest tokenizer files in use take 40 MB."""

BASE_BYTES: Final = 56_000_000
"""What the interpreter and the libraries take (measured, CPython 3.11 on Linux)."""


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """What a conversion takes of disks, in bytes.

    Attributes:
        output: All that it takes of the output's disk: the output, and what is downloaded to the same disk.
        download: The files of the Hub that it reads and that are not here yet.
    """

    output: int
    download: int


def disk_space(plan: Plan, sources: Sources, output: Path) -> DiskSpace:
    """What a conversion of these checkpoints, into this folder, will take."""
    missing = sources.missing(plan.reads)
    sizes = {role: sources.size({role: names}) for role, names in missing.items()}
    caches = {role: sources.folders.path(named(role, names[0])).parent for role, names in missing.items()}
    shared = sum(size for role, size in sizes.items() if _same_disk(caches[role], output))
    return DiskSpace(plan.nbytes + ASSET_BYTES + shared, sum(sizes.values()))


def peak_memory(plan: Plan) -> int:
    """Bytes of memory that a conversion is expected to take at its peak; the size of the model does not matter."""
    from t5g2convert.conversion.write import aligned_projector

    casting = any(tensor.content.kind == "cast" for tensor in plan.tensors)
    copying = BUFFERS * CHUNK_BYTES + (BUFFERS * 4 * CHUNK_BYTES if casting else 0)
    aligning = [
        aligned_projector.peak_memory(
            planned.donor.width,
            planned.target.width,
            max(element_bytes(table.dtype) for table in (planned.donor, planned.target)),
        )
        for planned in (tensor.content.alignment for tensor in plan.tensors)
        if planned is not None
    ]
    return BASE_BYTES + max([copying, *aligning])


def check_space(target: Path, need: int) -> None:
    """Refuse a target whose disk cannot hold it.

    Raises:
        OutputError: With the bytes needed and the bytes free.
    """
    have = free_bytes(target)
    if have < need:
        raise OutputError(f"the disk has {have:,} bytes free, the output needs {need:,}", where=target)


def free_bytes(target: Path) -> int:
    """Bytes free for this user where `target` is or would be."""
    existing = _existing(target)
    try:
        return shutil.disk_usage(existing).free
    except OSError as error:
        raise OutputError(f"cannot be looked at: {error.strerror}", where=existing) from error


def _same_disk(one: Path, other: Path) -> bool:
    """Whether what is written to one path takes the room of the other."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(path: Path) -> Path:
    """The path, or the folder nearest to it that there is."""
    folders = (path.absolute(), *path.absolute().parents)
    return next(folder for folder in folders if os.path.exists(folder))  # noqa: PTH110 - as above
