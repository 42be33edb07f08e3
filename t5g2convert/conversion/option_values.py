"""The values of options that are texts: sizes of shards, a scaling of RoPE, a final norm of the encoder."""

import math
import re
from decimal import Decimal
from typing import Final

from t5g2convert.checkpoint.families.config_section import MAX_INTEGER
from t5g2convert.errors import UsageError

KEEP: Final = "keep"
"""The value of `--dtype`, `--rope-scaling` and `--encoder-norm` that changes nothing."""

UNIT: Final = "unit"
"""The value of `--encoder-norm` for a factor of 1."""

FACTORS: Final = (0.01, 10_000.0)
"""Bounds of the factor of `--encoder-norm`: smaller ones may round to 0 in bfloat16, float16 has no larger ones."""

SMALLEST_SHARD = 10**6
"""Smaller sizes on the command line, in bytes, are typing errors, like 5 for 5G: they would split a model into
thousands of files."""

_UNITS: Final = {
    "": 1, "B": 1,
    "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
"""Decimal and binary units as in transformers: GB is 10^9 bytes, GiB is 2^30; the B may be left out."""


def parse_shard_size(text: str) -> int:
    """Return the bytes of `--max-shard-size`: `5G`, `5GB`, `500MB`, `4GiB` or a plain number, in any case.

    Raises:
        UsageError: The text is not a size, or the size is too small.
    """
    hint = "use a form like 5G, 500MB or 4GiB"
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError(f"--max-shard-size {text!r} is not a size", hint=hint)
    size = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    if size < SMALLEST_SHARD:
        raise UsageError(f"--max-shard-size {text!r} is below the minimum, 1 MB", hint=hint)
    if size >= 2**63:
        raise UsageError(f"--max-shard-size {text!r} exceeds the largest file size", hint=hint)
    return size


def parse_encoder_norm(norm: str) -> float | None:
    """Return the factor of `--encoder-norm`; None for `keep`.

    Raises:
        UsageError: The text is malformed, or the factor is out of range.
    """
    if norm == KEEP:
        return None
    try:
        factor = 1.0 if norm == UNIT else float(norm)
    except ValueError:
        factor = math.nan
    least, most = FACTORS
    if not least <= factor <= most:
        raise UsageError(f"--encoder-norm {norm!r} is not {KEEP}, {UNIT}, or a number between {least:g} and {most:g}")
    return factor


def parse_rope_scaling(scaling: str) -> float | None:
    """Return the factor of `--rope-scaling`; None for `keep`.

    Raises:
        UsageError: The text is malformed, or the factor is out of range.
    """
    if scaling == KEEP:
        return None
    kind, _, text = scaling.partition(":")
    try:
        factor = float(text) if kind == "linear" else math.nan
    except ValueError:
        factor = math.nan
    if math.isnan(factor):
        raise UsageError(
            f"unknown --rope-scaling {scaling!r}", hint=f"expected {KEEP}, or linear:F, for example linear:8"
        )
    if not 1 / MAX_INTEGER <= factor <= MAX_INTEGER:
        raise UsageError(
            f"the factor of --rope-scaling must be between 1/{MAX_INTEGER} and {MAX_INTEGER}, got {factor}"
        )
    return factor
