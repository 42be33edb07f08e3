"""The lock on a run's folder: two processes that train into one would each remove what the other writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from t5g2convert.checkpoint.folder_lock import lock_folder
from t5g2convert.errors import OutputError


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run's folder, made if there is none, for as long as the block runs; what stayed empty is removed then.

    The lock is on the folder itself and goes with the process that holds it, or with the last of its data workers. It
    is seen on other machines too, if their file system has locks.

    Raises:
        OutputError: Another process holds it, or it is no folder that can be made and locked.
    """
    made: list[Path] = []
    try:
        fd = _lock(run, made)
    except OSError as error:
        raise OutputError(f"cannot be locked: {error.strerror}", where=run) from error
    try:
        yield
    finally:
        # Removed while it is held: whoever waits for it sees that it is another than the one of that name.
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        os.close(fd)


def _lock(run: Path, made: list[Path]) -> int:
    while True:
        for folder in (*reversed(run.parents), run):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                made.insert(0, folder)
        try:
            fd = lock_folder(run)
        except BlockingIOError:
            raise OutputError(
                "another process is training in this folder", where=run, hint="stop it first, or choose another folder"
            ) from None
        if fd is not None:
            return fd
