"""The files of packed data while they are written, with their sha256, and reopened where a journal ends."""

import hashlib
import os
import stat
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict

from t5g2convert.adaptation.data.index import Count
from t5g2convert.adaptation.data.token_stream import mapped_array, shard_name
from t5g2convert.checkpoint.file_store import HASH_THREADS, sha256_of
from t5g2convert.checkpoint.manifest_section import Digest
from t5g2convert.conversion.write.copy import output_errors
from t5g2convert.errors import DataError, OutputError

BUFFER_BYTES: Final = 1 << 20


class FileState(BaseModel):
    """A file at one moment.

    Attributes:
        nbytes: Its length; later bytes do not belong to this moment.
        sha256: The sha256 of these bytes.
        kind: `open` if more is appended, `finished`, or `linked` if it is a link to a file of other data.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    nbytes: Count
    sha256: Digest
    kind: Literal["open", "finished", "linked"]


class HashedFile:
    """A file that is written sequentially, with its sha256.

    Args:
        path: The file.
        state: Its state when an earlier run wrote to it: longer files are cut. None for a new file.

    Raises:
        OutputError: The disk is full or fails; the methods raise it too. Or the file does not begin as in `state`.
    """

    def __init__(self, path: Path, state: FileState | None = None) -> None:
        self.path, self.nbytes = path, 0
        self._sha256 = hashlib.sha256()
        with output_errors(path):
            self._file: BinaryIO | None = path.open("xb", buffering=BUFFER_BYTES) if state is None else _reopen(path)
        if state is not None:
            try:
                self._go_on(self._file, state)
            except BaseException:
                self._file.close()
                raise

    def _go_on(self, file: BinaryIO, state: FileState) -> None:
        """Read the bytes of an earlier run, and cut off what follows them."""
        with output_errors(self.path):
            while block := file.read(min(BUFFER_BYTES, state.nbytes - self.nbytes)):
                self._sha256.update(block)
                self.nbytes += len(block)
            if self.sha256 != state.sha256:
                raise _damaged(self.path.parent, [self.path.name])
            file.seek(self.nbytes)
            os.ftruncate(file.fileno(), self.nbytes)

    @property
    def sha256(self) -> str:
        """The sha256 of the bytes so far, hexadecimal."""
        return self._sha256.hexdigest()

    def write(self, values: NDArray[Any] | bytes) -> None:
        """Append the bytes of an array."""
        assert self._file is not None, "the file is open"
        data = values if isinstance(values, bytes) else np.ascontiguousarray(values).tobytes()
        self._sha256.update(data)
        self.nbytes += len(data)
        with output_errors(self.path):
            self._file.write(data)

    def copy(self, source: Path, sha256: str) -> None:
        """Fill the empty file with the bytes of another one, in blocks.

        Raises:
            DataError: The other file cannot be read, or its sha256 differs.
        """
        try:
            with source.open("rb", buffering=0) as file:
                while block := file.read(BUFFER_BYTES):
                    self.write(block)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=source) from None
        if self.sha256 != sha256:
            raise DataError(
                "was modified after packing: its sha256 differs",
                where=source,
                hint="copy the file again, or pack the data again",
            )

    def state(self, *, flush: bool) -> FileState:
        """Return the state, after all bytes were given to the system and, if `flush`, to the disk."""
        if self._file is None:
            return FileState(nbytes=self.nbytes, sha256=self.sha256, kind="finished")
        with output_errors(self.path):
            self._file.flush()
            if flush:
                os.fsync(self._file.fileno())
        return FileState(nbytes=self.nbytes, sha256=self.sha256, kind="open")

    def finish(self, *, flush: bool) -> str:
        """Close the file, after a flush to disk if `flush`, and return its sha256, hexadecimal."""
        assert self._file is not None, "the file is open"
        with output_errors(self.path):
            self._file.flush()
            if flush:
                os.fsync(self._file.fileno())
            self._file.close()
        self._file = None
        return self.sha256

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            # The file is discarded, or cut when it is reopened, so errors of its last bytes do not matter.
            with suppress(OSError):
                self._file.close()


class OutputFiles:
    """All files of an output in a folder, except those that are written when the rest is complete.

    Args:
        folder: The folder to write to.
        flush: Wait until all bytes are on disk.
        kept: The files of an earlier run, by name; they are checked, and reopened by `open`.

    Raises:
        OutputError: A file of the earlier run is missing or damaged, or the disk fails.
    """

    def __init__(self, folder: Path, *, flush: bool, kept: Mapping[str, FileState] | None = None) -> None:
        self.folder, self.flush = folder, flush
        kept = kept or {}
        self._begun = {name: state for name, state in kept.items() if state.kind == "open"}
        self._closed = {name: state for name, state in kept.items() if state.kind != "open"}
        self._files: dict[str, HashedFile] = {}
        _check(folder, self._closed)
        if flush:
            # The run that wrote them may have run with --no-flush.
            for name in self._closed:
                _flush_file(folder / name)

    def open(self, name: str) -> HashedFile:
        """Create a file, or go on with the one of an earlier run."""
        self._files[name] = HashedFile(self.folder / name, self._begun.pop(name, None))
        return self._files[name]

    def finished(self, stream: str) -> list[FileState]:
        """Return the finished shards of an earlier run, in order."""
        found = list[FileState]()
        while state := self._closed.get(shard_name(stream, len(found))):
            found.append(state)
        return found

    def begun_shard(self, stream: str) -> HashedFile | None:
        """Return the shard that an earlier run did not finish, open to be appended to."""
        name = shard_name(stream, len(self.finished(stream)))
        return self.open(name) if name in self._begun else None

    def table(self, file: HashedFile, dtype: np.dtype[Any]) -> NDArray[Any]:
        """Return the rows that an earlier run left in an open file, memory-mapped."""
        return mapped_array(file.path, dtype, (file.nbytes // dtype.itemsize,))

    def link(self, source: Path, sha256: str) -> None:
        """Make a hard link to a finished file, or a copy of it where the file system has no links."""
        target = self.folder / source.name
        try:
            target.hardlink_to(source)
        except OSError:
            with self.open(source.name) as file:
                file.copy(source, sha256)
                file.finish(flush=self.flush)
        else:
            with output_errors(target):
                self._closed[source.name] = FileState(nbytes=target.stat().st_size, sha256=sha256, kind="linked")

    def states(self) -> dict[str, FileState]:
        """Return the state of each file, after all bytes were given to the system and, if they are, to the disk."""
        return self._closed | {name: file.state(flush=self.flush) for name, file in self._files.items()}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in self._files.values():
            file.__exit__(kind, error, traceback)


def _reopen(path: Path) -> BinaryIO:
    """Open a file of an earlier run to read and write it.

    Raises:
        OSError: It cannot be opened, or is a link.
        OutputError: It is not a file of this user alone.
    """
    fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    status = os.fstat(fd)
    if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1 or status.st_uid != os.geteuid():
        os.close(fd)
        raise _damaged(path.parent, [path.name])
    return os.fdopen(fd, "r+b", buffering=BUFFER_BYTES)


def _check(folder: Path, closed: Mapping[str, FileState]) -> None:
    """Refuse closed files of an earlier run that have other bytes; of linked ones, only the size is compared."""

    def is_sound(name: str) -> bool:
        path, state = folder / name, closed[name]
        try:
            status = path.lstat()
            regular = stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid()
            sized = regular and status.st_size == state.nbytes
            return sized and (state.kind == "linked" or sha256_of(path) == state.sha256)
        except OSError:
            return False

    with ThreadPoolExecutor(HASH_THREADS) as pool:
        sound = pool.map(is_sound, closed)
        if wrong := [name for name, good in zip(closed, sound, strict=True) if not good]:
            raise _damaged(folder, wrong)


def _damaged(folder: Path, names: list[str]) -> OutputError:
    return OutputError(
        f"the interrupted pack cannot be continued: {names[0]} is missing or was modified"
        + (f", and {len(names) - 1} more" if len(names) > 1 else ""),
        where=folder,
        hint="pack again without --resume",
        details=names if len(names) > 1 else (),
    )


def _flush_file(path: Path) -> None:
    with output_errors(path):
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)
