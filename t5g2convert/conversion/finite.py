"""NaN and infinity, found in the bytes while they pass."""

from typing import Final

from t5g2convert.checkpoint.dtypes import element_bytes
from t5g2convert.conversion.contents import numpy_dtype

_SUSPECT: Final = {
    "BF16": b"\x7f\xff",
    "F32": b"\x7f\xff",
    "F16": b"\x7c\x7d\x7e\x7f\xfc\xfd\xfe\xff",
}
"""First bytes, sign and upper exponent, that NaN and infinity have; of numbers only those from 2**127 (F16: none)."""


def first_nonfinite(data: bytearray, length: int, dtype: str) -> tuple[int, str] | None:
    """The first element that is no number, and what it is: NaN or infinity.

    Weights have none, and nothing of their size, so that looking for a few values among every element's last byte
    settles it, at 6 GB/s (sha256 runs at 1.8); only a piece that has one is decoded, and numpy imported for it.

    Args:
        data: Little-endian elements.
        length: How many bytes of `data` count; a multiple of the element size.
        dtype: BF16, F16 or F32.
    """
    width = element_bytes(dtype)
    tops = data[width - 1 : length : width]
    if not any(top in tops for top in _SUSPECT[dtype]):
        return None
    import numpy as np

    values = np.frombuffer(memoryview(data)[:length], numpy_dtype(dtype))
    with np.errstate(invalid="ignore"):  # a signalling NaN warns when it is looked at
        found = np.flatnonzero(~np.isfinite(values))
        return (int(found[0]), "NaN" if np.isnan(values[found[0]]) else "infinity") if found.size else None
