"""The writer: executes a plan's byte copies in bounded memory, and knows nothing but the plan.

A source range that serves both stacks is read once and written twice. Nothing is decoded unless it is cast.
"""

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Final

from t5g2convert.checkpoint.dtypes import element_bytes
from t5g2convert.checkpoint.header import FileIdentity, TensorEntry, encode_header
from t5g2convert.conversion.contents import caster, scaled_row
from t5g2convert.conversion.hashing import FileHasher
from t5g2convert.conversion.plan import Plan, PlannedTensor, SourceRange
from t5g2convert.errors import CheckpointError, OutputError

CHUNK_BYTES: Final = 1 << 20
"""Bytes read at once; a multiple of every element size."""

BUFFERS: Final = 8
"""Chunks in flight: read, being written, or waiting to be hashed."""

BASE_BYTES: Final = 44_000_000
"""What the interpreter and the libraries take (measured, CPython 3.11 on Linux)."""

COPY_THREADS: Final = 2
"""Threads that copy where nothing is hashed; hashing needs the bytes in order, so one copies then."""

Progress = Callable[[int], None]
"""Called with the bytes just written, from any thread."""


@dataclass(frozen=True, slots=True)
class Written:
    """sha256 by file name, hexadecimal; empty where hashing was switched off."""

    sources: dict[str, str]
    shards: dict[str, str]


def peak_memory(plan: Plan) -> int:
    """Bytes of memory that a conversion is expected to take at its peak; the size of the model does not matter."""
    casting = any(tensor.content.kind == "cast" for tensor in plan.tensors)
    return BASE_BYTES + BUFFERS * CHUNK_BYTES + (BUFFERS * 4 * CHUNK_BYTES if casting else 0)


def write_shards(plan: Plan, source: Path, folder: Path, *, hashing: bool, flush: bool, progress: Progress) -> Written:
    """Write all shards of a plan.

    Args:
        plan: The plan.
        source: The checkpoint folder that was planned.
        folder: An empty folder for the shards.
        hashing: Compute sha256 of all source and target files in the same pass.
        flush: Wait until the disk has every byte.
        progress: Told of every piece written.

    Raises:
        CheckpointError: The source changed since it was planned, or has values that cannot be cast.
        OutputError: The disk is full or fails.
    """
    with ExitStack() as stack:
        sources = _open_sources(plan, source, stack)
        _check_repeated(plan, sources)
        shards = _create_shards(plan, folder, stack)
        _write_computed(plan, sources, shards, progress)
        hashers = _Hashers(plan, sources, shards) if hashing else None
        if hashers is not None:
            stack.callback(hashers.abandon)
        _Copier(_jobs(plan, sources, shards), hashers, progress).run(1 if hashing else COPY_THREADS)
        if hashers is not None:
            hashers.close()
        if flush:
            for name, fd in shards.items():
                with _output_errors(folder / name):
                    os.fsync(fd)
        written = Written({}, {}) if hashers is None else hashers.results()
        _check_unchanged(plan, sources, source)
    return written


@dataclass(frozen=True, slots=True)
class _Job:
    """One source range and the places that it goes to."""

    name: str
    file: str
    fd: int
    start: int
    end: int
    targets: tuple[tuple[str, int, int], ...]
    cast: Callable[[memoryview], memoryview] | None
    source_width: int
    target_width: int


class _output_errors:  # noqa: N801 - a context manager that reads as one
    """Turns an OSError into an OutputError that names the file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, OSError):
            raise OutputError(f"cannot be written: {error.strerror or error}", where=self.path) from error


class _Hashers:
    """A hasher for every source and target file; headers and computed tensors are written already."""

    def __init__(self, plan: Plan, sources: dict[str, int], shards: dict[str, int]) -> None:
        self.sources = {
            file.name: FileHasher(sources[file.name], file.identity.size, there=file.identity.size)
            for file in plan.source_files
        }
        first_copied = {shard.name: shard.size for shard in plan.shards}
        for tensor in plan.tensors:
            if tensor.content.kind in ("copy", "cast"):
                first_copied[tensor.shard] = min(first_copied[tensor.shard], tensor.start)
        self.shards = {
            shard.name: FileHasher(shards[shard.name], shard.size, there=first_copied[shard.name])
            for shard in plan.shards
        }

    def close(self) -> None:
        for hasher in (*self.sources.values(), *self.shards.values()):
            hasher.close()

    def abandon(self) -> None:
        for hasher in (*self.sources.values(), *self.shards.values()):
            hasher.abandon()

    def results(self) -> Written:
        return Written(
            {name: hasher.hexdigest() for name, hasher in self.sources.items()},
            {name: hasher.hexdigest() for name, hasher in self.shards.items()},
        )


@dataclass(slots=True)
class _Buffer:
    """A chunk's memory, back in the pool when the last reader has released it."""

    pool: "SimpleQueue[_Buffer]"
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


class _Copier:
    """Runs jobs on one or more threads."""

    def __init__(self, jobs: Sequence[_Job], hashers: _Hashers | None, progress: Progress) -> None:
        self.pieces = _pieces(jobs)
        self.hashers, self.progress = hashers, progress
        self.pool: SimpleQueue[_Buffer] = SimpleQueue()
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

    def _copy(self, job: _Job, start: int, end: int, buffer: _Buffer) -> None:
        data = memoryview(buffer.data)[: end - start]
        _read_exactly(job.fd, data, start, job.file)
        if self.hashers is not None:
            buffer.hold()
            self.hashers.sources[job.file].feed(start, data, buffer.release)
        result = data if job.cast is None else job.cast(data)
        for shard, fd, at in job.targets:
            offset = at + (start - job.start) // job.source_width * job.target_width
            with _output_errors(Path(shard)):
                _write_exactly(fd, result, offset)
            if self.hashers is not None:
                buffer.hold()
                self.hashers.shards[shard].feed(offset, result, buffer.release)
        self.progress(len(result) * len(job.targets))


