"""The targets of a merged adapter: each stored value is the number of its dtype nearest to W + s B A.

The products are computed here, with torch in float64, from the bytes of the source and of the adapter. No rounding is
repeated: a stored value is right if W + s B A is at most half a step away from it. The bounds of the errors of
float64 matter only for values in the middle between two numbers, where either is accepted.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from t5g2convert.checkpoint.adapter import Adapter, LoraTarget
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.header import TensorEntry
from t5g2convert.reference.weights import DTYPES, Weights

BLOCK_ELEMENTS: Final = 1 << 20
"""Elements of a target to compare at once."""

UNIT: Final = 2.0**-53
"""The largest relative error of one operation in float64."""

_WORDS: Final = {2: torch.int16, 4: torch.int32}


def merged_faults(
    adapter: Adapter,
    source: Checkpoint,
    target: Checkpoint,
    read: Callable[[Path, int, int], bytes],
    unmoved: list[str],
    progress: Callable[[str], None],
) -> Iterator[str]:
    """Yield the targets with a value that is not W + s B A, rounded.

    Args:
        adapter: The adapter, open.
        source: The model that it was merged into.
        target: The result; its tensors have the source's shapes.
        read: Reads a range of a file: its path, first byte and number of bytes.
        unmoved: Targets that have the source's values are added to it.
        progress: Called at every hundredth target.
    """
    before, after = Weights(source), Weights(target)
    for number, each in enumerate(adapter.targets.values()):
        if number % 100 == 0:
            progress(f"products of target {number} of {len(adapter.targets)}")
        down, up = (_matrix(adapter.weights, entry, read) for entry in (each.down, each.up))
        fault, moved = _judged(each, down, up, before, after, rslora=adapter.rslora)
        if fault is not None:
            yield fault
        elif not moved:
            unmoved.append(each.name)


def _judged(
    target: LoraTarget, down: Tensor, up: Tensor, before: Weights, after: Weights, *, rslora: bool
) -> tuple[str | None, bool]:
    """Return the fault of a target, if any, and whether it differs from the source's."""
    scale = float(target.alpha) * float(target.rank) ** (-0.5 if rslora else -1.0)
    largest, moved = float(down.abs().max()), False
    rows, columns = target.shape
    for first in range(0, rows, step := max(1, BLOCK_ELEMENTS // columns)):
        last = min(first + step, rows)
        weight = before.rows(target.name, first, last).double()
        stored = after.rows(target.name, first, last)
        exact = weight + scale * (up[first:last] @ down)
        # Of at most r products, their sum, the scale and the last sum, here and in the writer.
        size = weight.abs() + abs(scale) * largest * up[first:last].abs().sum(dim=1, keepdim=True)
        slack = 2 * (target.rank + 8) * UNIT * size
        low, high = (_middle(stored, towards) for towards in (-1, 1))
        right = torch.isfinite(stored) & (exact >= low - slack) & (exact <= high + slack)
        if not bool(right.all()):
            row, column = (int(index) for index in (~right).nonzero()[0])
            return (
                f"{target.name}[{first + row}, {column}] is {float(stored[row, column]):.9g}, but the source plus "
                f"{scale:g} times the adapter's product is {float(exact[row, column]):.9g}"
            ), moved
        moved |= not torch.equal(weight, stored.double())
    return None, moved


def _middle(values: Tensor, towards: int) -> Tensor:
    """Return the middle between each number and its neighbour of the same dtype, below (-1) or above (1), float64."""
    words = _WORDS[values.element_size()]
    # The bits of floats are a sign and a magnitude; integers count through them in the order of the numbers.
    least = torch.iinfo(words).min
    bits = values.view(words).long()
    place = torch.where(bits < 0, least - bits, bits) + towards
    neighbour = torch.where(place < 0, least - place, place).to(words).view(values.dtype)
    return (values.double() + neighbour.double()) / 2


def _matrix(path: Path, entry: TensorEntry, read: Callable[[Path, int, int], bytes]) -> Tensor:
    """Return a matrix of the adapter, float64."""
    data = bytearray(read(path, entry.start, entry.nbytes))
    return torch.frombuffer(data, dtype=DTYPES[entry.dtype]).view(entry.shape).double()
