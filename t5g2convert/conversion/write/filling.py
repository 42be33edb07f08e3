"""A target that is there and empty, filled from a staging folder inside it: file by file, the last ones last."""

import os
from collections.abc import Collection, Sequence
from contextlib import suppress
from pathlib import Path

from t5g2convert.checkpoint.atomic_write import flush_folder
from t5g2convert.conversion.write.output_path import MOVES_FILE, moved_files, moves_of
from t5g2convert.errors import OutputError


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
