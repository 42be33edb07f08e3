"""Whether the spare rows of an embedding table look alike, or some of them look trained.

Nothing here knows what the fill of a table is: random numbers, one row over and over, and zeros all pass. Rows unlike
most others are looked for, by three measures: the length of a row, its distance from the median row, and its mean. The
centre and the spread of a measure are those of the shortest interval that holds half of the rows, so that trained rows
do not hide each other as long as they are fewer than half; a row more than MOST_SPREADS spreads from the centre stands
out. Rows that were all trained alike, and a row that was hardly moved, are not found.
"""

import math
import struct
from array import array
from collections.abc import Sequence
from statistics import median
from typing import Final

from t5g2convert.checkpoint.dtypes import element_bytes

MOST_SPREADS: Final = 8.0
"""Random rows of a real model's width stay within it; with rows of 8 numbers one table in 400 does not (simulated)."""

LEAST_SPREAD: Final = 0.02
"""Differences below this part are rounding: bfloat16 has 8 bits."""


def rows_that_stand_out(data: bytes, dtype: str, width: int) -> list[int]:
    """Return the numbers of the rows, from 0, that are unlike most others.

    Args:
        data: The rows, as they are stored.
        dtype: Their safetensors dtype: BF16, F16 or F32.
        width: Elements of a row.
    """
    values = _decoded(data, dtype)
    rows = [values[start : start + width] for start in range(0, len(values), width)]
    broken = {number for number, row in enumerate(rows) if not all(map(math.isfinite, row))}
    sound = [number for number in range(len(rows)) if number not in broken]
    if not sound:
        return sorted(broken)
    lengths = [_root_mean_square(rows[number]) for number in sound]
    typical = median(lengths)
    middle = [median(column) for column in zip(*(rows[number] for number in sound), strict=True)]
    # Where all rows are one, distances are rounding: a part of the length is added to all of them.
    floor = LEAST_SPREAD * typical or 1e-30
    distances = [_root_mean_square([a - b for a, b in zip(rows[number], middle, strict=True)]) for number in sound]
    measures = (
        [math.log(length + floor) for length in lengths],
        [math.log(distance + floor) for distance in distances],
        [math.fsum(rows[number]) / width / (length or 1.0) for number, length in zip(sound, lengths, strict=True)],
    )
    found = {sound[place] for measure in measures for place in _outliers(measure)}
    return sorted(broken | found)


def _outliers(values: Sequence[float]) -> list[int]:
    ordered = sorted(values)
    half = (len(ordered) + 1) // 2
    width, start = min((ordered[at + half - 1] - ordered[at], at) for at in range(len(ordered) - half + 1))
    centre = (ordered[start] + ordered[start + half - 1]) / 2
    # Half of a normal distribution lies within 0.674 standard deviations of its mean.
    spread = max(width / (2 * 0.674), LEAST_SPREAD)
    return [place for place, value in enumerate(values) if abs(value - centre) > MOST_SPREADS * spread]


def _root_mean_square(row: Sequence[float]) -> float:
    return math.sqrt(math.fsum(value * value for value in row) / len(row))


def _decoded(data: bytes, dtype: str) -> Sequence[float]:
    """Return the numbers of stored bytes, which are little-endian."""
    count = len(data) // element_bytes(dtype)
    if dtype == "BF16":
        # The upper half of a float32.
        words = array("I", (word << 16 for (word,) in struct.iter_unpack("<H", data)))
        return memoryview(words).cast("B").cast("f").tolist()
    return struct.unpack(f"<{count}{'e' if dtype == 'F16' else 'f'}", data)
