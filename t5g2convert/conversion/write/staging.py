"""The staging folder: everything is written there, and the target is complete by one rename, or not at all.

::

    new        .OUT.t5g2-staging becomes OUT
    replaced   OUT becomes .OUT.t5g2-old, .OUT.t5g2-staging becomes OUT,
               .OUT.t5g2-old becomes .OUT.t5g2-removed, which is removed and never put back
    filled     the files of OUT/.t5g2-staging are moved into OUT, the one that makes a checkpoint of it last
"""

import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from t5g2convert.checkpoint.atomic_write import clear, flush_folder, usual_mode
from t5g2convert.checkpoint.folder import some
from t5g2convert.checkpoint.folder_lock import lock_folder
from t5g2convert.checkpoint.manifest import MANIFEST_FILE
from t5g2convert.conversion.write.output_path import check_vacant
from t5g2convert.conversion.write.ownership import (
    Listing,
    Snapshot,
    check_ours,
    check_own_folder,
    manifest_listing,
    take_snapshot,
)
from t5g2convert.conversion.write.recovery import (
    INSIDE,
    JOURNAL_FILE,
    MOVES_FILE,
    Names,
    fill,
    leftovers,
    moved_files,
    real_path,
    take_back,
)
from t5g2convert.errors import Interrupted, OutputError, T5g2Error
from t5g2convert.interrupts import uninterrupted

LOCK_ATTEMPTS: Final = 100
LAST_FILES: Final = (MANIFEST_FILE, "config.json")
"""Moved last into a folder that is filled: without them it is not a checkpoint, for this tool or any other."""


