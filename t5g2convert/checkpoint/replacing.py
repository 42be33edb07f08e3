"""A file beside the weights, put in place whole; and a folder's entries, flushed."""

import os
import stat
from contextlib import suppress
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Write a file under another name, wait until the disk has it, and rename it once.

    A file that is there already keeps its mode and, where that is permitted, its owner.

    Args:
        path: The file; what stands there is replaced at the end, and is untouched if anything fails.
        data: All of it.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(fd, "wb") as file:
            _keep_mode(path, fd)
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        staged.replace(path)
    finally:
        staged.unlink(missing_ok=True)


def _keep_mode(path: Path, fd: int) -> None:
    """Give a new file the owner and the mode of the one that it will replace, if there is one."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISREG(status.st_mode):
        with suppress(PermissionError):
            os.fchown(fd, status.st_uid, status.st_gid)
        os.fchmod(fd, stat.S_IMODE(status.st_mode))


def flush_folder(folder: Path) -> None:
    """Wait until the disk has what a folder's entries are called, which renames change.

    Raises:
        OSError: It cannot be.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
