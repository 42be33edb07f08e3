"""Copying byte ranges: read a chunk once, write it to every place that it goes to, on one thread or on two."""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import LifoQueue
from typing import Final

from t5g2convert.conversion.hashing import Hashers
from t5g2convert.errors import CheckpointError, OutputError

CHUNK_BYTES: Final = 1 << 19
"""Bytes read at once; a multiple of every element size."""

BUFFERS: Final = 12
"""Chunks in flight: read, being written, or waiting to be hashed."""

Progress = Callable[[int], None]
"""Called with the bytes just written, from any thread."""


@dataclass(frozen=True, slots=True)
class Job:
    """One source range and the places that it goes to.

    Attributes:
        file: Name of the source file.
        fd: The source file, open.
        start: First byte of the range in the source file.
        end: The byte after the last.
        targets: For each place the shard's name, the shard, open, and the position in it.
        cast: What makes the target's bytes of the source's, piece by piece; None copies them.
        source_width: Bytes of a source element.
        target_width: Bytes of a target element.
    """

    file: str
    fd: int
    start: int
    end: int
    targets: tuple[tuple[str, int, int], ...]
    cast: Callable[[memoryview], memoryview] | None
    source_width: int
    target_width: int


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an OSError of the block into an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", where=path) from error


@dataclass(slots=True)
class _Buffer:
    """A chunk's memory, back in the pool when the last reader has released it."""

    pool: "LifoQueue[_Buffer]"
    data: bytearray = field(default_factory=lambda: bytearray(CHUNK_BYTES))
    users: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    def hold(self) -> None:
        with self.lock:
            self.users += 1

    def release(self) -> None:
        with self.lock:
            self.users -= 1
            free = self.users == 0
        if free:
            self.pool.put(self)


class Copier:
    """Runs jobs on one or more threads."""

    def __init__(self, jobs: Sequence[Job], hashers: Hashers | None, progress: Progress) -> None:
        self.pieces = _pieces(jobs)
        self.hashers, self.progress = hashers, progress
        # Last in, first out: the buffer that was used last is still in the processor's cache.
        self.pool: LifoQueue[_Buffer] = LifoQueue()
        for _ in range(BUFFERS):
            self.pool.put(_Buffer(self.pool))
        self.lock = threading.Lock()
        self.failure: BaseException | None = None

    def run(self, threads: int) -> None:
        """Copy everything; the first failure of any thread stops all and is raised."""
        helpers = [threading.Thread(target=self._guarded, daemon=True) for _ in range(threads - 1)]
        for helper in helpers:
            helper.start()
        try:
            self._work()
        except BaseException as error:
            self.failure = self.failure or error
            raise
        finally:
            for helper in helpers:
                helper.join()
        if self.failure is not None:
            raise self.failure

    def _guarded(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that runs `run`
            self.failure = self.failure or error

    def _work(self) -> None:
        while self.failure is None:
            with self.lock:
                piece = next(self.pieces, None)
            if piece is None:
                return
            buffer = self.pool.get()
            buffer.hold()
            try:
                self._copy(*piece, buffer)
            finally:
                buffer.release()

    def _copy(self, job: Job, start: int, end: int, buffer: _Buffer) -> None:
        data = memoryview(buffer.data)[: end - start]
        read_exactly(job.fd, data, start, job.file)
        if self.hashers is not None:
            buffer.hold()
            self.hashers.sources[job.file].feed(start, data, buffer.release)
        result = data if job.cast is None else job.cast(data)
        for shard, fd, at in job.targets:
            offset = at + (start - job.start) // job.source_width * job.target_width
            with output_errors(Path(shard)):
                write_exactly(fd, result, offset)
            if self.hashers is not None:
                buffer.hold()
                self.hashers.shards[shard].feed(offset, result, buffer.release)
        self.progress(len(result) * len(job.targets))


def _pieces(jobs: Sequence[Job]) -> Iterator[tuple[Job, int, int]]:
    for job in jobs:
        for start in range(job.start, job.end, CHUNK_BYTES):
            yield job, start, min(start + CHUNK_BYTES, job.end)


def read_exactly(fd: int, data: memoryview, offset: int, file: str) -> None:
    """Fill `data` from a position of a source file.

    Raises:
        CheckpointError: The file cannot be read, or ends too early.
    """
    done = 0
    while done < len(data):
        try:
            count = os.preadv(fd, [data[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=file) from error
        if count == 0:
            raise CheckpointError(f"ends at byte {offset + done}", where=file, hint="it was cut while it was read")
        done += count


def write_exactly(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at a position of a file.

    Raises:
        OSError: The disk is full or fails.
    """
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
