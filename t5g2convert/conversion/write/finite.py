"""NaN and infinity, found in the bytes while they pass."""

from typing import Final

_WORDS: Final = {"BF16": "<u2", "F16": "<u2", "F32": "<u4"}
_FIRST: Final = {"BF16": 0xFF00, "F16": 0xF800, "F32": 0xFF00_0000}
"""Infinity's bits without the sign, moved up by one; NaN's are higher, and every number's lower."""


def first_nonfinite(piece: memoryview, dtype: str) -> tuple[int, str] | None:
    """The first element that is no number, and what it is: NaN or infinity.

    Args:
        piece: Whole elements, little-endian.
        dtype: BF16, F16 or F32.
    """
    import numpy as np  # a plan does without

    words = np.frombuffer(piece, _WORDS[dtype])
    unsigned = words << 1
    if not words.size or unsigned.max() < _FIRST[dtype]:
        return None
    first = int((unsigned >= _FIRST[dtype]).argmax())
    return first, "infinity" if unsigned[first] == _FIRST[dtype] else "NaN"
