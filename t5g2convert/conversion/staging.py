"""The staging folder: everything is written beside the target and appears there by one rename, or not at all."""

import fcntl
import os
import shutil
import signal
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from t5g2convert.checkpoint.folder import scheme_of
from t5g2convert.checkpoint.replacing import flush_folder
from t5g2convert.errors import Interrupted, OutputError, T5g2Error

STAGING_SUFFIX: Final = ".t5g2-staging"
OLD_SUFFIX: Final = ".t5g2-old"
LOCK_ATTEMPTS: Final = 100
ASSET_BYTES: Final = 64 << 20
"""Room kept for what stands beside the shards; the largest tokenizer files in use take 40 MB."""

JOURNAL_FILE: Final = ".t5g2-finished"
"""In the staging folder; the shards that it names are worth keeping for a run that takes up where another stopped."""


def check_target(target: Path, *sources: Path, overwrite: bool) -> None:
    """Refuse a target that must not be written, before any work.

    Raises:
        OutputError: It is an address, a file or a folder with something in it, or it and a source contain each other.
    """
    if scheme := scheme_of(target):
        raise OutputError(f"an address ({scheme}//...) was given, expected a folder")
    real = _real(target)
    for real_source in map(_real, sources):
        if real == real_source or real in real_source.parents or real_source in real.parents:
            relation = "is" if real == real_source else "contains" if real in real_source.parents else "lies inside"
            raise OutputError(f"{relation} the source folder", where=target, hint="choose another folder")
    _check_vacant(target, overwrite=overwrite)


def _check_vacant(target: Path, *, overwrite: bool) -> None:
    if not os.path.lexists(target):
        return
    if not os.path.isdir(target):  # noqa: PTH112 - False, and no error, for a name that no folder can have
        raise OutputError("exists and is not a folder", where=target)
    try:
        vacant = overwrite or not any(target.iterdir())
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=target) from error
    if not vacant:
        raise OutputError("exists and is not empty", where=target, hint="--overwrite replaces it")


def check_space(target: Path, need: int) -> None:
    """Refuse a target whose disk cannot hold it.

    Raises:
        OutputError: With the bytes needed and the bytes free.
    """
    have = free_bytes(target)
    if have < need:
        raise OutputError(f"the disk has {have:,} bytes free, the output needs {need:,}", where=target)


def free_bytes(target: Path) -> int:
    """Bytes free for this user where `target` is or would be."""
    existing = _existing(target)
    try:
        return shutil.disk_usage(existing).free
    except OSError as error:
        raise OutputError(f"cannot be looked at: {error.strerror}", where=existing) from error


def same_disk(one: Path, other: Path) -> bool:
    """Whether what is written to one path takes the room of the other."""
    return _existing(one).stat().st_dev == _existing(other).stat().st_dev


def _existing(path: Path) -> Path:
    """The path, or the folder nearest to it that there is."""
    folders = (path.absolute(), *path.absolute().parents)
    return next(folder for folder in folders if os.path.exists(folder))  # noqa: PTH110 - as above


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


def _real(path: Path) -> Path:
    """The path without links; a link that leads nowhere, or to itself, stays as it is."""
    return Path(os.path.realpath(path))


