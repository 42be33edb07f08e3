"""The writer: executes a plan's byte copies in bounded memory, and knows nothing but the plan.

A source range that serves both stacks is read once and written twice. Nothing is decoded unless it is cast.
"""

import errno
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.dtypes import element_bytes
from t5g2convert.checkpoint.header import FileIdentity, TensorEntry, encode_header
from t5g2convert.conversion.contents import caster, scaled_row
from t5g2convert.conversion.copying import (
    BUFFERS,
    CHUNK_BYTES,
    Copier,
    Job,
    Progress,
    output_errors,
    read_exactly,
    write_exactly,
)
from t5g2convert.conversion.hashing import FileHasher, Hashers
from t5g2convert.conversion.plan import Plan, PlannedTensor, SourceRange
from t5g2convert.errors import CheckpointError

BASE_BYTES: Final = 44_000_000
"""What the interpreter and the libraries take (measured, CPython 3.11 on Linux)."""

COPY_THREADS: Final = 2
"""Threads that copy where nothing is hashed; hashing needs the bytes in order, so one copies then."""


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
        hashers = _start_hashers(plan, sources, shards) if hashing else None
        if hashers is not None:
            stack.callback(hashers.abandon)
        Copier(_jobs(plan, sources, shards), hashers, progress).run(1 if hashing else COPY_THREADS)
        if hashers is not None:
            hashers.close()
        if flush:
            for name, fd in shards.items():
                with output_errors(folder / name):
                    os.fsync(fd)
        written = Written({}, {}) if hashers is None else _digests(hashers, source, folder)
        _check_unchanged(plan, sources, source)
    return written


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
    read_exactly(sources[source.file], memoryview(data), source.start + position, source.file)
    return data


def _create_shards(plan: Plan, folder: Path, stack: ExitStack) -> dict[str, int]:
    """Create all shards in their final size, with their headers."""
    created: dict[str, int] = {}
    tensors: dict[str, list[PlannedTensor]] = {shard.name: [] for shard in plan.shards}
    for tensor in plan.tensors:
        tensors[tensor.shard].append(tensor)
    for shard in plan.shards:
        with output_errors(folder / shard.name):
            fd = os.open(folder / shard.name, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
            stack.callback(os.close, fd)
            created[shard.name] = fd
            _reserve(fd, shard.size)
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
            write_exactly(fd, memoryview(header), 0)
    return created


def _reserve(fd: int, size: int) -> None:
    """Give a file its size and its blocks at once.

    A full disk is told here, and two stacks that grow side by side do not cut each other into pieces: writing 1b to
    ext4 took 1.5 s with it and 2.4 s without (medians of four rounds, not flushed).
    """
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(fd, 0, size)
            return
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
    os.ftruncate(fd, size)


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
        with output_errors(Path(tensor.shard)):
            write_exactly(shards[tensor.shard], memoryview(data), tensor.start)
        progress(len(data))


def _start_hashers(plan: Plan, sources: dict[str, int], shards: dict[str, int]) -> Hashers:
    """A hasher for every source and target file; headers and computed tensors are written already."""
    first_copied = {shard.name: shard.size for shard in plan.shards}
    for tensor in plan.tensors:
        if tensor.content.kind in ("copy", "cast"):
            first_copied[tensor.shard] = min(first_copied[tensor.shard], tensor.start)
    return Hashers(
        sources={
            file.name: FileHasher(sources[file.name], file.identity.size, there=file.identity.size)
            for file in plan.source_files
        },
        shards={
            shard.name: FileHasher(shards[shard.name], shard.size, there=first_copied[shard.name])
            for shard in plan.shards
        },
    )


def _digests(hashers: Hashers, source: Path, folder: Path) -> Written:
    written = Written({}, {})
    for name, hasher in hashers.sources.items():
        try:
            written.sources[name] = hasher.hexdigest()
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror or error}", where=source / name) from error
    for name, hasher in hashers.shards.items():
        with output_errors(folder / name):
            written.shards[name] = hasher.hexdigest()
    return written


def _jobs(plan: Plan, sources: dict[str, int], shards: dict[str, int]) -> list[Job]:
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
            Job(
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
