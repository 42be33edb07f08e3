"""The tensors of a plan that are not copied from a range of a source: zeros, a scaled row, an aligned projector, and
values that are given."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from t5g2convert.checkpoint.dtypes import element_bytes
from t5g2convert.conversion.plan.types import Plan, PlannedAlignment, PlannedTensor, SourceRange
from t5g2convert.conversion.write.copy import output_errors, read_exactly, write_exactly
from t5g2convert.conversion.write.numerics import rounded, scaled_row
from t5g2convert.conversion.write.shard_files import OpenShards
from t5g2convert.errors import CheckpointError
from t5g2convert.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Given(Protocol):
    """Where given values come from."""

    def pieces(self, name: str) -> Iterator["NDArray[np.float32] | NDArray[np.float64]"]:
        """The values of a tensor by its name in the target, in order, a piece of any size and shape at a time."""


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
    _write_given(plan, given, shards, progress)
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
    from t5g2convert.conversion.write.embedding_tables import Table

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


def _write_given(plan: Plan, given: Given | None, shards: OpenShards, progress: Progress) -> None:
    """Write the given tensors of a plan to the shards that are not kept.

    Every value is rounded once, to the nearest that the tensor's dtype has, ties to even.

    Args:
        plan: The plan.
        given: The values.
        shards: The shards, open.
        progress: Told of the bytes of every piece.

    Raises:
        CheckpointError: A value is NaN, infinite, or too large for the dtype, or there are more or fewer than the
            tensor has; all tensors with NaN or infinity are named.
        OutputError: The disk is full or fails.
    """
    nonfinite: list[str] = []
    for tensor in plan.tensors:
        if tensor.content.kind == "given" and tensor.shard in shards.files:
            assert given is not None, "a plan with given tensors is executed with their values"
            nonfinite += _write_trained(tensor, given, shards.files[tensor.shard], progress)
    if nonfinite:
        raise CheckpointError(f"{len(nonfinite)} trained tensor(s) hold NaN or infinity", details=nonfinite)


def _write_trained(tensor: PlannedTensor, given: Given, fd: int, progress: Progress) -> list[str]:
    """Write one tensor; a line for its first value that is no number, behind which nothing more of it is written."""
    import numpy as np

    done = 0
    for piece in given.pieces(tensor.name):
        finite = np.isfinite(piece).reshape(-1)
        if not finite.all():
            element = done + int(finite.argmin())
            what = "NaN" if np.isnan(piece.reshape(-1)[element - done]) else "infinity"
            place = ", ".join(str(index) for index in np.unravel_index(element, tensor.shape))
            return [f"{tensor.name}[{place}] is {what}"]
        if done + piece.size > tensor.elements:
            raise CheckpointError(f"was given more than its {tensor.elements} values", where=f"tensor {tensor.name}")
        data = rounded(tensor.name, piece, tensor.dtype)
        with output_errors(Path(tensor.shard)):
            write_exactly(fd, memoryview(data), tensor.start + done * element_bytes(tensor.dtype))
        done += piece.size
        progress(len(data))
    if done != tensor.elements:
        raise CheckpointError(f"was given {done} of its {tensor.elements} values", where=f"tensor {tensor.name}")
    return []
