"""The writer: executes a plan's byte copies in bounded memory, and knows nothing but the plan.

A source range that serves both stacks is read once and written twice. Nothing is decoded unless it is cast.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.dtypes import BITS, CONFIG_NAMES
from t5g2convert.checkpoint.header import FileIdentity
from t5g2convert.checkpoint.inputs import Folders
from t5g2convert.conversion.plan.types import Dropped, Plan, PlannedTensor, Repeated, SourceRange
from t5g2convert.conversion.write.computed_tensors import Given, read_range, write_computed
from t5g2convert.conversion.write.copy import (
    CHUNK_BYTES,
    Copier,
    Job,
    output_errors,
)
from t5g2convert.conversion.write.hashing import FileHasher, Hashers
from t5g2convert.conversion.write.numerics import caster, decode
from t5g2convert.conversion.write.resume import Journal
from t5g2convert.conversion.write.shard_files import OpenShards
from t5g2convert.errors import CheckpointError
from t5g2convert.progress import Progress

COPY_THREADS: Final = 2
"""Threads that copy where nothing is hashed; hashing needs the bytes in order, so one copies then."""


WIDEST: Final = "F32"
"""Every dtype that is converted goes into it exactly."""

HINT: Final = "the target has one matrix for both; an untied model cannot be converted exactly"


@dataclass(frozen=True, slots=True)
class Written:
    """What was written.

    Attributes:
        sources: sha256 by file name, hexadecimal; empty where nothing was hashed.
        shards: The same of the output's shards.
        nonfinite: A line for each tensor that holds NaN or infinity.
        residual: How far the tables of an aligned projector are from fitting each other: 0 is exact, 1 not at all.
    """

    sources: dict[str, str]
    shards: dict[str, str]
    nonfinite: tuple[str, ...]
    residual: float | None


def write_shards(
    plan: Plan,
    folders: Folders,
    folder: Path,
    *,
    journal: Journal | None,
    kept: Mapping[str, str],
    allow_nonfinite: bool,
    flush: bool,
    progress: Progress,
    given: Given | None = None,
) -> Written:
    """Write all shards of a plan.

    Args:
        plan: The plan.
        folders: Where the checkpoints lie that were planned.
        folder: A folder for the shards; none of them is there but those that are kept.
        journal: Is told of every finished shard; where given, sha256 of all source and target files is computed in the
            same pass.
        kept: sha256 by name of the shards that are there already.
        allow_nonfinite: Copy NaN and infinity as they are.
        flush: Wait until the disk has every byte.
        progress: Told of every piece that is done: written, kept, or read in vain.
        given: The values that the plan says are given, if it does.

    Raises:
        CheckpointError: The source changed since it was planned, or holds NaN, infinity, or values that cannot be cast;
            or what is given does.
        OutputError: The disk is full or fails.
    """
    with ExitStack() as stack:
        sources = _open_sources(plan, folders, stack)
        if any(drop.must_equal is not None for drop in plan.dropped):
            _check_repeated(plan, sources)
        shards = stack.enter_context(OpenShards(plan, folder, kept, journal, flush=flush))
        residual = write_computed(plan, sources, shards, given, progress)
        hashers = _start_hashers(plan, sources, shards) if journal is not None else None
        if hashers is not None:
            stack.callback(hashers.abandon)
        progress(sum(tensor.work for tensor in plan.tensors if tensor.shard in kept))
        copier = Copier(_jobs(plan, sources, shards), hashers, progress, allow_nonfinite=allow_nonfinite)
        copier.run(COPY_THREADS if hashers is None else 1)
        nonfinite = tuple(_nonfinite(copier, plan))
        if nonfinite and not allow_nonfinite:
            holders = sorted({str(folders.path(file).parent) for file, _ in copier.nonfinite})
            raise CheckpointError(
                f"{len(nonfinite)} tensor(s) hold NaN or infinity",
                where=" and ".join(holders),
                hint="--allow-nonfinite converts them as they are",
                details=nonfinite,
            )
        if hashers is not None:
            hashers.close()
        # While the hashers read back what they have skipped.
        for shard in shards.shards:
            shards.flush(shard.name)
        written = Written({}, dict(kept), nonfinite, residual)
        if hashers is not None:
            _digest(hashers, folders, folder, written)
        _check_unchanged(plan, sources, folders)
        shards.close()
    return written


def _open_sources(plan: Plan, folders: Folders, stack: ExitStack) -> dict[str, int]:
    opened: dict[str, int] = {}
    for file in plan.source_files:
        try:
            fd = os.open(folders.path(file.name), os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(f"cannot be opened: {error.strerror}", where=folders.path(file.name)) from None
        stack.callback(_close_read, fd)
        opened[file.name] = fd
    _check_unchanged(plan, opened, folders)
    return opened


def _close_read(fd: int) -> None:
    """Close a file that was only read; nothing can be lost by it."""
    with suppress(OSError):
        os.close(fd)


def _nonfinite(copier: Copier, plan: Plan) -> Iterator[str]:
    """The tensors that hold NaN or infinity, each with its first such element, in the order of the plan."""
    if not copier.nonfinite:
        return
    import numpy as np

    shapes = {
        (tensor.content.source.file, tensor.origin or ""): tensor.shape
        for tensor in plan.tensors
        if tensor.content.kind in ("copy", "cast") and tensor.content.source is not None
    }
    for (file, name), shape in shapes.items():
        if (file, name) not in copier.nonfinite:
            continue
        element, what = copier.nonfinite[file, name]
        place = ", ".join(str(index) for index in np.unravel_index(element, shape))
        yield f"{name}[{place}] is {what}"


def _check_unchanged(plan: Plan, sources: dict[str, int], folders: Folders) -> None:
    for file in plan.source_files:
        try:
            found = FileIdentity.of(sources[file.name])
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=folders.path(file.name)) from error
        if found != file.identity:
            raise CheckpointError("changed while it was being read", where=folders.path(file.name), hint="start again")


def _start_hashers(plan: Plan, sources: dict[str, int], shards: OpenShards) -> Hashers:
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
            shard.name: FileHasher(
                shards.files[shard.name],
                shard.size,
                there=first_copied[shard.name],
                finished=partial(shards.finish, shard.name),
            )
            for shard in shards.shards
        },
    )


def _digest(hashers: Hashers, folders: Folders, folder: Path, written: Written) -> None:
    """Note the sha256 of all files."""
    for name, hasher in hashers.sources.items():
        try:
            written.sources[name] = hasher.hexdigest()
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror or error}", where=folders.path(name)) from error
    for name, hasher in hashers.shards.items():
        with output_errors(folder / name):
            written.shards[name] = hasher.hexdigest()


def _jobs(plan: Plan, sources: dict[str, int], shards: OpenShards) -> list[Job]:
    """One job for each source range, in the order of the source, with all of its targets that are to be written."""
    by_source: dict[SourceRange, list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        if tensor.content.kind in ("copy", "cast") and tensor.nbytes and tensor.shard in shards.files:
            assert tensor.content.source is not None, "what is copied has a source"
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
                first.origin or first.name,
                first.content.dtype,
                source.file,
                sources[source.file],
                source.start,
                source.end,
                tuple((tensor.shard, shards.files[tensor.shard], tensor.start) for tensor in targets),
                first.dtype,
                cast,
            )
        )
    return jobs


def _check_repeated(plan: Plan, sources: Mapping[str, int]) -> None:
    """Compare all of a plan's dropped tensors that must repeat another, a chunk at a time.

    Args:
        plan: The plan.
        sources: The files that are read, open, by name.

    Raises:
        CheckpointError: A value differs, or a file cannot be read.
    """
    for drop in plan.dropped:
        other = drop.must_equal
        if other is not None and (element := _first_difference(drop, other, sources)) is not None:
            raise CheckpointError(
                f"differs from {other.name} at {_place(element, drop.shape)}{_values(drop, other, element, sources)}, "
                f"although {drop.because}",
                where=f"tensor {drop.name}",
                hint=HINT,
            )


def _first_difference(drop: Dropped, other: Repeated, sources: Mapping[str, int]) -> int | None:
    """The first element that differs; both tensors have as many, which the plan has seen."""
    dtype = drop.dtype if drop.dtype == other.dtype else WIDEST
    sides = [
        (each.content if isinstance(each, Dropped) else each.source, each.dtype, _widener(each.dtype, dtype))
        for each in (drop, other)
    ]
    count = (drop.content.end - drop.content.start) * 8 // BITS[drop.dtype]
    step = CHUNK_BYTES * 8 // BITS[dtype]
    for start in range(0, count, step):
        length = min(step, count - start)
        one, two = (
            widen(read_range(sources, source, start * BITS[each] // 8, -(-length * BITS[each] // 8)))
            for source, each, widen in sides
        )
        if one != two:
            first = next(position for position, pair in enumerate(zip(one, two, strict=True)) if pair[0] != pair[1])
            return start + first * 8 // BITS[dtype]
    return None


def _widener(source: str, target: str) -> Callable[[bytearray], bytes]:
    """What makes the bytes of values of the one dtype those of the other, which holds them exactly."""
    if source == target:
        return bytes
    cast = caster("", source, target)
    return lambda piece: bytes(cast(memoryview(piece)))


def _place(element: int, shape: tuple[int, ...]) -> str:
    """Where an element is, as `[3, 17]`."""
    place: list[int] = []
    for extent in reversed(shape):
        place.append(element % extent)
        element //= extent
    return str(place[::-1])


def _values(drop: Dropped, other: Repeated, element: int, sources: Mapping[str, int]) -> str:
    """What both hold there, for dtypes that are converted."""
    if not {drop.dtype, other.dtype} <= CONFIG_NAMES.keys():
        return ""
    values = []
    for source, dtype in ((drop.content, drop.dtype), (other.source, other.dtype)):
        width = BITS[dtype] // 8
        values.append(decode(bytes(read_range(sources, source, element * width, width)), dtype)[0])
    return f" ({values[0]:.9g}, there {values[1]:.9g})"
