"""Dropped tensors that must repeat another, compared before anything is written: byte by byte, or value by value where
one of the two was saved in another dtype."""

from collections.abc import Callable, Mapping
from typing import Final

from t5g2convert.checkpoint.dtypes import BITS, CONFIG_NAMES
from t5g2convert.conversion.plan.types import Dropped, Plan, Repeated
from t5g2convert.conversion.write.computed_tensors import read_range
from t5g2convert.conversion.write.copy import CHUNK_BYTES
from t5g2convert.conversion.write.numerics import caster, decode
from t5g2convert.errors import CheckpointError

WIDEST: Final = "F32"
"""Every dtype that is converted goes into it exactly."""

HINT: Final = "the target has one matrix for both; an untied model cannot be converted exactly"


def check_repeated(plan: Plan, sources: Mapping[str, int]) -> None:
    """Compare all of a plan's dropped tensors that must repeat another, a chunk at a time.

    Args:
        plan: The plan.
        sources: The files that are read, open, by name.

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
    """The first element that differs; both tensors have as many, which the plan has seen."""
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
    """What makes the bytes of values of the one dtype those of the other, which holds them exactly."""
    if source == target:
        return bytes
    cast = caster("", source, target)
    return lambda piece: bytes(cast(memoryview(piece)))


def _place(element: int, shape: tuple[int, ...]) -> str:
    """Where an element is, as `[3, 17]`."""
    place: list[int] = []
    for extent in reversed(shape):
        place.append(element % extent)
        element //= extent
    return str(place[::-1])


def _values(drop: Dropped, other: Repeated, element: int, sources: Mapping[str, int]) -> str:
    """What both hold there, for dtypes that are converted."""
    if not {drop.dtype, other.dtype} <= CONFIG_NAMES.keys():
        return ""
    values = []
    for source, dtype in ((drop.content, drop.dtype), (other.source, other.dtype)):
        width = BITS[dtype] // 8
        values.append(decode(bytes(read_range(sources, source, element * width, width)), dtype)[0])
    return f" ({values[0]:.9g}, there {values[1]:.9g})"
