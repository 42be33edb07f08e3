"""The names of unfinished work at a target, and the recovery from an interrupted run."""

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
from t5g2convert.conversion.output.ownership import check_own_folder
from t5g2convert.errors import OutputError

STAGING_SUFFIX: Final = ".t5g2-staging"
OLD_SUFFIX: Final = ".t5g2-old"
REMOVED_SUFFIX: Final = ".t5g2-removed"

INSIDE: Final = STAGING_SUFFIX
"""The staging folder inside an empty target that is filled."""

MOVES_FILE: Final = ".t5g2-moves"
"""In that folder: the list of files to move, written before the first move."""

JOURNAL_FILE: Final = ".t5g2-finished"
"""In the staging folder: the list of finished shards, or how far a pack was, from which `--resume` continues."""


@dataclass(frozen=True, slots=True)
class WorkFolders:
    """The work folders next to a target while it is written or replaced.

    Attributes:
        staging: The new folder, until it is complete.
        old: The replaced folder, until the new one is in place; moved back if that never happens.
        removed: A folder that is being removed; never moved back.
    """

    staging: Path
    old: Path
    removed: Path

    @classmethod
    def of(cls, target: Path) -> "WorkFolders":
        """Return the work folders of a target; its path must not contain links."""
        return cls(*(target.parent / f".{target.name}{end}" for end in (STAGING_SUFFIX, OLD_SUFFIX, REMOVED_SUFFIX)))

    def all_removed(self) -> list[Path]:
        """Return all folders that are being removed or could not be removed."""
        pattern = re.compile(rf"{re.escape(self.removed.name)}(-\d+)?", re.DOTALL)
        try:
            found = [item for item in self.removed.parent.iterdir() if pattern.fullmatch(item.name)]
        except OSError:
            return []
        return sorted(found)

    def free_removed(self) -> Path:
        """Return an unused name for a folder before its removal."""
        number, path = 1, self.removed
        while os.path.lexists(path):
            number += 1
            path = self.removed.with_name(f"{self.removed.name}-{number}")
        return path

    def clear_removed(self) -> list[str]:
        """Remove replaced folders, also from earlier runs; return a note for each one that remains."""
        notes: list[str] = []
        for path in self.all_removed():
            try:
                check_own_folder(path)
                shutil.rmtree(path, ignore_errors=True)
                if os.path.lexists(path):
                    shutil.rmtree(path)
            except OutputError:
                continue  # not this tool's
            except OSError as error:
                notes.append(f"a replaced folder could not be removed and remains as {path}: {error.strerror}")
        return notes


def fill(folder: Path, target: Path, *, last: Sequence[str], left: Collection[str], flush: bool) -> None:
    """Move everything in the staging folder into the target.

    The list of moves is written first: if this run is killed, the next one reads from it which files in the target to
    remove. Without the last file the target is not complete.

    Args:
        folder: The staging folder.
        target: The folder that is filled.
        last: Files that are moved last, in this order.
        left: Files that are not moved.
        flush: Whether to flush everything else before the last file is moved.

    Raises:
        OSError: A file cannot be moved; the files moved before it have been moved back.
        OutputError: Another process wrote a file of the same name.
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
                raise OutputError(f"was changed by another process: {name}", where=target, hint="run again")
            (folder / name).rename(target / name)
            moved.append(name)
    except BaseException:
        for name in moved:
            (target / name).rename(folder / name)
        raise


def take_back(target: Path, *, keep: bool = False) -> None:
    """Remove the files that a killed run moved into a target before it was complete.

    Args:
        target: The folder that was filled.
        keep: Move them back into the staging folder instead.

    Raises:
        OSError: A file cannot be removed or moved.
    """
    moved = moved_files(target)
    for name in moved:
        if keep:
            (target / INSIDE / name).parent.mkdir(parents=True, exist_ok=True)
            (target / name).rename(target / INSIDE / name)
        else:
            (target / name).unlink()
    for name in {name.partition("/")[0] for name in moved if "/" in name}:
        for folder, _, _ in os.walk(target / name, topdown=False):
            with suppress(OSError):
                Path(folder).rmdir()


def leftovers(target: Path) -> set[str]:
    """Return the names in a target that a run left when it was killed while filling it.

    These are the staging folder and the files already moved out of it, unless all of them were moved.

    Raises:
        OSError: The list of moves cannot be read.
        OutputError: Something else has the name of the staging folder.
    """
    inside = target / INSIDE
    if not os.path.lexists(inside):
        return set()
    check_own_folder(inside)
    moved = moved_files(target)
    return {INSIDE} | {name.partition("/")[0] for name in moved}


def moved_files(target: Path) -> list[str]:
    """Return the files that a killed run moved into a target; empty if it moved all of them.

    Raises:
        OSError: The list of moves cannot be read.
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
        return []  # the list is missing, or was cut off while it was written: nothing was moved yet
    return [] if moves and moved[-1:] == [moves[-1][0]] else moved


def moves_of(folder: Path, order: Iterable[str]) -> bytes:
    """Return the list of moves: path, inode and size of every file, in order.

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
    """Return the path with links resolved, except broken links and loops."""
    return Path(os.path.realpath(path))


def _identity(path: Path) -> list[int] | None:
    try:
        status = path.lstat()
    except OSError:
        return None
    return [status.st_ino, status.st_size] if stat.S_ISREG(status.st_mode) else None
