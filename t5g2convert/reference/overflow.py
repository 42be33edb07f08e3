"""Errors for values that are not finite: a pass overflowed, or the checkpoint holds NaN or infinity.

The activations of a real Gemma 3 exceed 65,504, the largest float16; the same weights are right in
bfloat16 and float32.
"""

import torch

from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.reference.weights import DTYPES, Weights

PIECE_ELEMENTS = 1 << 24
"""Elements that are checked at once: 64 MiB in float32."""


def not_finite(what: str, weights: Weights) -> UsageError | CheckpointError:
    """Return the error for `what` a pass computed: it names the dtype where that overflowed, else the checkpoint."""
    return overflow(what, weights) or CheckpointError(
        f"{what} are not finite in {_dtype_name(weights)}",
        where=weights.checkpoint.path,
        hint="nothing can be computed with them: the weights hold NaN, infinity or numbers that are too large",
    )


def overflow(what: str, weights: Weights) -> UsageError | None:
    """Return the error for a float16 pass over a checkpoint of finite weights; None for any other pass."""
    if _dtype(weights) != torch.float16 or not _all_finite(weights):
        return None
    return UsageError(
        f"float16 overflows at 65504: {what} are not finite, though all weights are",
        hint="compute with --dtype float32",
    )


def _dtype(weights: Weights) -> torch.dtype:
    return weights.dtype or DTYPES.get(weights.checkpoint.dtype, torch.float32)


def _dtype_name(weights: Weights) -> str:
    return str(_dtype(weights)).removeprefix("torch.")


def _all_finite(weights: Weights) -> bool:
    """Return whether all stored values that a pass may read are finite."""
    stored = Weights(weights.checkpoint, device=weights.device)
    return all(
        bool(torch.isfinite(piece).all())
        for name, tensor in weights.checkpoint.tensors.items()
        if tensor.entry.dtype in DTYPES
        for piece in stored.pieces(name, PIECE_ELEMENTS)
    )
