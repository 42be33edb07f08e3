"""A checkpoint of a training run: the values that it has for the tensors that were trained.

It is a folder, `step-00000100`, with a distributed checkpoint in it and `checkpoint.json`, which says whose it is. How
it is read, and what of it is trusted, stands in `adaptation.dcp`. Of the distributed checkpoint only `model` is read:
float32 tensors by their names in the published layout. It makes no difference how many processes wrote it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from t5g2convert.adaptation.train.checkpoint_manifest import RECORD_FILE, check_table, read_record
from t5g2convert.adaptation.train.dcp import read_metadata
from t5g2convert.checkpoint.folder import check_folder
from t5g2convert.errors import CheckpointError


class Trained:
    """The trained values of one checkpoint.

    Attributes:
        folder: The checkpoint.
        record: What it says of itself.
        names: The tensors by their names in the published layout, with their shapes.

    Args:
        folder: The checkpoint.

    Raises:
        CheckpointError: It is no checkpoint of a run, is damaged, or has links, strange files or other dtypes in it.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        self.folder, self.record = folder, read_record(folder)
        check_table(folder, self.record)
        self._tensors = read_metadata(folder, "model", beside=frozenset({RECORD_FILE}))
        for name, saved in self._tensors.items():
            if saved.dtype != torch.float32:
                raise CheckpointError(f"{name} is {saved.dtype}, expected torch.float32", where=folder)
        self.names: Mapping[str, tuple[int, ...]] = {name: saved.shape for name, saved in self._tensors.items()}

    def pieces(self, name: str) -> Iterator[NDArray[np.float32]]:
        """The values of a tensor, a few rows at a time.

        Raises:
            CheckpointError: A file cannot be read, or is damaged.
        """
        return self._tensors[name].blocks()

    def read(self, name: str) -> torch.Tensor:
        """A whole tensor, float32.

        Raises:
            CheckpointError: A file cannot be read, or is damaged.
        """
        whole = torch.empty(self.names[name])
        flat, at = whole.view(-1), 0
        for piece in self.pieces(name):
            flat[at : at + piece.size] = torch.from_numpy(piece.reshape(-1))
            at += piece.size
        return whole
