"""A checkpoint of a training run: the values that it has for the tensors that were trained.

It is a folder, `step-00000100`, with a distributed checkpoint in it and `checkpoint.json`, which says whose it is. How
it is read, and what of it is trusted, stands in `adaptation.dcp`. Of the distributed checkpoint only `model` is read:
float32 tensors by their names in the published layout. It makes no difference how many processes wrote it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import PositiveInt

from t5g2convert.adaptation.dcp import read_metadata
from t5g2convert.checkpoint.config import ConfigSection, parse_section
from t5g2convert.checkpoint.folder import check_folder, read_json_object
from t5g2convert.checkpoint.manifest import Digest
from t5g2convert.errors import CheckpointError

CHECKPOINT_FILE: Final = "checkpoint.json"


class _Document(ConfigSection):
    format: Literal[1]
    step: PositiveInt
    settings_sha256: Digest
    objective_sha256: Digest


class Trained:
    """The trained values of one checkpoint.

    Attributes:
        folder: The checkpoint.
        step: The step that it was saved behind.
        settings_sha256: Of the settings of the run.
        objective_sha256: Of what it was trained for.
        names: The tensors by their names in the published layout, with their shapes.

    Args:
        folder: The checkpoint.

    Raises:
        CheckpointError: It is no checkpoint of a run, is damaged, or has links, strange files or other dtypes in it.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        path = folder / CHECKPOINT_FILE
        told = parse_section(_Document, read_json_object(path), path)
        self.folder, self.step = folder, told.step
        self.settings_sha256, self.objective_sha256 = told.settings_sha256, told.objective_sha256
        self._tensors = read_metadata(folder, "model", beside=frozenset({CHECKPOINT_FILE}))
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
