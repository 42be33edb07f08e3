"""What is ours in a folder: `--overwrite` replaces nothing else, and what t5g2 left behind is known by its owner."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.digest import sha256_of
from t5g2convert.checkpoint.folder import some
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest
from t5g2convert.errors import CheckpointError, DataError, OutputError

THREADS: Final = 2
"""Threads that hash what is about to be replaced."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a file was when it was written; None where nobody noted it."""

    nbytes: int | None = None
    sha256: str | None = None


Listing = Callable[[Path], Mapping[str, Written]]
"""Reads the list of its own files from a folder that this tool wrote; raises if it has no such list."""

Snapshot = Mapping[str, tuple[int, int, int]]
"""By its path: inode, size and modification time of everything in a folder."""


def manifest_listing(folder: Path) -> dict[str, Written]:
    """The files that `t5g2.json` lists, and itself.

    Raises:
        CheckpointError: The folder has no manifest, or one that is not ours.
    """
    files = read_manifest(folder).files
    listed = {name: Written(file.bytes, file.sha256) for name, file in files.items()}
    return {**listed, MANIFEST_FILE: Written()}


def take_snapshot(folder: Path, ignored: frozenset[str] = frozenset()) -> dict[str, tuple[int, int, int]]:
    """Note what is in a folder, without following links.

    Raises:
        OSError: It cannot be read.
    """
    return {
        name: (status.st_ino, 0, 0) if stat.S_ISDIR(status.st_mode) else (
            status.st_ino, status.st_size, status.st_mtime_ns
        )
        for name, status in _walk(folder, ignored)
    }  # fmt: skip


def check_ours(
    folder: Path, listing: Listing, *, ignored: frozenset[str] = frozenset(), thoroughly: bool = False
) -> None:
    """Refuse a folder that holds anything but files that this tool wrote there.

    Args:
        folder: The folder.
        listing: Reads the list of its own files.
        ignored: Names at its top level that are not looked at.
        thoroughly: Compare the sha256 of every file too, not names and sizes alone.

    Raises:
        OutputError: It has no list of ours, a file that is not in the list, or one that was changed; all are named.
    """
    try:
        found = dict(_walk(folder, ignored))
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=error.filename or folder) from error
    try:
        listed = listing(folder)
    except (CheckpointError, DataError) as error:
        top = [_shown(name, status) for name, status in found.items() if "/" not in name]
        name = Path(error.where or folder).name
        raise OutputError(
            f"holds {some(top)}, and is not replaced: it is not a folder that t5g2 wrote ({name} {error.message})",
            where=folder,
            hint="choose another folder, or move it away",
        ) from None
    foreign = [_shown(name, status) for name, status in found.items() if not _is_listed(name, status, listed)]
    if foreign:
        raise OutputError(
            f"holds more than the output that t5g2 wrote, and is not replaced: {some(foreign)}",
            where=folder,
            hint="move that away, or choose another folder",
            details=sorted(foreign) if len(foreign) > 1 else (),
        )
    changed = [name for name, status in found.items() if _has_other_size(status, listed.get(name))]
    if thoroughly and not changed:
        changed = _with_other_bytes(folder, found, listed)
    if changed:
        raise OutputError(
            f"was changed since t5g2 wrote it, and is not replaced: {some(changed)}",
            where=folder,
            hint="move it away, or choose another folder",
            details=sorted(changed) if len(changed) > 1 else (),
        )


def is_intact(folder: Path, listing: Listing) -> bool:
    """Whether every file that a folder lists is there as it was written; others may stand beside them."""
    try:
        listed = listing(folder)
        found = {name: (folder / name).lstat() for name in listed}
        if any(not stat.S_ISREG(status.st_mode) for status in found.values()):
            return False
        sized = not any(_has_other_size(status, listed[name]) for name, status in found.items())
        return sized and not _with_other_bytes(folder, found, listed)
    except (OSError, CheckpointError, DataError):
        return False


def check_own_folder(path: Path) -> None:
    """Refuse a name that t5g2 needs for its work if a link, a file, or another user's folder has it.

    Raises:
        OutputError: Something else is there; it is left alone.
    """
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=path) from error
    hint = "remove it, or choose another output"
    if not stat.S_ISDIR(status.st_mode):
        what = "a link" if stat.S_ISLNK(status.st_mode) else "not a folder"
        raise OutputError(f"is {what}, and t5g2 needs this name for its work", where=path, hint=hint)
    if status.st_uid != os.geteuid():
        raise OutputError(
            f"belongs to another user ({status.st_uid}), and t5g2 needs this name for its work", where=path, hint=hint
        )


def _walk(
    folder: Path, ignored: frozenset[str] = frozenset(), inside: str = ""
) -> Iterator[tuple[str, os.stat_result]]:
    """Everything below a folder by its relative path, links as what they are."""
    for item in sorted(os.scandir(folder / inside), key=lambda item: item.name):
        if not inside and item.name in ignored:
            continue
        name = f"{inside}{item.name}"
        yield name, item.stat(follow_symlinks=False)
        if item.is_dir(follow_symlinks=False):
            yield from _walk(folder, inside=f"{name}/")


def _is_listed(name: str, status: os.stat_result, listed: Mapping[str, Written]) -> bool:
    if stat.S_ISDIR(status.st_mode):
        return any(other.startswith(f"{name}/") for other in listed)
    return stat.S_ISREG(status.st_mode) and name in listed


def _has_other_size(status: os.stat_result, written: Written | None) -> bool:
    return written is not None and written.nbytes not in (None, status.st_size)


def _with_other_bytes(folder: Path, found: Mapping[str, os.stat_result], listed: Mapping[str, Written]) -> list[str]:
    noted = {name: listed[name].sha256 for name in found if name in listed and listed[name].sha256 is not None}
    try:
        with ThreadPoolExecutor(THREADS) as pool:
            digests = pool.map(lambda name: sha256_of(folder / name), noted)
            return [name for name, digest in zip(noted, digests, strict=True) if digest != noted[name]]
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=error.filename or folder) from error


def _shown(name: str, status: os.stat_result) -> str:
    return f"{name}/" if stat.S_ISDIR(status.st_mode) else name
