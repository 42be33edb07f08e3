"""One sample of an objective: what the encoder reads, and what the decoder writes."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

NO_POSITION = -1
"""Position of a label that is not a raw token: a sentinel, or the final eos."""


@dataclass(frozen=True, slots=True, eq=False)
class Example:
    """One sample.

    Attributes:
        encoder: uint32 [E], the encoder's input.
        labels: uint32 [D], the decoder's target; the last is eos.
        positions: int64 [D], position of each label in `raw`; -1 for sentinels and the final eos.
        raw: uint32 [L], the text.
        task: Number of the task; see `train.dataset.Samples.task_names`.
    """

    encoder: NDArray[np.uint32]
    labels: NDArray[np.uint32]
    positions: NDArray[np.int64]
    raw: NDArray[np.uint32]
    task: int
