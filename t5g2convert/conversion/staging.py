"""The staging folder: everything is written beside the target and appears there by one rename, or not at all."""

import fcntl
import os
import shutil
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from t5g2convert.errors import OutputError

STAGING_SUFFIX: Final = ".t5g2-staging"
OLD_SUFFIX: Final = ".t5g2-old"


def check_target(target: Path, source: Path, *, overwrite: bool) -> None:
    """Refuse a target that must not be written, before any work.

    Raises:
        OutputError: It is a file or a folder with something in it, or it and the source contain each other.
    """
    real, real_source = target.resolve(), source.resolve()
    if real == real_source or real in real_source.parents or real_source in real.parents:
        relation = "is" if real == real_source else "contains" if real in real_source.parents else "lies inside"
        raise OutputError(f"{relation} the source folder", where=target, hint="choose another folder")
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise OutputError("exists and is not a folder", where=target)
    if not overwrite and any(target.iterdir()):
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
    existing = next(folder for folder in (target.absolute(), *target.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def _flush_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


class Staging:
    """A locked folder beside the target, as a context: removed on the way out unless `commit` was called.

    The lock is on the folder itself, so that it goes with the process that held it; whoever finds the folder without a
    lock may clear it away.
    """

    def __init__(self, target: Path, *, flush: bool = True) -> None:
        self.flush = flush
        self.target = target.resolve()
        self.folder = self.target.with_name(f".{self.target.name}{STAGING_SUFFIX}")
        self.old = self.target.with_name(f".{self.target.name}{OLD_SUFFIX}")
        self._fd = -1
        self._made_parents: list[Path] = []
        self._committed = False

    def __enter__(self) -> Self:
        try:
            self._make_parents()
            self._lock()
            self._clear()
            if self.old.exists() and not self.target.exists():
                self.old.rename(self.target)
        except OSError as error:
            self._leave()
            raise OutputError(f"cannot be written: {error.strerror}", where=self.target) from error
        except BaseException:
            self._leave()
            raise
        return self

    def commit(self) -> None:
        """Flush the folder, put it in the target's place, flush the parent.

        Raises:
            OutputError: The rename failed; the target is as it was.
        """
        try:
            if self.flush:
                os.fsync(self._fd)
            replaced = self.target.exists() and any(self.target.iterdir())
            if replaced:
                shutil.rmtree(self.old, ignore_errors=True)
                self.target.rename(self.old)
            try:
                self.folder.rename(self.target)
            except BaseException:
                if replaced:
                    self.old.rename(self.target)
                raise
            self._committed = True
            if self.flush:
                _flush_folder(self.target.parent)
            if replaced:
                shutil.rmtree(self.old, ignore_errors=True)
        except OSError as error:
            raise OutputError(f"cannot be put in place: {error.strerror}", where=self.target) from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._leave()

    def _make_parents(self) -> None:
        missing = [folder for folder in self.target.parents if not folder.exists()]
        for folder in reversed(missing):
            folder.mkdir()
            self._made_parents.insert(0, folder)

    def _lock(self) -> None:
        """Take the folder; another process may rename or remove it between any two calls, so look again afterwards."""
        while True:
            self.folder.mkdir(exist_ok=True)
            self._fd = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
            try:
                fcntl.flock(self._fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(self._fd)
                self._fd = -1
                raise OutputError("another conversion is writing there", where=self.target) from None
            try:
                if os.path.samestat(self.folder.stat(), os.fstat(self._fd)):
                    return
            except FileNotFoundError:
                pass
            os.close(self._fd)
            self._fd = -1

    def _clear(self) -> None:
        for item in self.folder.iterdir():
            if item.is_dir() and not item.is_symlink():
                shutil.rmtree(item)
            else:
                item.unlink()

    def _leave(self) -> None:
        if self._fd < 0:
            self._remove_parents()
            return
        if not self._committed:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._remove_parents()
        os.close(self._fd)
        self._fd = -1

    def _remove_parents(self) -> None:
        for folder in self._made_parents:
            try:
                folder.rmdir()
            except OSError:
                return
