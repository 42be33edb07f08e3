"""Room on the disk of an output."""

import os
import shutil
from pathlib import Path
from typing import Final

from t5g2convert.errors import OutputError

ASSET_BYTES: Final = 64 << 20
"""Room kept for the files beside the shards; the largest tokenizer files in use take 40 MB."""


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


def same_disk(one: Path, other: Path) -> bool:
    """Whether what is written to one path takes the room of the other."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(path: Path) -> Path:
    """The path, or the folder nearest to it that there is."""
    folders = (path.absolute(), *path.absolute().parents)
    return next(folder for folder in folders if os.path.exists(folder))  # noqa: PTH110 - as above
