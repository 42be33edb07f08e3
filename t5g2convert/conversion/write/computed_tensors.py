"""The tensors of a plan that are not copied from a range of a source: zeros, a scaled row, an aligned projector, and
values that are given."""

from collections.abc import Mapping
from pathlib import Path

from t5g2convert.conversion.plan.types import Plan, PlannedAlignment, PlannedTensor, SourceRange
from t5g2convert.conversion.write.copy import Progress, output_errors, read_exactly, write_exactly
from t5g2convert.conversion.write.numerics import scaled_row
from t5g2convert.conversion.write.shards import OpenShards
from t5g2convert.conversion.write.trained_values import Given, write_given


def write_computed(
    plan: Plan, sources: Mapping[str, int], shards: OpenShards, given: Given | None, progress: Progress
) -> float | None:
    """Write them to the shards that are not kept; the residual of an alignment, if one was computed.

    Args:
        plan: The plan.
        sources: The files that are read, open, by name.
        shards: The shards, open.
        given: The values that the plan says are given.
        progress: Told of every tensor's work.

    Raises:
        CheckpointError: A source cannot be read, its numbers cannot be computed with, or given values are no numbers.
        OutputError: The disk is full or fails.
    """
    residual = None
    write_given(plan, given, shards, progress)
    for tensor in plan.tensors:
        content = tensor.content
        if content.kind in ("copy", "cast", "given") or tensor.shard not in shards.files:
            continue
        data = bytes(tensor.nbytes)
        if content.kind == "scaled_row" and content.source is not None:
            row = read_range(sources, content.source, 0, content.source.end - content.source.start)
            data = scaled_row(bytes(row), content.dtype, tensor.dtype)
        elif content.alignment is not None and content.source is not None:
            data, residual = _aligned(tensor, content.alignment, content.source, sources, progress)
        with output_errors(Path(tensor.shard)):
            write_exactly(shards.files[tensor.shard], memoryview(data), tensor.start)
        progress(len(data))
    return residual


def read_range(sources: Mapping[str, int], source: SourceRange, position: int, length: int) -> bytearray:
    """`length` bytes of a range, from a position in it on.

    Raises:
        CheckpointError: The file cannot be read, or ends too early.
    """
    data = bytearray(length)
    read_exactly(sources[source.file], memoryview(data), source.start + position, source.file)
    return data


def _aligned(
    tensor: PlannedTensor,
    alignment: PlannedAlignment,
    projector: SourceRange,
    sources: Mapping[str, int],
    progress: Progress,
) -> tuple[bytes, float]:
    """An aligned projector, and the residual of the alignment."""
    from t5g2convert.conversion.write.aligned_projector import align, carry
    from t5g2convert.conversion.write.tables import Table

    donor, target = (
        Table(
            table.tensor, table.dtype, table.rows, table.width,
            table.source.file, sources[table.source.file], table.source.start,
        )
        for table in (alignment.donor, alignment.target)
    )  # fmt: skip
    left = alignment.nbytes

    def told(count: int) -> None:
        # Tables that fit very well are read twice; that is not told.
        nonlocal left
        progress(min(count, left))
        left -= min(count, left)

    found = align(donor, target, rows=alignment.rows, ridge=alignment.ridge, progress=told)
    data = bytes(read_range(sources, projector, 0, projector.end - projector.start))
    return carry(tensor.name, data, tensor.content.dtype, found, tensor.dtype), found.residual
