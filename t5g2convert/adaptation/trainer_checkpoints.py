"""Checkpoints that transformers' Trainer wrote: `checkpoint-100`, `checkpoint-200`, ..., each a model of its own.

They hold every tensor, the frozen ones too, in the spelling and the dtype that transformers chose. What Trainer writes
beside them for itself, as optimizer.pt, is pickled and never opened.
"""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from t5g2convert.checkpoint.families.registry import implied_tensors
from t5g2convert.checkpoint.families.t5gemma2 import MODEL_TYPE
from t5g2convert.checkpoint.families.t5gemma2_spellings import as_published
from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint, some
from t5g2convert.conversion.trained_model import FROZEN
from t5g2convert.errors import CheckpointError
from t5g2convert.reference.weights import DTYPES, Weights

PIECE: Final = 1 << 20
"""Elements that are read at once."""

_CHECKPOINT: Final = re.compile(r"checkpoint-(\d+)")


def saved_checkpoints(run: Path) -> dict[int, Path]:
    """The checkpoints in the folder that Trainer was given, by their steps, in order; none where there are none."""
    if not run.is_dir():
        return {}
    found = {path: _CHECKPOINT.fullmatch(path.name) for path in run.iterdir() if path.is_dir()}
    return dict(sorted((int(name[1]), path) for path, name in found.items() if name is not None))


class Saved:
    """The trained values of one checkpoint.

    Attributes:
        folder: The checkpoint.
        names: The tensors but for those of the vision tower, by their published names, with their shapes.

    Args:
        folder: The checkpoint.
        model: The T5Gemma 2 that was trained.

    Raises:
        CheckpointError: It is not a sound T5Gemma 2, is of other tensors than the model, has a head, or its vision
            tower has moved.
    """

    def __init__(self, folder: Path, model: Checkpoint) -> None:
        self.folder = folder
        raw = open_checkpoint(folder)
        if raw.config.get("model_type") != MODEL_TYPE:
            raise CheckpointError(f"is a {raw.config.get('model_type')}, expected {MODEL_TYPE}", where=folder)
        published = as_published(raw)
        self._found = Weights(published.checkpoint)
        items = list(implied_tensors(model.config, model.path / "config.json"))
        faults = [f"{name} is not one of the model" for name in (*published.unexpected, *published.heads)]
        for item in items:
            stored = published.checkpoint.tensors.get(item.name)
            if stored is None:
                faults.append(f"{item.name} is missing")
            elif stored.entry.shape != item.shape:
                faults.append(f"{item.name} has shape {list(stored.entry.shape)}, expected {list(item.shape)}")
            elif stored.entry.dtype not in DTYPES:
                faults.append(f"{item.name} has dtype {stored.entry.dtype}, expected one of {', '.join(DTYPES)}")
        if faults:
            message = f"{len(faults)} tensor(s) are not those of {model.name}"
            raise CheckpointError(message, where=folder, details=faults)
        moved = [item.name for item in items if item.part == FROZEN and self._has_moved(item.name, model)]
        if moved:
            raise CheckpointError(
                f"the vision tower was trained too, which stays frozen here: {some(moved)}",
                where=folder,
                hint=f"t5g2 verify {folder} --source {model.path} tells how far it has moved",
            )
        self.names: Mapping[str, tuple[int, ...]] = {item.name: item.shape for item in items if item.part != FROZEN}

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        """The values of a tensor, a piece at a time.

        Raises:
            CheckpointError: A file cannot be read.
        """
        for piece in self._found.pieces(name, PIECE):
            yield piece.float().numpy()

    def _has_moved(self, name: str, model: Checkpoint) -> bool:
        pairs = zip(Weights(model).pieces(name, PIECE), self._found.pieces(name, PIECE), strict=True)
        return any(not torch.equal(start.to(found.dtype), found) for start, found in pairs)
