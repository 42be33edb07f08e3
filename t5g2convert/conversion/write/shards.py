"""The shards of the output, written from a plan in bounded memory.

A source range for both stacks is read once and written twice. Only tensors that are cast are decoded.
"""

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.header import BITS, CONFIG_NAMES, FileIdentity
from t5g2convert.checkpoint.sources import Folders
from t5g2convert.conversion.plan.types import Dropped, Plan, PlannedTensor, Repeated, SourceRange
from t5g2convert.conversion.write.computed_tensors import TensorValues, read_range, write_computed
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
"""Threads that copy without hashing; hashing needs the bytes in order and therefore a single thread."""


WIDEST: Final = "F32"
"""The dtype that can hold the values of every dtype that is converted."""

HINT: Final = "the target has one matrix for both, so an untied model cannot be converted exactly"


@dataclass(frozen=True, slots=True)
class Written:
    """The result of writing the shards.

    Attributes:
        sources: sha256 by source file, hexadecimal; empty without hashing.
        shards: sha256 by shard.
        nonfinite: A line for each tensor that holds NaN or infinity.
        residual: The misfit of the tables of an aligned projector, from 0 (exact) to 1 (no fit).
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
    values: TensorValues | None = None,
) -> Written:
    """Write all shards of a plan.

    Args:
        plan: The plan.
        folders: The folders of the planned checkpoints.
        folder: The folder for the shards; it contains no shards other than `kept`.
        journal: Records every finished shard. With it, the sha256 of all source files and shards is computed in the
            same pass.
        kept: sha256 by name of the shards that already exist.
        allow_nonfinite: Whether to copy NaN and infinity.
        flush: Whether to wait until the disk has every byte.
        progress: Called with the number of bytes done, from any thread.
        values: The trained values, if the plan has tensors with trained values.

    Raises:
        CheckpointError: A source changed since it was planned; or a source or the trained values contain NaN, infinity
            or values too large for the dtype.
        OutputError: The disk is full or fails.
    """
    with ExitStack() as stack:
        sources = _open_sources(plan, folders, stack)
        if any(drop.must_equal is not None for drop in plan.dropped):
            _check_repeated(plan, sources)
        shards = stack.enter_context(OpenShards(plan, folder, kept, journal, flush=flush))
        residual = write_computed(plan, sources, shards, values, progress)
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
                hint="--allow-nonfinite copies them unchanged",
                details=nonfinite,
            )
        if hashers is not None:
            hashers.close()
        # Meanwhile the hashers read back the bytes that they skipped.
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
    """Close a file that was only read; ignore errors, which are harmless here."""
    with suppress(OSError):
        os.close(fd)


def _nonfinite(copier: Copier, plan: Plan) -> Iterator[str]:
    """Yield a line on the first NaN or infinity of each tensor that holds one, in the order of the plan."""
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
    """Start a hasher for every source and shard; headers and computed tensors are already written."""
    first_copied = {shard.name: shard.size for shard in plan.shards}
    for tensor in plan.tensors:
        if tensor.content.kind in ("copy", "cast"):
            first_copied[tensor.shard] = min(first_copied[tensor.shard], tensor.start)
    return Hashers(
        sources={
            file.name: FileHasher(sources[file.name], file.identity.size, written=file.identity.size)
            for file in plan.source_files
        },
        shards={
            shard.name: FileHasher(
                shards.files[shard.name],
                shard.size,
                written=first_copied[shard.name],
                finished=partial(shards.finish, shard.name),
            )
            for shard in shards.shards
        },
    )


def _digest(hashers: Hashers, folders: Folders, folder: Path, written: Written) -> None:
    """Wait for the sha256 of all files."""
    for name, hasher in hashers.sources.items():
        try:
            written.sources[name] = hasher.hexdigest()
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror or error}", where=folders.path(name)) from error
    for name, hasher in hashers.shards.items():
        with output_errors(folder / name):
            written.shards[name] = hasher.hexdigest()


def _jobs(plan: Plan, sources: dict[str, int], shards: OpenShards) -> list[Job]:
    """Return a job for each source range with all of its targets, in the order of the source."""
    by_source: dict[SourceRange, list[PlannedTensor]] = {}
    for tensor in plan.tensors:
        if tensor.content.kind in ("copy", "cast") and tensor.nbytes and tensor.shard in shards.files:
            assert tensor.content.source is not None, "a copied tensor has a source"
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
    """Require that dropped tensors equal the tensors they repeat: bytes, or values if the dtypes differ.

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
    """Return the first element that differs; the plan has checked that the sizes are equal."""
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
    """Return a function that casts bytes to a dtype that holds their values exactly."""
    if source == target:
        return bytes
    cast = caster("", source, target)
    return lambda piece: bytes(cast(memoryview(piece)))


def _place(element: int, shape: tuple[int, ...]) -> str:
    """Return the indices of an element, like `[3, 17]`."""
    place: list[int] = []
    for extent in reversed(shape):
        place.append(element % extent)
        element //= extent
    return str(place[::-1])


def _values(drop: Dropped, other: Repeated, element: int, sources: Mapping[str, int]) -> str:
    """Describe both values, for dtypes that can be converted."""
    if not {drop.dtype, other.dtype} <= CONFIG_NAMES.keys():
        return ""
    values = []
    for source, dtype in ((drop.content, drop.dtype), (other.source, other.dtype)):
        width = BITS[dtype] // 8
        values.append(decode(bytes(read_range(sources, source, element * width, width)), dtype)[0])
    return f" ({values[0]:.9g}, expected {values[1]:.9g})"
