"""Embedding tables in files, for alignment tests."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from t5g2convert.conversion.write.aligned_projector import Table

TORCH: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}

START: Final = 37
"""Where tables begin in their files: behind a header, and on no boundary."""


def to_bytes(tensor: Tensor) -> bytes:
    """Return the bytes as in a safetensors file."""
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@contextmanager
def stored(folder: Path, **tables: Tensor) -> Iterator[list[Table]]:
    """Yield open tables by name, [rows, width], each in its own file."""
    found = []
    for name, values in tables.items():
        (folder / name).write_bytes(b"h" * START + to_bytes(values) + b"t" * 5)
        dtype = next(key for key, value in TORCH.items() if value == values.dtype)
        rows, width = values.shape
        found.append(Table(f"{name}.weight", dtype, rows, width, name, os.open(folder / name, os.O_RDONLY), START))
    try:
        yield found
    finally:
        for table in found:
            os.close(table.fd)


def random(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return normal random numbers, rounded to a dtype."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def ill_conditioned(rows: int, width: int, condition: float, *, seed: int) -> tuple[Tensor, Tensor]:
    """Return a float32 table [rows, width] with about this condition number, and its weakest direction [width, 1]."""
    axes, _ = torch.linalg.qr(random(width, width, seed=seed, dtype=torch.float64))
    sizes = condition ** -torch.linspace(0, 1, width, dtype=torch.float64)
    return (random(rows, width, seed=seed + 1, dtype=torch.float64) * sizes @ axes).float(), axes[-1:].T