def _open_sources(plan: Plan, source: Path, stack: ExitStack) -> dict[str, int]:
    opened: dict[str, int] = {}
    for file in plan.source_files:
        try:
            fd = os.open(source / file.name, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot be opened: {error.strerror}", where=source / file.name) from None
        stack.callback(os.close, fd)
        opened[file.name] = fd
    _check_unchanged(plan, opened, source)
    return opened


def _check_unchanged(plan: Plan, sources: dict[str, int], source: Path) -> None:
    for file in plan.source_files:
        if FileIdentity.of(sources[file.name]) != file.identity:
            raise CheckpointError("changed while it was being read", where=source / file.name, hint="start again")


def _check_repeated(plan: Plan, sources: dict[str, int]) -> None:
    """Compare the dropped tensors that must repeat another, a chunk at a time."""
    for drop in plan.dropped:
        other = drop.must_equal
        if other is None:
            continue
        one = drop.content
        equal = one.end - one.start == other.end - other.start
        for position in range(0, one.end - one.start, CHUNK_BYTES):
            if not equal:
                break
            length = min(CHUNK_BYTES, one.end - one.start - position)
            equal = _read(sources, one, position, length) == _read(sources, other, position, length)
        if not equal:
            raise CheckpointError(
                f"differs from the embedding, although {drop.because}",
                where=f"tensor {drop.name}",
                hint="T5Gemma 2 has one matrix for both; an untied model cannot be converted exactly",
            )


def _read(sources: dict[str, int], source: SourceRange, position: int, length: int) -> bytearray:
    data = bytearray(length)
    _read_exactly(sources[source.file], memoryview(data), source.start + position, source.file)
    return data


def _create_shards(plan: Plan, folder: Path, stack: ExitStack) -> dict[str, int]:
    """Create all shards in their final size, with their headers."""
    created: dict[str, int] = {}
    tensors: dict[str, list[PlannedTensor]] = {shard.name: [] for shard in plan.shards}
    for tensor in plan.tensors:
        tensors[tensor.shard].append(tensor)
    for shard in plan.shards:
        with _output_errors(folder / shard.name):
            fd = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, fd)
            created[shard.name] = fd
            os.ftruncate(fd, shard.size)
            header = encode_header(
                TensorEntry(
                    tensor.name,
                    tensor.dtype,
                    tensor.shape,
                    tensor.start - shard.header_size,
                    tensor.end - shard.header_size,
                )
                for tensor in tensors[shard.name]
            )
            assert len(header) == shard.header_size, "the plan counted this header"
            _write_exactly(fd, memoryview(header), 0)
    return created


def _write_computed(plan: Plan, sources: dict[str, int], shards: dict[str, int], progress: Progress) -> None:
    """Write the tensors that are not copied from a range."""
    for tensor in plan.tensors:
        content = tensor.content
        if content.kind not in ("zeros", "scaled_row"):
            continue
        data = bytes(tensor.nbytes)
        if content.kind == "scaled_row" and content.source is not None:
            row = _read(sources, content.source, 0, content.source.end - content.source.start)
            data = scaled_row(bytes(row), content.dtype, tensor.dtype)
        with _output_errors(Path(tensor.shard)):
            _write_exactly(shards[tensor.shard], memoryview(data), tensor.start)
        progress(len(data))


def _jobs(plan: Plan, sources: dict[str, int], shards: dict[str, int]) -> list[_Job]:
    """One job for each source range, in the order of the source, with all of its targets."""
    by_source: dict[SourceRange, list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        if tensor.content.kind in ("copy", "cast") and tensor.content.source is not None and tensor.nbytes:
            by_source.setdefault(tensor.content.source, []).append(tensor)
    jobs = []
    for source in sorted(by_source, key=lambda item: (item.file, item.start)):
        targets = by_source[source]
        first = targets[0]
        cast = None
        if first.content.kind == "cast":
            cast = caster(first.name, first.content.dtype, first.dtype)
        jobs.append(
            _Job(
                first.name,
                source.file,
                sources[source.file],
                source.start,
                source.end,
                tuple((tensor.shard, shards[tensor.shard], tensor.start) for tensor in targets),
                cast,
                element_bytes(first.content.dtype),
                element_bytes(first.dtype),
            )
        )
    return jobs


def _pieces(jobs: Sequence[_Job]) -> Iterator[tuple[_Job, int, int]]:
    for job in jobs:
        for start in range(job.start, job.end, CHUNK_BYTES):
            yield job, start, min(start + CHUNK_BYTES, job.end)


def _read_exactly(fd: int, data: memoryview, offset: int, file: str) -> None:
    done = 0
    while done < len(data):
        try:
            count = os.preadv(fd, [data[done:]], offset + done)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=file) from error
        if count == 0:
            raise CheckpointError(f"ends at byte {offset + done}", where=file, hint="it was cut while it was read")
        done += count


def _write_exactly(fd: int, data: memoryview, offset: int) -> None:
    done = 0
    while done < len(data):
        done += os.pwrite(fd, data[done:], offset + done)
