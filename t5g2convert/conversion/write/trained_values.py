"""Values that tensors are given in place of a checkpoint's bytes: those of a training, rounded once and written."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from t5g2convert.checkpoint.dtypes import element_bytes
from t5g2convert.conversion.plan.types import Plan, PlannedTensor
from t5g2convert.conversion.write.copy import Progress, output_errors, write_exactly
from t5g2convert.conversion.write.numerics import rounded
from t5g2convert.conversion.write.shards import OpenShards
from t5g2convert.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


class Given(Protocol):
    """Where given values come from."""

    def pieces(self, name: str) -> Iterator["NDArray[np.float32] | NDArray[np.float64]"]:
        """The values of a tensor by its name in the target, in order, a piece of any size and shape at a time."""


def write_given(plan: Plan, given: Given | None, shards: OpenShards, progress: Progress) -> None:
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
            nonfinite += _write(tensor, given, shards.files[tensor.shard], progress)
    if nonfinite:
        raise CheckpointError(f"{len(nonfinite)} trained tensor(s) hold NaN or infinity", details=nonfinite)


def _write(tensor: PlannedTensor, given: Given, fd: int, progress: Progress) -> list[str]:
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
