"""The copy loop: each chunk of a source is read once and written to all of its targets, on one or two threads."""

import os
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from queue import LifoQueue
from typing import Final

from t5g2convert.checkpoint.header import element_bytes
from t5g2convert.conversion.write.hashing import Hashers
from t5g2convert.conversion.write.numerics import first_nonfinite
from t5g2convert.errors import CheckpointError, OutputError
from t5g2convert.progress import Progress

CHUNK_BYTES: Final = 1 << 18
"""Bytes of a read; a multiple of every element size."""

BUFFERS: Final = 12
"""Maximum number of chunks in memory: being read, written or hashed."""


@dataclass(frozen=True, slots=True)
class Job:
    """A source range and its targets.

    Attributes:
        tensor: Name of the source tensor.
        dtype: Its safetensors dtype.
        file: Name of the source file.
        fd: Descriptor of the source file.
        start: First byte of the range in the source file.
        end: The byte after the last.
        targets: Name, descriptor and position in each shard that the range is written to.
        target_dtype: The safetensors dtype of all targets.
        cast: Casts a chunk to the target's dtype; None copies it.
    """

    tensor: str
    dtype: str
    file: str
    fd: int
    start: int
    end: int
    targets: tuple[tuple[str, int, int], ...]
    target_dtype: str
    cast: Callable[[memoryview], memoryview] | None


@contextmanager
def output_errors(path: Path) -> Iterator[None]:
    """Turn an OSError in the block into an OutputError that names the file."""
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror or error}", where=path) from error


@dataclass(slots=True)
class _Buffer:
    """The memory of a chunk; it returns to the pool when its last user releases it."""

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
    """Run jobs on one or more threads.

    Args:
        jobs: The ranges to copy.
        hashers: Hashers that get every chunk in order, which requires a single copying thread; a shard's hasher is
            closed when its last byte is written. None to hash nothing.
        progress: Called with the number of bytes written, for every chunk.
        allow_nonfinite: Copy NaN and infinity. Otherwise the first one stops the writing, but the rest is still read to
            find all tensors with NaN or infinity.
    """

    def __init__(
        self, jobs: Sequence[Job], hashers: Hashers | None, progress: Progress, *, allow_nonfinite: bool = False
    ) -> None:
        self.pieces = _pieces(jobs)
        self.hashers, self.progress, self.allow_nonfinite = hashers, progress, allow_nonfinite
        self.nonfinite: dict[tuple[str, str], tuple[int, str]] = {}
        """The first NaN or infinity of each tensor that holds one, by file and tensor: its element, and which it is."""
        self.missing: Counter[str] = Counter()
        for job in jobs:
            for shard, _, _ in job.targets:
                self.missing[shard] += (job.end - job.start) // element_bytes(job.dtype)
        # Last in, first out: the most recently used buffer is still in the processor's cache.
        self.pool: LifoQueue[_Buffer] = LifoQueue()
        for _ in range(BUFFERS):
            self.pool.put(_Buffer(self.pool))
        self.lock = threading.Lock()
        self.failure: BaseException | None = None

    def run(self, threads: int) -> None:
        """Copy everything; the first failure of a thread stops all threads and is raised."""
        helpers = [threading.Thread(target=self._guarded, daemon=True) for _ in range(threads - 1)]
        for helper in helpers:
            helper.start()
        try:
            self._work()
            for helper in helpers:
                helper.join()
        except BaseException as error:
            # This also handles a signal during the wait: the other threads must stop before their files are closed.
            self.failure = self.failure or error
            for helper in helpers:
                helper.join()
            raise
        if self.failure is not None:
            raise self.failure

    def _guarded(self) -> None:
        try:
            self._work()
        except BaseException as error:  # noqa: BLE001 - the thread of `run` raises it again
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
        first = (start - job.start) // element_bytes(job.dtype)
        self._check_finite(job, first, first_nonfinite(data, job.dtype))
        if self.allow_nonfinite or not self.nonfinite:
            self._write(job, start, first, data, buffer)
        self.progress(len(data) // element_bytes(job.dtype) * element_bytes(job.target_dtype) * len(job.targets))

    def _check_finite(self, job: Job, first: int, found: tuple[int, str] | None) -> None:
        if found is not None:
            with self.lock:
                known = self.nonfinite.get((job.file, job.tensor))
                self.nonfinite[job.file, job.tensor] = min(
                    known or (first + found[0], found[1]), (first + found[0], found[1])
                )

    def _write(self, job: Job, start: int, first: int, data: memoryview, buffer: _Buffer) -> None:
        if self.hashers is not None:
            buffer.hold()
            self.hashers.sources[job.file].feed(start, data, buffer.release)
        result = data if job.cast is None else job.cast(data)
        for shard, fd, at in job.targets:
            offset = at + first * element_bytes(job.target_dtype)
            with output_errors(Path(shard)):
                write_exactly(fd, result, offset)
            if self.hashers is not None:
                buffer.hold()
                self.hashers.shards[shard].feed(offset, result, buffer.release)
                self.missing[shard] -= len(data) // element_bytes(job.dtype)
                if not self.missing[shard]:
                    self.hashers.shards[shard].close()


def _pieces(jobs: Sequence[Job]) -> Iterator[tuple[Job, int, int]]:
    for job in jobs:
        for start in range(job.start, job.end, CHUNK_BYTES):
            yield job, start, min(start + CHUNK_BYTES, job.end)


def read_exactly(fd: int, data: memoryview, offset: int, file: str) -> None:
    """Fill `data` with bytes of a source file, from a position on.

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
            raise CheckpointError(f"ends at byte {offset + done}", where=file, hint="it was truncated meanwhile")
        done += count


def write_exactly(fd: int, data: memoryview, offset: int) -> None:
    """Write all of `data` at a position in a file.

    Raises:
        OSError: The disk is full or fails.
    """
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
