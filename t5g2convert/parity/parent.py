"""What a conversion was made of, opened and understood."""

from pathlib import Path
from typing import Unpack

from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.checkpoint.gemma3 import Gemma3
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.vision import VisionTower
from t5g2convert.reference.weights import ReadOptions


class Parent:
    """The source of a conversion, and the donor of its vision tower if it has one.

    Attributes:
        path: The source's folder.
        checkpoint: The source.
        gemma: What it computes.
        vision_from: The donor's folder; None where images are the source's own, or there are none.
        donor: The donor.

    Args:
        path: The source's folder.
        vision_from: The donor's.

    Raises:
        CheckpointError: A folder is not sound, not Gemma 3, or has a switch that the passes do not know.
    """

    def __init__(self, path: Path, vision_from: Path | None = None) -> None:
        self.path = path
        self.checkpoint = open_checkpoint(path)
        self.gemma = Gemma3Reference(self.checkpoint)
        self.donor = None if vision_from is None else open_checkpoint(vision_from)
        self.vision_from = vision_from
        self._seeing = self.gemma if self.donor is None else Gemma3Reference(self.donor)

    @property
    def vision(self) -> VisionTower | None:
        """The tower that the target should have."""
        return self._seeing.vision

    def tower(self, **reading: Unpack[ReadOptions]) -> VisionTower | None:
        """That tower, read as the options say."""
        return Gemma3Reference(self._seeing.weights.checkpoint, **reading).vision

    def model(self, projector: str | None) -> Gemma3:
        """The settings that the target should have.

        Raises:
            MappingError: Source and donor do not fit each other.
        """
        model = self.gemma.model
        return model if self.donor is None else model.with_vision_of(self._seeing.model, projector)

    def holds(self, path: Path) -> bool:
        """Whether a path is in one of the folders read, and so its faults are not the output's."""
        folders = [self.path] if self.donor is None else [self.path, self.donor.path]
        return any(path.is_relative_to(folder) for folder in folders)