class Staging:
    """A locked folder, as a context: removed on the way out unless it was put in place or is kept.

    It lies beside the target, or inside one that exists and is empty. The lock is on the folder itself, so that it goes
    with the process that held it; whoever finds the folder without a lock may clear it away, if it is the same user's.

    Attributes:
        target: The folder to be written, without links.
        folder: The staging folder.
        notes: After the commit: folders that were replaced and could not be removed.

    Args:
        target: The folder to be written.
        overwrite: Whether an output of ours that is there is replaced.
        flush: Whether the folder and its parent are flushed to the disk around the rename.
        resume: Whether what an earlier run left in the folder stays there, and what this one finished stays when it is
            stopped or the disk fails.
        listing: Reads the list of its files from an output that is there.
        last: Files that are moved last into a target that is filled.
    """

    def __init__(
        self,
        target: Path,
        *,
        overwrite: bool = False,
        flush: bool = True,
        resume: bool = False,
        listing: Listing = manifest_listing,
        last: Sequence[str] = LAST_FILES,
    ) -> None:
        self._given, self.target = target, real_path(target)
        self._names = Names.beside(self.target)
        self.folder = self._names.staging
        self.notes: list[str] = []
        self._overwrite, self._flush, self._resume = overwrite, flush, resume
        self._listing, self._last = listing, last
        self._fills = False
        self._replaced: tuple[int, Snapshot] | None = None
        self._fd = -1
        self._made: list[Path] = []
        self._committed = False

    def __enter__(self) -> Self:
        try:
            with uninterrupted():
                self._take()
            # Looked at again, now that nobody else can write: it may have been filled since.
            check_vacant(self._given, overwrite=self._overwrite, listing=self._listing)
            if not self._fills and os.path.lexists(self.target):
                self._note_replaced()
        except BaseException as error:
            with uninterrupted():
                self._leave(keep=self._is_worth_keeping())
            if isinstance(error, OSError):
                raise OutputError(f"cannot be written: {error.strerror}", where=self.target) from error
            raise
        return self

    def check_unchanged(self) -> None:
        """Refuse to go on if somebody else wrote into the target since the start.

        Raises:
            OutputError: Somebody did; what is there is named, and stays.
        """
        try:
            there = os.path.lexists(self.target)
            found = take_snapshot(self.target, frozenset({INSIDE})) if there else {}
            inode = self.target.stat().st_ino if there else None
        except OSError as error:
            raise OutputError(f"cannot be read: {error.strerror}", where=self.target) from error
        if there and not self._fills and self._replaced is None:
            raise OutputError("was made meanwhile by somebody else", where=self.target, hint="choose another folder")
        expected: Snapshot = {}
        if self._replaced is not None:
            expected = self._replaced[1]
            found = found if inode == self._replaced[0] else {}
        if changed := [name for name in {*found, *expected} if found.get(name) != expected.get(name)]:
            raise OutputError(
                f"was written to meanwhile: {some(changed)}",
                where=self.target,
                hint="move that away, and run again",
                details=sorted(changed) if len(changed) > 1 else (),
            )

    def commit(self) -> None:
        """Flush the folder, put it in the target's place, flush the parent.

        Raises:
            OutputError: Somebody else wrote there, or the rename failed, and the target is as it was; or the parent
                could not be flushed.
        """
        with uninterrupted():
            self.check_unchanged()
            try:
                if self._fills:
                    self._fill()
                else:
                    self._put_in_place()
            except OSError as error:
                raise OutputError(f"cannot be put in place: {error.strerror}", where=self.target) from error
            finally:
                if self._committed:
                    self.notes += self._names.clear_removed()

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
        with nullcontext() if stopped else uninterrupted():
            self._leave(keep=keep)

    def _put_in_place(self) -> None:
        """Rename the folder to the target, and what it replaces out of the way."""
        names, replaced = self._names, self._replaced is not None
        if replaced:
            os.fchmod(self._fd, stat.S_IMODE(self.target.stat().st_mode))
        if self._flush:
            os.fsync(self._fd)
        if replaced:
            self.target.rename(names.old)
        try:
            self.folder.rename(self.target)
        except OSError:
            if replaced:
                names.old.rename(self.target)
            raise
        self._committed = True
        try:
            if self._flush:
                flush_folder(self.target.parent)
        finally:
            if replaced:
                # What is being removed must never be taken for what a swap that was cut short left.
                with suppress(FileNotFoundError):
                    names.old.rename(names.free_removed())

    def _fill(self) -> None:
        """Move everything into the target, the last files last."""
        fill(self.folder, self.target, last=self._last, left=(JOURNAL_FILE,), flush=self._flush)
        self._committed = True
        try:
            if self._flush:
                flush_folder(self.target)
        finally:
            with suppress(OSError):
                for name in (JOURNAL_FILE, MOVES_FILE):
                    (self.folder / name).unlink(missing_ok=True)
                self.folder.rmdir()

    def _make_parents(self) -> None:
        parents = [folder for folder in self.folder.parents if not os.path.exists(folder)]  # noqa: PTH110 - as above
        for folder in reversed(parents):
            folder.mkdir(exist_ok=True)
            self._made.insert(0, folder)

    def _take(self) -> None:
        """Take the staging folder, inside the target where that is empty and beside it elsewhere."""
        attempts = LOCK_ATTEMPTS
        while True:
            self._fills = self._is_empty()
            self.folder = self.target / INSIDE if self._fills else self._names.staging
            self._lock()
            if self._fills == self._is_empty() or not attempts:
                break
            # Another run has filled the target, or taken it away.
            attempts -= 1
            self._leave(keep=not self._made)
            self._made.clear()
        if self._fills:
            take_back(self.target)
        else:
            self._settle_old()
            os.fchmod(self._fd, usual_mode(0o777))
        if not self._resume:
            clear(self.folder)

    def _is_empty(self) -> bool:
        """Whether the target is a folder that has nothing in it but what a killed run left."""
        try:
            return self.target.is_dir() and set(os.listdir(self.target)) <= leftovers(self.target)  # noqa: PTH208
        except OSError:
            return False

    def _settle_old(self) -> None:
        """Put back a folder that was to be replaced when a run was killed; or see to it that it never comes back.

        The staging folder lies beside it until the very rename that puts that into the target's place.
        """
        old = self._names.old
        if not os.path.lexists(old):
            return
        check_own_folder(old)
        if not os.path.lexists(self.target) and not self._made_folder:
            old.rename(self.target)
            return
        check_ours(old, self._listing)
        with suppress(FileNotFoundError):  # the run that replaced it is just about to
            old.rename(self._names.free_removed())

    def _note_replaced(self) -> None:
        """Note what is in the target that is replaced; the new folder gets its mode, group and attributes."""
        status = self.target.stat()
        self._replaced = status.st_ino, take_snapshot(self.target, frozenset({INSIDE}))
        if not self._replaced[1]:
            raise OutputError("was made meanwhile by somebody else", where=self.target, hint="run again")
        check_ours(self.target, self._listing, ignored=frozenset(leftovers(self.target)), thoroughly=True)
        if os.fstat(self._fd).st_gid != status.st_gid:
            with suppress(PermissionError):
                os.fchown(self._fd, -1, status.st_gid)
        if hasattr(os, "listxattr"):
            with suppress(OSError):  # a disk without them
                for name in os.listxattr(self.target):
                    os.setxattr(self._fd, name, os.getxattr(self.target, name))
        # The owner must be able to write until the commit.
        os.fchmod(self._fd, stat.S_IMODE(status.st_mode) | stat.S_IRWXU)

    def _lock(self) -> None:
        """Take the folder; another process may rename or remove it between any two calls, so look again afterwards."""
        attempts = LOCK_ATTEMPTS
        while True:
            check_own_folder(self.folder)
            try:
                self._make_parents()
                if not self.folder.exists():
                    self.folder.mkdir(exist_ok=True)
                    self._made.insert(0, self.folder)
                fd = lock_folder(self.folder, follow_links=False)
            except BlockingIOError:
                # It is the other's now, even if it was made here: empty as it is, it must not be removed.
                self._made = [folder for folder in self._made if folder != self.folder]
                raise OutputError("another conversion is writing there", where=self.target) from None
            except FileNotFoundError:
                # Another run has just removed what it had made; but some paths never come to be: /proc/no/such.
                attempts -= 1
                if not attempts:
                    raise
                continue
            if fd is not None:
                self._fd = fd
                if os.fstat(fd).st_uid != os.geteuid() and not self._made_folder:
                    check_own_folder(self.folder)
                return

    def _is_worth_keeping(self) -> bool:
        return self._resume and self._fd >= 0 and (self.folder / JOURNAL_FILE).exists()

    def _is_needed(self) -> bool:
        """Whether the next run needs the folder to set right what a killed one left and this one could not."""
        try:
            if self._fills:
                return bool(moved_files(self.target))
            return os.path.lexists(self._names.old) and not os.path.lexists(self.target) and not self._made_folder
        except OSError:
            return True

    @property
    def _made_folder(self) -> bool:
        return self.folder in self._made

    def _leave(self, *, keep: bool) -> None:
        """Remove what was made, unless it was put in place or is kept, and let go of the lock."""
        if not self._committed and not keep:
            if self._fd >= 0 and not self._is_needed():
                shutil.rmtree(self.folder, ignore_errors=True)
            for folder in self._made:
                with suppress(OSError):
                    folder.rmdir()
        if self._fd >= 0:
            # A folder's descriptor: nothing is lost with it, and the lock goes with the process at the latest.
            with suppress(OSError):
                os.close(self._fd)
            self._fd = -1
