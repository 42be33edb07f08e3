"""The staging folder: all files are written to it, and one rename makes the target complete.

::

    new        .OUT.t5g2-staging becomes OUT
    replaced   OUT becomes .OUT.t5g2-old, .OUT.t5g2-staging becomes OUT,
               .OUT.t5g2-old becomes .OUT.t5g2-removed, which is removed and never put back
    filled     the files in OUT/.t5g2-staging are moved into OUT; the last one makes it a checkpoint
"""

import os
import shutil
import stat
from collections.abc import Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from t5g2convert.checkpoint.atomic_write import clear, flush_folder, lock_folder, usual_mode
from t5g2convert.checkpoint.folder import some
from t5g2convert.checkpoint.manifest import MANIFEST_FILE
from t5g2convert.conversion.output.ownership import (
    Listing,
    Snapshot,
    check_ours,
    check_own_folder,
    manifest_listing,
    take_snapshot,
)
from t5g2convert.conversion.output.path_rules import check_vacant
from t5g2convert.conversion.output.recovery import (
    INSIDE,
    JOURNAL_FILE,
    MOVES_FILE,
    WorkFolders,
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
"""Moved last into a folder that is filled: without these files, no tool mistakes it for a checkpoint."""


class Staging:
    """Context manager of a locked staging folder; it is removed on exit unless it was committed or is kept.

    The folder is next to the target, or inside a target that exists and is empty. The lock is on the folder itself and
    ends with the process. Another run of the same user may remove a folder that is not locked.

    Example:
        >>> with Staging(Path("out")) as staging:
        ...     (staging.folder / "config.json").write_text("{}")
        ...     staging.commit()

    Attributes:
        target: The folder to write, without links.
        folder: The staging folder.
        notes: After the commit, the replaced folders that could not be removed.

    Args:
        target: The folder to write.
        overwrite: Whether to replace an output of t5g2.
        flush: Whether to flush the folder and its parent to the disk around the rename.
        resume: Whether to keep the files that an earlier run left in the folder, and to leave this run's finished files
            if it is stopped or the disk fails.
        kept_hint: With this hint, a folder that has a journal is left after any failure, whether or not `resume`. It is
            moved into place with its journal, which is removed there.
        listing: Returns the files of an output to replace.
        last: Files that are moved last into a target that is filled.
        thoroughly: Whether to compare the sha256 of every file of an output to replace, not only its size.
    """

    def __init__(
        self,
        target: Path,
        *,
        overwrite: bool = False,
        flush: bool = True,
        resume: bool = False,
        kept_hint: str | None = None,
        listing: Listing = manifest_listing,
        last: Sequence[str] = LAST_FILES,
        thoroughly: bool = True,
    ) -> None:
        self._given, self.target = target, real_path(target)
        self._work = WorkFolders.of(self.target)
        self.folder = self._work.staging
        self.notes: list[str] = []
        self._overwrite, self._flush, self._resume, self._kept_hint = overwrite, flush, resume, kept_hint
        self._listing, self._last, self._thoroughly = listing, last, thoroughly
        self._fills = False
        self._replaced: tuple[int, Snapshot] | None = None
        self._fd = -1
        self._made: list[Path] = []
        self._committed = False

    def __enter__(self) -> Self:
        try:
            with uninterrupted():
                self._take()
            # Check again under the lock: another run may have filled the target since.
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
        """Refuse to continue if another process has changed the target since the start.

        Raises:
            OutputError: The target has changed; the error names the changed files, which are kept.
        """
        try:
            there = os.path.lexists(self.target)
            found = take_snapshot(self.target, frozenset({INSIDE})) if there else {}
            inode = self.target.stat().st_ino if there else None
        except OSError as error:
            raise OutputError(f"cannot be read: {error.strerror}", where=self.target) from error
        if there and not self._fills and self._replaced is None:
            raise OutputError("was created by another process", where=self.target, hint="choose another folder")
        expected: Snapshot = {}
        if self._replaced is not None:
            expected = self._replaced[1]
            found = found if inode == self._replaced[0] else {}
        if changed := [name for name in {*found, *expected} if found.get(name) != expected.get(name)]:
            raise OutputError(
                f"was changed by another process: {some(changed)}",
                where=self.target,
                hint="move them away, and run again",
                details=sorted(changed) if len(changed) > 1 else (),
            )

    def commit(self) -> None:
        """Flush the folder, move it to the target, and flush the parent.

        Raises:
            OutputError: Another process has changed the target, or the rename failed: the target is then as before. Or
                the parent could not be flushed.
        """
        with uninterrupted():
            self.check_unchanged()
            try:
                if self._fills:
                    self._fill()
                else:
                    self._put_in_place()
            except OSError as error:
                raise OutputError(f"cannot be moved into place: {error.strerror}", where=self.target) from error
            finally:
                if self._committed:
                    self.notes += self._work.clear_removed()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # After one signal, the next one must end the process at once, even during the cleanup.
        stopped = isinstance(error, (Interrupted, KeyboardInterrupt))
        # Finished shards stay valid when the disk fails, but not when the source is faulty.
        failed = isinstance(error, OutputError) or isinstance(getattr(error, "__cause__", None), OSError)
        keep = (stopped or failed or self._kept_hint is not None) and self._is_worth_keeping()
        if keep and isinstance(error, T5g2Error):
            if self._kept_hint is None:
                error.hint = "finished shards are kept; continue with --resume"
            elif "--resume" not in (error.hint or ""):
                error.hint = "; ".join(filter(None, [error.hint, self._kept_hint]))
        with nullcontext() if stopped else uninterrupted():
            self._leave(keep=keep)

    def _put_in_place(self) -> None:
        """Rename the folder to the target, after moving the replaced folder away."""
        work, replaced = self._work, self._replaced is not None
        if replaced:
            os.fchmod(self._fd, stat.S_IMODE(self.target.stat().st_mode))
        if self._flush:
            os.fsync(self._fd)
        if replaced:
            self.target.rename(work.old)
        try:
            self.folder.rename(self.target)
        except OSError:
            if replaced:
                work.old.rename(self.target)
            raise
        self._committed = True
        try:
            if self._kept_hint is not None:
                # Not before: a run that is killed here would lose its work.
                (self.target / JOURNAL_FILE).unlink(missing_ok=True)
            if self._flush:
                flush_folder(self.target.parent)
        finally:
            if replaced:
                # A folder to remove must never look like one left by an interrupted swap.
                with suppress(FileNotFoundError):
                    work.old.rename(work.free_removed())

    def _fill(self) -> None:
        """Move everything into the target."""
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
        """Create and lock the staging folder: inside the target if that is empty, otherwise next to it."""
        attempts = LOCK_ATTEMPTS
        while True:
            self._fills = self._is_empty()
            self.folder = self.target / INSIDE if self._fills else self._work.staging
            self._lock()
            if self._fills == self._is_empty() or not attempts:
                break
            # Another run has filled or removed the target.
            attempts -= 1
            self._leave(keep=not self._made)
            self._made.clear()
        if self._fills:
            take_back(self.target, keep=self._resume)
        else:
            self._settle_old()
            os.fchmod(self._fd, usual_mode(0o777))
        if not self._resume:
            clear(self.folder)

    def _is_empty(self) -> bool:
        """Return whether the target folder contains at most the remains of a killed run."""
        try:
            return self.target.is_dir() and set(os.listdir(self.target)) <= leftovers(self.target)  # noqa: PTH208
        except OSError:
            return False

    def _settle_old(self) -> None:
        """Move back the folder that a killed run was replacing, or mark it for removal if the replacement succeeded.

        If the staging folder still exists, the replacement did not succeed: the rename to the target ends it.
        """
        old = self._work.old
        if not os.path.lexists(old):
            return
        check_own_folder(old)
        if not os.path.lexists(self.target) and not self._made_folder:
            old.rename(self.target)
            return
        check_ours(old, self._listing)
        with suppress(FileNotFoundError):  # the run that replaced it may do the same
            old.rename(self._work.free_removed())

    def _note_replaced(self) -> None:
        """Record the target to replace, and give the new folder its mode, group and attributes."""
        status = self.target.stat()
        self._replaced = status.st_ino, take_snapshot(self.target, frozenset({INSIDE}))
        if not self._replaced[1]:
            raise OutputError("was created by another process", where=self.target, hint="run again")
        ignored = frozenset(leftovers(self.target))
        check_ours(self.target, self._listing, ignored=ignored, thoroughly=self._thoroughly)
        if os.fstat(self._fd).st_gid != status.st_gid:
            with suppress(PermissionError):
                os.fchown(self._fd, -1, status.st_gid)
        if hasattr(os, "listxattr"):
            with suppress(OSError):  # the disk does not support attributes
                for name in os.listxattr(self.target):
                    os.setxattr(self._fd, name, os.getxattr(self.target, name))
        # Until the commit, the owner must be able to write.
        os.fchmod(self._fd, stat.S_IMODE(status.st_mode) | stat.S_IRWXU)

    def _lock(self) -> None:
        """Lock the folder, and check it afterwards: another process may rename or remove it between any two calls."""
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
                # The folder belongs to the other run now, even if this one created it, and must not be removed.
                self._made = [folder for folder in self._made if folder != self.folder]
                raise OutputError("another conversion is writing to it", where=self.target) from None
            except FileNotFoundError:
                # Another run has just removed the folder, so try again; but some paths can never exist: /proc/no/such.
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
        wanted = self._resume or self._kept_hint is not None
        return wanted and self._fd >= 0 and (self.folder / JOURNAL_FILE).exists()

    def _is_needed(self) -> bool:
        """Return whether the next run needs the folder to recover from a killed run that this one could not recover."""
        try:
            if self._fills:
                return bool(moved_files(self.target))
            return os.path.lexists(self._work.old) and not os.path.lexists(self.target) and not self._made_folder
        except OSError:
            return True

    @property
    def _made_folder(self) -> bool:
        return self.folder in self._made

    def _leave(self, *, keep: bool) -> None:
        """Remove the created folders, unless they were committed or are kept, and release the lock."""
        if not self._committed and not keep:
            if self._fd >= 0 and not self._is_needed():
                shutil.rmtree(self.folder, ignore_errors=True)
            for folder in self._made:
                with suppress(OSError):
                    folder.rmdir()
        if self._fd >= 0:
            # An error here is harmless: the lock ends with the process at the latest.
            with suppress(OSError):
                os.close(self._fd)
            self._fd = -1
