"""A lock on a folder, which goes with the process that holds it."""

import fcntl
import os
from pathlib import Path


def lock_folder(folder: Path, *, follow_links: bool = True) -> int | None:
    """Lock a folder, without waiting; closing the descriptor that is returned releases it.

    The lock is seen by other machines too, if their file system has locks, and is inherited by child processes.

    Returns:
        The open folder; None if another process has put another folder in its place meanwhile: try again.

    Raises:
        BlockingIOError: Another process holds the lock.
        OSError: The folder cannot be opened or locked.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | (0 if follow_links else os.O_NOFOLLOW))
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(folder.stat(), os.fstat(fd)):
            return fd
    except FileNotFoundError:
        pass  # whoever held it has just removed it
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None
