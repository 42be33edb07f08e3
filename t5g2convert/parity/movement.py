"""How far trained tensors have moved from the start of the training, read a piece at a time.

A trained tensor differs from its start but is still near it. A tensor that a library filled with random values, because
it found none under the expected name, is not near its start.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any, Final

import torch

from t5g2convert.checkpoint.families.config_section import ExpectedTensor
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.reference.weights import DTYPES, Weights

PIECE: Final = 1 << 20
"""Elements to compare at once."""

RELATED: Final = 0.5
"""The smallest cosine between a matrix and its start that training can explain.

The cosine of two unrelated matrices of n elements has mean 0 and standard deviation 1/sqrt(n). For n = 64, the smallest
that is judged, 0.5 is 4 deviations away; for a matrix of a real model, hundreds. To bring the cosine down to 0.5, a
training would have to add an unrelated matrix 1.7 times as long as the start; fine-tuning adds hundredths.
"""

JUDGED: Final = 64
"""Elements of the smallest matrix with a meaningful cosine."""

ROW: Final = "eoi_embedding"
"""The only vector with a meaningful cosine; norms and biases may turn in any direction."""


@dataclass(frozen=True, slots=True)
class Movement:
    """How far one tensor, or several as one, moved from the start.

    Attributes:
        name: The published name, or the name of a layer or part.
        tensors: Number of tensors.
        unmoved: Number of tensors that equal the start's bit for bit, in the dtype that both have.
        difference: Sum of the squares of the differences.
        start: Sum of the squares of the start's values.
        found: Sum of the squares of the values found.
        product: Sum of the products of both.
        unrelated: Matrices with a smaller cosine to their start than training can explain.
        emptied: Tensors that are all zeros though the start's are not.
        broken: Tensors with NaN or infinity, each with the first bad element.
    """

    name: str
    tensors: int = 1
    unmoved: int = 0
    difference: float = 0.0
    start: float = 0.0
    found: float = 0.0
    product: float = 0.0
    unrelated: tuple[str, ...] = ()
    emptied: tuple[str, ...] = ()
    broken: tuple[str, ...] = ()

    @property
    def still(self) -> bool:
        """True if no tensor moved."""
        return self.unmoved == self.tensors

    @property
    def distance(self) -> float:
        """Length of the difference relative to the start's; infinite if the start is zeros."""
        if self.difference == 0:
            return 0.0
        return sqrt(self.difference / self.start) if self.start else float("inf")

    @property
    def cosine(self) -> float | None:
        """The cosine between the start and the values found; None if either is zeros."""
        length = sqrt(self.start) * sqrt(self.found)
        return self.product / length if length else None

    def to_json(self) -> dict[str, Any]:
        """Return the movement as `t5g2 verify --json` prints it."""
        return {
            "name": self.name,
            "tensors": self.tensors,
            "unmoved": self.unmoved,
            "distance": self.distance,
            "cosine": self.cosine,
        }


def combined(name: str, movements: Sequence[Movement]) -> Movement:
    """Return the movement of several tensors as one."""
    return Movement(
        name,
        sum(each.tensors for each in movements),
        sum(each.unmoved for each in movements),
        sum(each.difference for each in movements),
        sum(each.start for each in movements),
        sum(each.found for each in movements),
        sum(each.product for each in movements),
        tuple(name for each in movements for name in each.unrelated),
        tuple(name for each in movements for name in each.emptied),
        tuple(name for each in movements for name in each.broken),
    )


def movement(name: str, start: Checkpoint, found: Checkpoint) -> Movement:
    """Compare one tensor with its start; for a table with added rows, compare the rows that both have.

    Args:
        name: Its name in both.
        start: The model before the training.
        found: The trained model.

    Raises:
        CheckpointError: A file cannot be read.
    """
    one, other = start.tensors[name], found.tensors[name]
    dtype = DTYPES[other.entry.dtype]
    # A float32 start may have been trained in 16 bits and saved in float32.
    roundings = [
        dtype,
        *(each for each in (torch.bfloat16, torch.float16) if each != dtype and one.entry.dtype == "F32"),
    ]
    same = dict.fromkeys(roundings, True)
    difference = length = measured = product = 0.0
    elements, broken = min(one.entry.elements, other.entry.elements), None
    befores = Weights(start).pieces(name, PIECE)
    for number, values in enumerate(Weights(found).pieces(name, PIECE)):
        at = number * PIECE
        finite = torch.isfinite(values)
        if broken is None and not bool(finite.all()):
            broken = at + int((~finite).nonzero()[0])
        if at >= elements or broken is not None:
            continue
        before, after = next(befores)[: elements - at], values[: elements - at]
        for rounding in roundings:
            same[rounding] = same[rounding] and torch.equal(before.to(rounding).to(dtype), after)
        old, new = before.double(), after.double()
        difference += float((new - old).square().sum())
        length += float(old.square().sum())
        measured += float(new.square().sum())
        product += float((old * new).sum())
    if broken is not None:
        return Movement(name, broken=(f"{name} is not finite at element {broken}",))
    # The end-of-image vector replaces a row of the table.
    matrix = (len(one.entry.shape) > 1 or name.endswith(ROW)) and elements >= JUDGED
    related = not (length and measured and matrix) or product / (sqrt(length) * sqrt(measured)) >= RELATED
    return Movement(
        name,
        unmoved=int(any(same.values())),
        difference=difference,
        start=length,
        found=measured,
        product=product,
        unrelated=() if related else (name,),
        emptied=(name,) if length and not measured else (),
    )


def movements(
    parts: Sequence[ExpectedTensor], start: Checkpoint, found: Checkpoint
) -> Iterator[tuple[ExpectedTensor, Movement]]:
    """Yield the movements of all tensors that both have with shapes that differ at most in rows."""
    for item in parts:
        one, other = start.tensors.get(item.name), found.tensors.get(item.name)
        if one is None or other is None or one.entry.shape[1:] != other.entry.shape[1:]:
            continue
        if {one.entry.dtype, other.entry.dtype} <= DTYPES.keys():
            yield item, movement(item.name, start, found)


def by_layer(found: Mapping[str, Movement], layer_of: Mapping[str, str]) -> dict[str, Movement]:
    """Combine the movements of tensors by layer."""
    names: dict[str, list[Movement]] = {}
    for name, each in found.items():
        names.setdefault(layer_of[name], []).append(each)
    return {layer: combined(layer, each) for layer, each in names.items()}


def differing(one: Checkpoint, name: str, other: Checkpoint, repeated: str) -> bool:
    """Return whether two tensors differ in shape or in any value."""
    first, second = one.tensors[name], other.tensors[repeated]
    if first.entry.shape != second.entry.shape or not {first.entry.dtype, second.entry.dtype} <= DTYPES.keys():
        return True
    pairs = zip(Weights(one).pieces(name, PIECE), Weights(other).pieces(repeated, PIECE), strict=True)
    return any(not torch.equal(before.double(), after.double()) for before, after in pairs)
