"""The tensors of a plan that are not copied: zeros, one value, a scaled row, an aligned projector, trained values."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from t5g2convert.checkpoint.header import element_bytes
from t5g2convert.conversion.plan.types import Plan, PlannedAlignment, PlannedTensor, SourceRange
from t5g2convert.conversion.write.copy import output_errors, read_exactly, write_exactly
from t5g2convert.conversion.write.numerics import rounded, scaled_row
from t5g2convert.conversion.write.shard_files import OpenShards
from t5g2convert.errors import CheckpointError
from t5g2convert.progress import Progress

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


PASSED: Final = ("given", "merged")
"""Kinds of contents whose values are passed to the writer."""


class TensorValues(Protocol):
    """The values of tensors that no source contains, for example trained ones."""

    def pieces(self, name: str) -> Iterator["NDArray[np.float32] | NDArray[np.float64]"]:
        """Yield the values of a target tensor in order, in pieces of any size and shape."""


def write_computed(
    plan: Plan, sources: Mapping[str, int], shards: OpenShards, values: TensorValues | None, progress: Progress
) -> float | None:
    """Write the computed tensors to the shards that are not kept.

    Args:
        plan: The plan.
        sources: Descriptors of the source files by name.
        shards: The shards, open.
        values: The values of tensors that no source contains; None if the plan has none of these.
        progress: Called with the number of bytes done.

    Returns:
        The residual of an alignment; None if none was computed.

    Raises:
        CheckpointError: A source cannot be read, or values are NaN, infinite, or too large for the dtype.
        OutputError: The disk is full or fails.
    """
    import numpy as np

    residual = None
    _write_values(plan, values, shards, progress)
    for tensor in plan.tensors:
        content = tensor.content
        if content.kind in ("copy", "cast", *PASSED) or tensor.shard not in shards.files:
            continue
        data = bytes(tensor.nbytes)
        if content.kind == "scaled_row" and content.source is not None:
            row = read_range(sources, content.source, 0, content.source.end - content.source.start)
            data = scaled_row(bytes(row), content.dtype, tensor.dtype)
        elif content.value is not None:
            data = rounded(tensor.name, np.full(tensor.shape, content.value), tensor.dtype)
        elif content.alignment is not None and content.source is not None:
            data, residual = _aligned(tensor, content.alignment, content.source, sources, progress)
        with output_errors(Path(tensor.shard)):
            write_exactly(shards.files[tensor.shard], memoryview(data), tensor.start)
        progress(len(data))
    return residual


def read_range(sources: Mapping[str, int], source: SourceRange, position: int, length: int) -> bytearray:
    """Read `length` bytes of a range, from a position within the range.

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
    """Compute an aligned projector; return its bytes and the residual of the alignment."""
    from t5g2convert.conversion.write.aligned_projector import Table, align, carry

    donor, target = (
        Table(
            table.tensor, table.dtype, table.rows, table.width,
            table.source.file, sources[table.source.file], table.source.start,
        )
        for table in (alignment.donor, alignment.target)
    )  # fmt: skip
    left = alignment.nbytes

    def count_once(count: int) -> None:
        # Tables that fit very well are read twice; progress counts only the first time.
        nonlocal left
        progress(min(count, left))
        left -= min(count, left)

    found = align(donor, target, rows=alignment.rows, ridge=alignment.ridge, progress=count_once)
    data = bytes(read_range(sources, projector, 0, projector.end - projector.start))
    return carry(tensor.name, data, tensor.content.dtype, found, tensor.dtype), found.residual


def _write_values(plan: Plan, values: TensorValues | None, shards: OpenShards, progress: Progress) -> None:
    """Write the tensors that no source contains; round each value once to the dtype: to nearest, ties to even.

    Raises:
        CheckpointError: Values are NaN, infinite or too large for the dtype, or there are too many or too few; the
            error names all tensors with NaN or infinity.
        OutputError: The disk is full or fails.
    """
    nonfinite: list[str] = []
    for tensor in plan.tensors:
        if tensor.content.kind in PASSED and tensor.shard in shards.files:
            assert values is not None, "a plan with computed tensors needs their values"
            nonfinite += _write_pieces(tensor, values, shards.files[tensor.shard], progress)
    if nonfinite:
        raise CheckpointError(f"{len(nonfinite)} trained tensor(s) hold NaN or infinity", details=nonfinite)


def _write_pieces(tensor: PlannedTensor, values: TensorValues, fd: int, progress: Progress) -> list[str]:
    """Write one tensor up to its first NaN or infinity; return a line on that, if there is one."""
    import numpy as np

    done = 0
    for piece in values.pieces(tensor.name):
        finite = np.isfinite(piece).reshape(-1)
        if not finite.all():
            element = done + int(finite.argmin())
            what = "NaN" if np.isnan(piece.reshape(-1)[element - done]) else "infinity"
            place = ", ".join(str(index) for index in np.unravel_index(element, tensor.shape))
            return [f"{tensor.name}[{place}] is {what}"]
        if done + piece.size > tensor.elements:
            raise CheckpointError(f"got more than its {tensor.elements} values", where=f"tensor {tensor.name}")
        data = rounded(tensor.name, piece, tensor.dtype)
        with output_errors(Path(tensor.shard)):
            write_exactly(fd, memoryview(data), tensor.start + done * element_bytes(tensor.dtype))
        done += piece.size
        progress(len(data))
    if done != tensor.elements:
        raise CheckpointError(f"got {done} of its {tensor.elements} values", where=f"tensor {tensor.name}")
    return []
