"""The journal of finished shards, used by `--resume` to continue an interrupted conversion.

It is a file in the staging folder with a line for each complete shard; it is removed before the folder is moved into
place. A line counts only if the plan and the source files are the same and the shard still has the sha256 in the line,
so stale, torn and repeated lines are harmless.
"""

import hashlib
import json
import os
import stat
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import astuple
from pathlib import Path

from t5g2convert.checkpoint.atomic_write import clear, usual_mode
from t5g2convert.checkpoint.file_store import HASH_THREADS, sha256_of
from t5g2convert.conversion.output.recovery import JOURNAL_FILE
from t5g2convert.conversion.plan.types import Plan, Shard
from t5g2convert.errors import OutputError
from t5g2convert.version import __version__


class Journal:
    """The finished shards of one plan in one staging folder.

    Args:
        folder: The staging folder.
        plan: The plan that is executed.
        allow_nonfinite: Whether the shards may hold NaN or infinity.
        flush: Whether to wait until the disk has each line.
    """

    def __init__(self, folder: Path, plan: Plan, *, allow_nonfinite: bool, flush: bool) -> None:
        self.path = folder / JOURNAL_FILE
        self._plan, self._flush = plan, flush
        self._fingerprint = _fingerprint(plan, allow_nonfinite=allow_nonfinite)
        self._lock = threading.Lock()

    def add(self, shard: str, sha256: str) -> None:
        """Record a finished shard; may be called from any thread.

        Raises:
            OutputError: The line cannot be written.
        """
        # The leading line feed ends a line that an interrupted run left torn.
        line = "\n" + json.dumps({"plan": self._fingerprint, "shard": shard, "sha256": sha256}) + "\n"
        try:
            with self._lock, self.path.open("a") as file:
                file.write(line)
                if self._flush:
                    file.flush()
                    os.fsync(file.fileno())
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=self.path) from error

    def salvage(self) -> dict[str, str]:
        """Return an earlier run's shards that can be kept, with their sha256; remove everything else in the folder.

        Raises:
            OutputError: The folder cannot be read or cleared.
        """
        try:
            noted = self._read()
            with ThreadPoolExecutor(HASH_THREADS) as pool:
                sound = pool.map(lambda shard: self._is_sound(shard, noted), self._plan.shards)
                kept = {
                    shard.name: noted[shard.name] for shard, good in zip(self._plan.shards, sound, strict=True) if good
                }
            clear(self.path.parent, keep={JOURNAL_FILE, *kept} if kept else ())
            for name in kept:
                self._adopt(self.path.parent / name)
        except OSError as error:
            raise OutputError(f"cannot be resumed: {error.strerror}", where=self.path.parent) from error
        return kept

    def prune(self) -> None:
        """Remove everything but the finished shards and this journal; remove the journal too if it lists none."""
        with suppress(OSError):
            noted = self._read()
            clear(self.path.parent, keep={JOURNAL_FILE, *noted} if noted else ())

    def remove(self) -> None:
        """Remove the journal from a complete folder.

        Raises:
            OutputError: The journal cannot be removed.
        """
        try:
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"cannot be removed: {error.strerror}", where=self.path) from error

    def _read(self) -> dict[str, str]:
        """Return the sha256 by shard, from complete lines of this plan."""
        noted: dict[str, str] = {}
        if not _is_own_file(self.path):
            return noted
        for line in self.path.read_text(errors="replace").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and entry.get("plan") == self._fingerprint:
                noted[str(entry.get("shard"))] = str(entry.get("sha256"))
        return noted

    def _is_sound(self, shard: Shard, noted: Mapping[str, str]) -> bool:
        path = self.path.parent / shard.name
        try:
            return (
                shard.name in noted
                and _is_own_file(path)
                and path.stat().st_size == shard.size
                and sha256_of(path) == noted[shard.name]
            )
        except OSError:
            return False  # the shard is written again

    def _adopt(self, path: Path) -> None:
        """Set the usual permissions of a kept shard, and flush it: the run that wrote it may have done neither."""
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fchmod(fd, usual_mode(0o666))
            if self._flush:
                os.fsync(fd)
        finally:
            os.close(fd)


def _fingerprint(plan: Plan, *, allow_nonfinite: bool) -> str:
    """Return the sha256 of everything that determines the bytes of a shard."""
    # Notes and files that are not copied do not affect shards.
    document = {key: value for key, value in plan.to_json().items() if key not in ("notes", "source_files")}
    decides = {
        "version": __version__,
        "plan": document,
        # Without the device: its number may change at a restart.
        "source": [(file.name, *astuple(file.identity)[1:]) for file in plan.source_files],
        "allow_nonfinite": allow_nonfinite,
    }
    return hashlib.sha256(json.dumps(decides).encode()).hexdigest()


def _is_own_file(path: Path) -> bool:
    """Return whether a path is a regular file of this user without other hard links."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        return False
    return stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and status.st_uid == os.geteuid()
