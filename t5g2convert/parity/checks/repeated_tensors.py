"""Whether a dropped tensor repeats another, for provenance: the numbers are compared anew, with torch."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from t5g2convert.checkpoint.dtypes import BITS
from t5g2convert.reference.weights import DTYPES

Read = Callable[[Path, int, int], bytes]
"""Path, first byte and number of bytes of a range to its bytes."""


@dataclass(frozen=True, slots=True)
class Stored:
    """The bytes of a tensor: their file, the first, the one after the last, and their safetensors dtype."""

    file: Path
    start: int
    end: int
    dtype: str

    @property
    def elements(self) -> int:
        """How many numbers they are."""
        return (self.end - self.start) * 8 // BITS[self.dtype]

    def piece(self, first: int, count: int, read: Read) -> bytes:
        """The bytes of some of the numbers."""
        bits = BITS[self.dtype]
        return read(self.file, self.start + first * bits // 8, -(-count * bits // 8))


def repeats(one: Stored, other: Stored, read: Read, piece_bytes: int) -> bool:
    """Whether two tensors hold the same numbers; one of them may be stored in a wider dtype than the other.

    Args:
        one: A tensor.
        other: The other one.
        read: Reads a range of a file.
        piece_bytes: Bytes that are compared at once.
    """
    if one.elements != other.elements:
        return False
    step = piece_bytes * 8 // max(BITS[one.dtype], BITS[other.dtype])
    for first in range(0, one.elements, step):
        count = min(step, one.elements - first)
        pieces = [side.piece(first, count, read) for side in (one, other)]
        if one.dtype != other.dtype:
            pieces = [_widened(piece, side.dtype) for piece, side in zip(pieces, (one, other), strict=True)]
        if pieces[0] != pieces[1]:
            return False
    return True


def _widened(piece: bytes, dtype: str) -> bytes:
    """The same numbers as float32, which holds those of every dtype that a model can be run in."""
    values = torch.frombuffer(bytearray(piece), dtype=DTYPES[dtype]).float()
    return bytes(values.view(torch.uint8).numpy().data)
