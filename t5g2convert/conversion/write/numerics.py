"""Arithmetic on tensors without torch: NaN and infinity, casts, rounding, and the scaled row."""

import math
import struct
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from t5g2convert.checkpoint.header import element_bytes
from t5g2convert.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_STRUCT_CODES: Final = {"F16": "e", "F32": "f"}
_WORDS: Final = {"BF16": "<u2", "F16": "<u2", "F32": "<u4"}
_FIRST: Final = {"BF16": 0xFF00, "F16": 0xF800, "F32": 0xFF00_0000}
"""Bits of infinity without the sign, shifted left by one; the bits of NaN are higher, those of finite values lower."""


def first_nonfinite(piece: memoryview, dtype: str) -> tuple[int, str] | None:
    """Return the first NaN or infinity of a chunk: its element, and which it is.

    Args:
        piece: Whole elements, little-endian.
        dtype: BF16, F16 or F32.
    """
    import numpy as np  # not needed for planning

    words = np.frombuffer(piece, _WORDS[dtype])
    unsigned = words << 1
    if not words.size or unsigned.max() < _FIRST[dtype]:
        return None
    first = int((unsigned >= _FIRST[dtype]).argmax())
    return first, "infinity" if unsigned[first] == _FIRST[dtype] else "NaN"


def caster(name: str, source: str, target: str) -> Callable[[memoryview], memoryview]:
    """Return a function that casts bytes of whole elements to another dtype.

    Rounding is to nearest, ties to even, as in torch. NaN and infinity are kept.

    Raises (the function):
        CheckpointError: A value is too large for the target dtype.
    """
    import ml_dtypes
    import numpy as np

    # Little-endian, like the format and every platform that torch runs on.
    dtypes = {"BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16), "F32": np.dtype(np.float32)}
    source_dtype, target_dtype = dtypes[source], dtypes[target]

    def cast(piece: memoryview) -> memoryview:
        values = np.frombuffer(piece, source_dtype)
        with np.errstate(over="ignore", invalid="ignore"):
            result = values.astype(target_dtype)
            finite = np.isfinite(result)
            overflown = not finite.all() and np.isfinite(values[~finite]).any()
        if overflown:
            raise CheckpointError(f"has a value too large for {target}", where=f"tensor {name}")
        return memoryview(result.view(np.uint8).data)

    return cast


def scaled_row(row: bytes, source: str, target: str) -> bytes:
    """Return a row of the embedding table times the square root of its width, in the target dtype.

    Rounding follows transformers' Gemma3TextScaledWordEmbedding: the scale is rounded through float32 to the dtype of
    the weights (25.25 for a width of 640 in bfloat16), then the product is rounded to that dtype. Python's floats hold
    these products exactly, so each value is rounded once.

    Args:
        row: Bytes of one row.
        source: safetensors dtype of the row.
        target: safetensors dtype of the result; the row is cast to it before it is scaled.

    Raises:
        CheckpointError: A value is too large for the target dtype.
    """
    try:
        values = decode(_encode(decode(row, source), target), target)
        (scale,) = decode(_encode(decode(_encode([len(values) ** 0.5], "F32"), "F32"), target), target)
        return _encode([value * scale for value in values], target)
    except OverflowError:
        raise CheckpointError(f"has a value too large for {target}", where="the end-of-image embedding") from None


def rounded(name: str, values: "NDArray[np.float32] | NDArray[np.float64]", target: str) -> bytes:
    """Return computed values as bytes of a dtype, each rounded once: to nearest, ties to even.

    Args:
        name: The tensor, for errors.
        values: Finite values, of any shape.
        target: BF16, F16 or F32.

    Raises:
        CheckpointError: A value is too large for the target dtype.
    """
    import ml_dtypes
    import numpy as np

    with np.errstate(over="ignore"):
        if target == "BF16":
            result = _rounded_to_odd(values).astype(ml_dtypes.bfloat16)
        else:
            result = values.astype({"F16": np.float16, "F32": np.float32}[target])
    if not np.isfinite(result).all():
        raise CheckpointError(f"has a value too large for {target}", where=f"tensor {name}")
    return result.tobytes()


def _rounded_to_odd(values: "NDArray[np.float32] | NDArray[np.float64]") -> "NDArray[np.float32]":
    """Return float32 values truncated towards zero, with an odd last bit if anything was cut off.

    ml_dtypes converts a double to bfloat16 through the nearest float32, which rounds twice: a value just past the
    middle between two bfloat16 would first be rounded to the middle. An odd last bit prevents that.
    """
    import numpy as np

    near = values.astype(np.float32)
    bits = near.view(np.uint32)
    back = near.astype(np.float64)
    bits -= np.abs(back) > np.abs(values)
    bits |= back != values
    return near


def widened(data: memoryview, dtype: str) -> "NDArray[np.floating]":
    """Return the exact values of stored bytes; a bfloat16 is the upper half of a float32."""
    import numpy as np

    if dtype == "BF16":
        wide: NDArray[np.uint32] = np.left_shift(np.frombuffer(data, "<u2"), 16, dtype=np.uint32)
        return wide.view(np.float32)
    return np.frombuffer(data, {"F16": "<f2", "F32": "<f4"}[dtype])


def decode(data: bytes, dtype: str) -> list[float]:
    """Return the values of bytes of BF16, F16 or F32."""
    if dtype == "BF16":
        # A bfloat16 is the upper half of a float32.
        halves = struct.unpack(f"<{len(data) // 2}H", data)
        data, dtype = struct.pack(f"<{len(halves)}I", *(half << 16 for half in halves)), "F32"
    return list(struct.unpack(f"<{len(data) // element_bytes(dtype)}{_STRUCT_CODES[dtype]}", data))


def _encode(values: list[float], dtype: str) -> bytes:
    if dtype != "BF16":
        return struct.pack(f"<{len(values)}{_STRUCT_CODES[dtype]}", *values)
    words = struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values))
    return struct.pack(f"<{len(values)}H", *map(_upper_half, words, values))


def _upper_half(word: int, value: float) -> int:
    """Round the bits of a float32 to bfloat16: to nearest, ties to even; NaN has one form, as in torch."""
    if math.isnan(value):
        return 0x7FC0
    # Add half of the last kept bit, less one if the kept part is even.
    half = (word + 0x7FFF + (word >> 16 & 1)) >> 16
    if half & 0x7FFF == 0x7F80 and math.isfinite(value):
        raise OverflowError
    return half