@contextmanager
def _uninterrupted() -> Iterator[None]:
    """Put off SIGINT and SIGTERM: what the block does to the disk and what it notes of it belong together.

    A mask would not do: other threads, of numpy or of a progress bar, take the signal then, and Python's handler still
    runs in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread only
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])


class Staging:
    """A locked folder beside the target, as a context: removed on the way out unless it was put in place or is kept.

    The lock is on the folder itself, so that it goes with the process that held it; whoever finds the folder without a
    lock may clear it away.

    Args:
        target: The folder to be written.
        overwrite: Whether a target that has something in it is replaced.
        flush: Whether the folder and its parent are flushed to the disk around the rename.
        resume: Whether what an earlier run left in the folder stays there, and what this one finished stays when it is
            stopped or the disk fails.
    """

    def __init__(self, target: Path, *, overwrite: bool = False, flush: bool = True, resume: bool = False) -> None:
        self.target = _real(target)
        self.folder = self.target.with_name(f".{self.target.name}{STAGING_SUFFIX}")
        self.old = self.target.with_name(f".{self.target.name}{OLD_SUFFIX}")
        self._overwrite, self._flush, self._resume = overwrite, flush, resume
        self._fd = -1
        self._made: list[Path] = []
        self._committed = False

    def __enter__(self) -> Self:
        try:
            with _uninterrupted():
                self._lock()
                if not self._resume:
                    clear(self.folder)
                os.fchmod(self._fd, usual_mode(0o777))
                if self.old.exists() and not self.target.exists():
                    self.old.rename(self.target)
            # Looked at again, now that nobody else can write: it may have been filled since.
            _check_vacant(self.target, overwrite=self._overwrite)
        except BaseException as error:
            with _uninterrupted():
                self._leave(keep=self._is_worth_keeping())
            if isinstance(error, OSError):
                raise OutputError(f"cannot be written: {error.strerror}", where=self.target) from error
            raise
        return self

    def commit(self) -> None:
        """Flush the folder, put it in the target's place, flush the parent.

        Raises:
            OutputError: The rename failed, and the target is as it was; or the parent could not be flushed.
        """
        with _uninterrupted():
            try:
                self._put_in_place()
            except OSError as error:
                raise OutputError(f"cannot be put in place: {error.strerror}", where=self.target) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After one signal the next must end the process at once, also in the middle of cleaning up.
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        # A disk that fails says nothing against what is finished; a source that is wrong does.
        failed = isinstance(error, OutputError) or isinstance(getattr(error, "__cause__", None), OSError)
        keep = (stopped or failed) and self._is_worth_keeping()
        if keep and isinstance(error, T5g2Error):
            error.hint = "the finished shards are kept, and --resume goes on with them"
        with nullcontext() if stopped else _uninterrupted():
            self._leave(keep=keep)

    def _put_in_place(self) -> None:
        if self._flush:
            os.fsync(self._fd)
        replaced = self.target.exists() and any(self.target.iterdir())
        if replaced:
            shutil.rmtree(self.old, ignore_errors=True)
            self.target.rename(self.old)
        try:
            self.folder.rename(self.target)
        except OSError:
            if replaced:
                self.old.rename(self.target)
            raise
        self._committed = True
        try:
            if self._flush:
                flush_folder(self.target.parent)
        finally:
            if replaced:
                shutil.rmtree(self.old, ignore_errors=True)

    def _make_parents(self) -> None:
        parents = [folder for folder in self.target.parents if not os.path.exists(folder)]  # noqa: PTH110 - as above
        for folder in reversed(parents):
            folder.mkdir(exist_ok=True)
            self._made.insert(0, folder)

    def _lock(self) -> None:
        """Take the folder; another process may rename or remove it between any two calls, so look again afterwards."""
        attempts = LOCK_ATTEMPTS
        while True:
            try:
                self._make_parents()
                if not self.folder.exists():
                    self.folder.mkdir(exist_ok=True)
                    self._made.insert(0, self.folder)
                self._fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            except FileNotFoundError:
                # Another run has just removed what it had made; but some paths never come to be: /proc/no/such.
                attempts -= 1
                if not attempts:
                    raise
                continue
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._fd)
                self._fd = -1
                # It is the other's now, even if it was made here: empty as it is, it must not be removed.
                self._made = [folder for folder in self._made if folder != self.folder]
                raise OutputError("another conversion is writing there", where=self.target) from None
            try:
                if os.path.samestat(self.folder.stat(), os.fstat(self._fd)):
                    return
            except FileNotFoundError:
                pass
            os.close(self._fd)
            self._fd = -1

    def _is_worth_keeping(self) -> bool:
        return self._resume and self._fd >= 0 and (self.folder / JOURNAL_FILE).exists()

    def _leave(self, *, keep: bool) -> None:
        """Remove what was made, unless it was put in place or is kept, and let go of the lock."""
        if not self._committed and not keep:
            if self._fd >= 0:
                shutil.rmtree(self.folder, ignore_errors=True)
            for folder in self._made:
                with suppress(OSError):
                    folder.rmdir()
        if self._fd >= 0:
            # A folder's descriptor: nothing is lost with it, and the lock goes with the process at the latest.
            with suppress(OSError):
                os.close(self._fd)
            self._fd = -1
