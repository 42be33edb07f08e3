"""Rotary position embedding (RoPE; Su et al., arXiv 2104.09864), with linear interpolation of positions."""

from typing import NamedTuple

import torch
from torch import Tensor

from t5g2convert.checkpoint.families.rope_config import Rope


class Rotation(NamedTuple):
    """Cosine and sine of the angle of every position and channel, each [T, D]."""

    cos_TD: Tensor
    sin_TD: Tensor


def rotation(rope: Rope, head_dim: int, positions_T: Tensor, dtype: torch.dtype) -> Rotation:
    """The rotation of each position: wavelengths in float32, the result rounded to `dtype`.

    Channel d and channel d + D/2 form a pair that turns by position / (factor * theta ** (2 d / D)).
    """
    channels = torch.arange(0, head_dim, 2, dtype=torch.float32, device=positions_T.device)
    frequencies = 1.0 / rope.rope_theta ** (channels / head_dim) / rope.linear_factor
    angles = positions_T.float()[:, None] * frequencies
    angles_TD = torch.cat((angles, angles), dim=-1)
    return Rotation(angles_TD.cos().to(dtype), angles_TD.sin().to(dtype))


def rotate(x_BHTD: Tensor, turn: Rotation) -> Tensor:
    """Turn every pair of channels by its angle."""
    half = x_BHTD.shape[-1] // 2
    turned = torch.cat((-x_BHTD[..., half:], x_BHTD[..., :half]), dim=-1)
    return x_BHTD * turn.cos_TD + turned * turn.sin_TD
