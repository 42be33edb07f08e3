"""The writer: executes a plan's byte copies in bounded memory, and knows nothing but the plan.

A source range that serves both stacks is read once and written twice. Nothing is decoded unless it is cast.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.dtypes import element_bytes
from t5g2convert.checkpoint.header import FileIdentity
from t5g2convert.checkpoint.inputs import Folders
from t5g2convert.conversion.plan.types import Plan, PlannedTensor, SourceRange
from t5g2convert.conversion.write.computed_tensors import write_computed
from t5g2convert.conversion.write.copy import (
    BUFFERS,
    CHUNK_BYTES,
    Copier,
    Job,
    Progress,
    output_errors,
)
from t5g2convert.conversion.write.hashing import FileHasher, Hashers
from t5g2convert.conversion.write.numerics import caster
from t5g2convert.conversion.write.resume import Journal
from t5g2convert.conversion.write.shards import OpenShards
from t5g2convert.conversion.write.trained_values import Given
from t5g2convert.errors import CheckpointError

BASE_BYTES: Final = 56_000_000
"""What the interpreter and the libraries take (measured, CPython 3.11 on Linux)."""

COPY_THREADS: Final = 2
"""Threads that copy where nothing is hashed; hashing needs the bytes in order, so one copies then."""


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


def peak_memory(plan: Plan) -> int:
    """Bytes of memory that a conversion is expected to take at its peak; the size of the model does not matter."""
    from t5g2convert.conversion.write import aligned_projector

    casting = any(tensor.content.kind == "cast" for tensor in plan.tensors)
    copying = BUFFERS * CHUNK_BYTES + (BUFFERS * 4 * CHUNK_BYTES if casting else 0)
    aligning = [
        aligned_projector.peak_memory(
            planned.donor.width,
            planned.target.width,
            max(element_bytes(table.dtype) for table in (planned.donor, planned.target)),
        )
        for planned in (tensor.content.alignment for tensor in plan.tensors)
        if planned is not None
    ]
    return BASE_BYTES + max([copying, *aligning])


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
            from t5g2convert.conversion.write.repeated import check_repeated

            check_repeated(plan, sources)
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
