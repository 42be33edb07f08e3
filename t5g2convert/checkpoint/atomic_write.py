"""Write files atomically, flush, empty and lock folders, and set the permissions of new files."""

import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def replace_file(path: Path, data: bytes) -> None:
    """Replace a file atomically: write a temporary file, flush it, and rename it.

    Args:
        path: The file; an existing file stays untouched if anything fails, and keeps its mode, and its owner if
            permitted.
        data: Its new content.

    Raises:
        OSError: The file cannot be written; no temporary file is left.
    """
    with _staged(path) as (staged, fd):
        with os.fdopen(fd, "wb", closefd=False) as file:
            file.write(data)
        os.fsync(fd)
        staged.replace(path)


def check_replaceable(path: Path) -> None:
    """Refuse a path that `replace_file` could not write, before the work is done.

    Raises:
        OSError: The path is a folder or write-protected, or its folder cannot be written to.
    """
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
    with _staged(path):
        pass


@contextmanager
def _staged(path: Path) -> Iterator[tuple[Path, int]]:
    """Make an empty file next to a path, with the owner and mode of the file there; remove it unless it was renamed."""
    staged = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        fd = os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            _keep_mode(path, fd)
            yield staged, fd
        finally:
            os.close(fd)
    finally:
        # Also removes a file that a killed process with the same id left.
        staged.unlink(missing_ok=True)


def _keep_mode(path: Path, fd: int) -> None:
    """Give a new file the owner and the mode of the file that it will replace."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return
    if stat.S_ISREG(status.st_mode):
        with suppress(PermissionError):
            os.fchown(fd, status.st_uid, status.st_gid)
        os.fchmod(fd, stat.S_IMODE(status.st_mode))


def flush_folder(folder: Path) -> None:
    """Flush the entries of a folder to disk, which is needed after a rename.

    Raises:
        OSError: The disk fails.
    """
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def clear(folder: Path, keep: Collection[str] = ()) -> None:
    """Remove everything in a folder except some names.

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
    """Return permissions without those that the umask removes."""
    umask = os.umask(0o077)
    os.umask(umask)
    return mode & ~umask


def lock_folder(folder: Path, *, follow_links: bool = True) -> int | None:
    """Lock a folder without waiting; closing the returned descriptor releases the lock.

    Other machines see the lock too, if the file system supports locks. Child processes inherit it.

    Returns:
        A descriptor of the folder; None if another process has replaced the folder meanwhile: try again.

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
        pass  # the process that held the lock has just removed the folder
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None
