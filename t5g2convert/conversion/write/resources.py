"""The disk space and the memory that a conversion needs."""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.file_names import TOKENIZER_FILE
from t5g2convert.checkpoint.header import element_bytes
from t5g2convert.checkpoint.sources import Sources, named
from t5g2convert.conversion.plan.types import Plan
from t5g2convert.conversion.write.copy import BUFFERS, CHUNK_BYTES
from t5g2convert.errors import OutputError

ASSET_BYTES: Final = 64 << 20
"""Disk space for the files other than shards; the largest tokenizer files in use take 40 MB."""

BASE_BYTES: Final = 56_000_000
"""Memory of the interpreter and the libraries (measured, CPython 3.11 on Linux)."""

PARSE_FACTOR: Final = 4.2
"""Memory to read and parse a tokenizer.json, as a multiple of its size (measured with Gemma 3's)."""


@dataclass(frozen=True, slots=True)
class DiskSpace:
    """The disk space that a conversion needs, in bytes.

    Attributes:
        output: Space on the disk of the output, including downloads to the same disk.
        download: Size of the files that are still to be downloaded from the Hub.
    """

    output: int
    download: int


def disk_space(plan: Plan, sources: Sources, output: Path) -> DiskSpace:
    """Return the disk space that the conversion of these checkpoints into this folder needs."""
    missing = sources.missing(plan.reads)
    sizes = {role: sources.size({role: names}) for role, names in missing.items()}
    caches = {role: sources.folders.path(named(role, names[0])).parent for role, names in missing.items()}
    shared = sum(size for role, size in sizes.items() if _same_disk(caches[role], output))
    return DiskSpace(plan.nbytes + ASSET_BYTES + shared, sum(sizes.values()))


def peak_memory(plan: Plan) -> int:
    """Estimate the peak memory of a conversion, in bytes; it does not depend on the size of the model."""
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
    made = sum(len(file.text or b"") for file in plan.files)
    parsing = [
        int(PARSE_FACTOR * file.identity.size)
        for file in plan.files
        if plan.mapping is not None and file.name == TOKENIZER_FILE and file.identity is not None
    ]
    return BASE_BYTES + max([made + copying, *(made + size for size in aligning), *parsing])


def check_space(target: Path, need: int) -> None:
    """Refuse a target if its disk has too little space.

    Raises:
        OutputError: The disk has too little space; the error names the bytes needed and free.
    """
    have = free_bytes(target)
    if have < need:
        raise OutputError(f"the disk has {have:,} bytes free, the output needs {need:,}", where=target)


def free_bytes(target: Path) -> int:
    """Return how many bytes this user may still write on the disk of `target`, which need not exist yet."""
    existing = _existing(target)
    try:
        return shutil.disk_usage(existing).free
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=existing) from error


def _same_disk(one: Path, other: Path) -> bool:
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(path: Path) -> Path:
    """Return the path, or its nearest parent that exists."""
    folders = (path.absolute(), *path.absolute().parents)
    # Path.exists raises for a name that is too long.
    return next(folder for folder in folders if os.path.exists(folder))  # noqa: PTH110
