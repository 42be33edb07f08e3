"""Checkpoints that overflow float16 in their activations, as real Gemma 3 models do and seeded twins do not."""

import shutil
from pathlib import Path

from safetensors.torch import load_file, save_file

NORM_WEIGHT = 50_000.0
"""Finite in float16, but a state times 1 + this is beyond 65,504 as soon as it is twice the root mean square."""


def make_overflow(source: Path, target: Path, layer: int = 3) -> Path:
    """Copy a single-file checkpoint; the norm after one layer multiplies its states by 50,001."""
    shutil.copytree(source, target)
    tensors = load_file(source / "model.safetensors")
    chosen = [name for name in tensors if name.endswith(f".layers.{layer}.post_feedforward_layernorm.weight")]
    assert chosen
    for name in chosen:
        tensors[name].fill_(NORM_WEIGHT)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return target
