"""What an interrupted run leaves at a target: its names, and how the next run tells and removes it."""

import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.atomic_write import flush_folder
from t5g2convert.conversion.write.ownership import check_own_folder
from t5g2convert.errors import OutputError

STAGING_SUFFIX: Final = ".t5g2-staging"
OLD_SUFFIX: Final = ".t5g2-old"
REMOVED_SUFFIX: Final = ".t5g2-removed"

INSIDE: Final = STAGING_SUFFIX
"""The staging folder in a target that is filled."""

MOVES_FILE: Final = ".t5g2-moves"
"""In that folder, before the first file is moved out of it: which files those are."""

JOURNAL_FILE: Final = ".t5g2-finished"
"""In the staging folder; the shards that it names are worth keeping for a run that takes up where another stopped."""


@dataclass(frozen=True, slots=True)
class Names:
    """What lies beside a target while it is written or replaced.

    Attributes:
        staging: The new folder, until it is complete.
        old: The folder that is replaced, until the new one is in its place; put back if it never came there.
        removed: What is being removed; never put back.
    """

    staging: Path
    old: Path
    removed: Path

    @classmethod
    def beside(cls, target: Path) -> "Names":
        """Those of a target, which has no links in its path."""
        return cls(*(target.parent / f".{target.name}{end}" for end in (STAGING_SUFFIX, OLD_SUFFIX, REMOVED_SUFFIX)))

    def all_removed(self) -> list[Path]:
        """Every folder that is being removed or could not be."""
        pattern = re.compile(rf"{re.escape(self.removed.name)}(-\d+)?", re.DOTALL)
        try:
            found = [item for item in self.removed.parent.iterdir() if pattern.fullmatch(item.name)]
        except OSError:
            return []
        return sorted(found)

    def free_removed(self) -> Path:
        """A name for the next."""
        number, path = 1, self.removed
        while os.path.lexists(path):
            number += 1
            path = self.removed.with_name(f"{self.removed.name}-{number}")
        return path

    def clear_removed(self) -> list[str]:
        """Remove the folders that were replaced, those of earlier runs too; return a note for each that remains."""
        notes: list[str] = []
        for path in self.all_removed():
            try:
                check_own_folder(path)
                shutil.rmtree(path, ignore_errors=True)
                if os.path.lexists(path):
                    shutil.rmtree(path)
            except OutputError:
                continue  # not ours
            except OSError as error:
                notes.append(
                    f"a folder that was replaced is still there, as {path}: cannot be removed: {error.strerror}"
                )
        return notes


def fill(folder: Path, target: Path, *, last: Sequence[str], left: Collection[str], flush: bool) -> None:
    """Move everything in the staging folder into the target.

    The file of moves is written first, so that the next run knows which files in the target are ours if this one is
    killed. Without the last of them the target is not complete.

    Args:
        folder: The staging folder.
        target: The folder that is filled.
        last: Files that are moved last, in this order.
        left: Files that stay.
        flush: Whether the disk has everything else before the last file is moved.

    Raises:
        OSError: A file cannot be moved; those that were are back.
        OutputError: Somebody else wrote a file of that name.
    """
    rank = {name: number for number, name in enumerate(last, start=1)}
    entries = sorted(item.name for item in folder.iterdir() if item.name not in (*left, MOVES_FILE))
    order = sorted(entries, key=lambda name: rank.get(name, 0))
    with open(folder / MOVES_FILE, "wb") as file:  # noqa: PTH123 - as os.open elsewhere
        file.write(moves_of(folder, order))
        if flush:
            file.flush()
            os.fsync(file.fileno())
    if flush:
        flush_folder(folder)
    moved: list[str] = []
    try:
        for name in order:
            if name == order[-1] and flush:
                flush_folder(target)
            if os.path.lexists(target / name):
                raise OutputError(f"was written to meanwhile: {name}", where=target, hint="run again")
            (folder / name).rename(target / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            (target / name).rename(folder / name)
        raise


def take_back(target: Path) -> None:
    """Remove what a run that was killed moved into a target that did not become complete.

    Raises:
        OSError: A file cannot be removed.
    """
    moved = moved_files(target)
    for name in moved:
        (target / name).unlink()
    for name in {name.partition("/")[0] for name in moved if "/" in name}:
        for folder, _, _ in os.walk(target / name, topdown=False):
            with suppress(OSError):
                Path(folder).rmdir()


def leftovers(target: Path) -> set[str]:
    """Names in a target that a run which was killed left there, while it filled it.

    These are its staging folder, and files that it had moved out of it; none of those if it had moved all.

    Raises:
        OSError: It cannot be read which files those are.
        OutputError: The name of the staging folder is taken by something else.
    """
    inside = target / INSIDE
    if not os.path.lexists(inside):
        return set()
    check_own_folder(inside)
    moved = moved_files(target)
    return {INSIDE} | {name.partition("/")[0] for name in moved}


def moved_files(target: Path) -> list[str]:
    """The files that a run which was killed had moved into a target, which is not complete without the last of them.

    Raises:
        OSError: The file of moves cannot be read.
    """
    path = target / INSIDE / MOVES_FILE
    try:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
            return []
        moves = json.loads(path.read_bytes())
        inside = [move for move in moves if real_path(target / move[0]) == target / move[0]]
        moved = [name for name, *identity in inside if _identity(target / name) == identity]
    except (FileNotFoundError, ValueError, TypeError):
        return []  # absent, or cut off while it was written: nothing was moved yet
    return [] if moves and moved[-1:] == [moves[-1][0]] else moved


def moves_of(folder: Path, order: Iterable[str]) -> bytes:
    """What the file of moves holds: path, inode and size of every file, in the order in which they are moved.

    Raises:
        OSError: The folder cannot be read.
    """
    moves = []
    for name in order:
        path = folder / name
        files = sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
        moves += [[item.relative_to(folder).as_posix(), *(_identity(item) or ())] for item in files]
    return json.dumps(moves).encode()


def real_path(path: Path) -> Path:
    """The path without links; a link that leads nowhere, or to itself, stays as it is."""
    return Path(os.path.realpath(path))


def _identity(path: Path) -> list[int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return [status.st_ino, status.st_size] if stat.S_ISREG(status.st_mode) else None
