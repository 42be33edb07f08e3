"""The files of a folder that t5g2 wrote: `--overwrite` replaces only those."""

import os
import stat
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from t5g2convert.checkpoint.card_seal import CARD_FILE, has_sealed_card
from t5g2convert.checkpoint.file_store import HASH_THREADS, sha256_of
from t5g2convert.checkpoint.folder import some
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest
from t5g2convert.errors import CheckpointError, DataError, OutputError


@dataclass(frozen=True, slots=True)
class ListedFile:
    """The size and sha256 of a file when it was written; None where they were not recorded."""

    nbytes: int | None = None
    sha256: str | None = None


Listing = Callable[[Path], Mapping[str, ListedFile]]
"""Returns the files that t5g2 wrote into a folder; raises an error if the folder does not list them."""

Snapshot = Mapping[str, tuple[int, int, int]]
"""Inode, size and modification time of everything in a folder, by path."""


def manifest_listing(folder: Path) -> dict[str, ListedFile]:
    """Return the files that t5g2.json lists, t5g2.json itself, and a model card that nobody has edited.

    Raises:
        CheckpointError: The folder has no manifest, or an invalid one.
    """
    files = read_manifest(folder).files
    listed = {name: ListedFile(file.bytes, file.sha256) for name, file in files.items()}
    card = {CARD_FILE: ListedFile()} if has_sealed_card(folder) else {}
    return {**listed, **card, MANIFEST_FILE: ListedFile()}


def take_snapshot(folder: Path, ignored: frozenset[str] = frozenset()) -> dict[str, tuple[int, int, int]]:
    """Return a snapshot of a folder, without following links.

    Raises:
        OSError: The folder cannot be read.
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
    """Refuse a folder that contains anything but files that t5g2 wrote.

    Args:
        folder: The folder.
        listing: Returns the files that t5g2 wrote.
        ignored: Work folders at its top level to ignore.
        thoroughly: Compare the sha256 of every file too, not only the names and sizes.

    Raises:
        OutputError: The folder has no list, or contains files that are not in the list or have changed; the error names
            all of them.
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
            f"is not an output of t5g2 ({name} {error.message}) and is not replaced: it contains {some(top)}",
            where=folder,
            hint="choose another folder, or move it away",
        ) from None
    foreign = [_shown(name, status) for name, status in found.items() if not _is_listed(name, status, listed)]
    if foreign:
        raise OutputError(
            f"contains files that t5g2 did not write, and is not replaced: {some(foreign)}",
            where=folder,
            hint="move them away, or choose another folder",
            details=sorted(foreign) if len(foreign) > 1 else (),
        )
    changed = [name for name, status in found.items() if _has_other_size(status, listed.get(name))]
    if thoroughly and not changed:
        changed = _with_other_bytes(folder, found, listed)
    if changed:
        raise OutputError(
            f"has changed since t5g2 wrote it, and is not replaced: {some(changed)}",
            where=folder,
            hint="move it away, or choose another folder",
            details=sorted(changed) if len(changed) > 1 else (),
        )


def is_intact(folder: Path, listing: Listing) -> bool:
    """Return whether every file that a folder lists is unchanged; the folder may also contain other files."""
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
    """Refuse a work folder's path if it is a link, a file, or another user's folder.

    Raises:
        OutputError: The path is refused; nothing is changed.
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
        raise OutputError(f"is {what}, but t5g2 needs it as a work folder", where=path, hint=hint)
    if status.st_uid != os.geteuid():
        raise OutputError(
            f"belongs to another user ({status.st_uid}), but t5g2 needs it as a work folder", where=path, hint=hint
        )


def _walk(
    folder: Path, ignored: frozenset[str] = frozenset(), inside: str = ""
) -> Iterator[tuple[str, os.stat_result]]:
    """Yield everything below a folder with its relative path, without following links."""
    for item in sorted(os.scandir(folder / inside), key=lambda item: item.name):
        if not inside and item.name in ignored:
            continue
        name = f"{inside}{item.name}"
        yield name, item.stat(follow_symlinks=False)
        if item.is_dir(follow_symlinks=False):
            yield from _walk(folder, inside=f"{name}/")


def _is_listed(name: str, status: os.stat_result, listed: Mapping[str, ListedFile]) -> bool:
    if stat.S_ISDIR(status.st_mode):
        return any(other.startswith(f"{name}/") for other in listed)
    return stat.S_ISREG(status.st_mode) and name in listed


def _has_other_size(status: os.stat_result, written: ListedFile | None) -> bool:
    return written is not None and written.nbytes not in (None, status.st_size)


def _with_other_bytes(folder: Path, found: Mapping[str, os.stat_result], listed: Mapping[str, ListedFile]) -> list[str]:
    noted = {name: listed[name].sha256 for name in found if name in listed and listed[name].sha256 is not None}
    try:
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            digests = pool.map(lambda name: sha256_of(folder / name), noted)
            return [name for name, digest in zip(noted, digests, strict=True) if digest != noted[name]]
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=error.filename or folder) from error


def _shown(name: str, status: os.stat_result) -> str:
    return f"{name}/" if stat.S_ISDIR(status.st_mode) else name
