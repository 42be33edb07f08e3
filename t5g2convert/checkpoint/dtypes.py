"""The dtypes of safetensors files, and their names in config.json."""

import math
from typing import Final

BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Width of one element in bits, by safetensors dtype (safetensors 0.8.0)."""

CONFIG_NAMES: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""safetensors dtype to config.json name: the dtypes that a model can be converted in."""

BY_CONFIG_NAME: Final = {name: dtype for dtype, name in CONFIG_NAMES.items()}
"""config.json name to safetensors dtype."""


def element_bytes(dtype: str) -> int:
    """Return the bytes of one element of BF16, F16 or F32."""
    return BITS[dtype] // 8


def tensor_bits(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor in bits."""
    return BITS[dtype] * math.prod(shape)
