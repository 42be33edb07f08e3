"""Folders in tests: all their bytes, an old output, as `--overwrite` finds it, and a disk that is full."""

import hashlib
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.manifest import seal

_FILES: Final = {"config.json": b"{}\n", "model.safetensors": b"keep", "below/too.jinja": b"keep too"}


def manifest_of(files: dict[str, bytes]) -> bytes:
    """A manifest that lists these files."""
    document: dict[str, Any] = {
        "format": 1,
        "tool": {"name": "t5g2convert", "version": "0"},
        "mapping": {"name": "gemma3", "sha256": "0" * 64},
        "options": {},
        "source": {"family": "gemma3_text", "layout": {}, "files": {}},
        "dtype": "bfloat16",
        "parameters": {},
        "dropped": [],
        "changes": [],
        "tokens": [],
        "notes": [],
        "files": {
            name: {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()} for name, data in files.items()
        },
    }
    return seal(document)


OLD: Final = {**_FILES, "t5g2.json": manifest_of(_FILES)}


def write_old(folder: Path) -> None:
    """Write the folder."""
    for name, data in OLD.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Let writing fail behind so many bytes of a file, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def contents(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files below a folder, by their paths in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
