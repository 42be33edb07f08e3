"""Files that are put in place whole; folders that are flushed or emptied; the permissions of what is new."""

import errno
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Write a file under another name, wait until the disk has it, and rename it once.

    Args:
        path: The file; what is there is replaced at the end, and is untouched if anything fails. Its mode stays, and
            its owner where that is permitted.
        data: All of it.

    Raises:
        OSError: It cannot be written; nothing is left behind.
    """
    with _staged(path) as (staged, fd):
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(fd)
        staged.replace(path)


def check_replaceable(path: Path) -> None:
    """Refuse a file that `replace_file` could not put in place, before the work that fills it.

    Raises:
        OSError: There is a folder of that name, its folder cannot be written to, or it is protected itself.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    with _staged(path):
        pass


@contextmanager
def _staged(path: Path) -> Iterator[tuple[Path, int]]:
    """An empty file beside another, with that one's owner and mode if it is there; removed at the end, or renamed."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _keep_mode(path, fd)
            yield staged, fd
        finally:
            os.close(fd)
    finally:
        # Also one that a killed process of the same number has left.
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


def clear(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove everything in a folder but the names to be kept.

    Raises:
        OSError: Something cannot be removed.
    """
    for item in folder.iterdir():
        if item.name in keep:
            continue
        if item.is_dir() and not item.is_symlink():
            shutil.rmtree(item)
        else:
            item.unlink()


def usual_mode(mode: int) -> int:
    """The permissions less the umask, as a new file or folder has them."""
    umask = os.umask(0o077)
    os.umask(umask)
    return mode & ~umask
