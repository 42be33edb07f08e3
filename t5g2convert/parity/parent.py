"""What a conversion was made of, opened and understood."""

from pathlib import Path
from typing import Unpack

from t5g2convert.checkpoint.gemma3 import Gemma3
from t5g2convert.checkpoint.hub import Origin
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.vision import VisionTower
from t5g2convert.reference.weights import ReadOptions


class Parent:
    """The source of a conversion, and the donor of its vision tower if it has one.

    Attributes:
        sources: Both, open.
        folders: Where both lie.
        checkpoint: The source.
        gemma: What it computes.
        donor: The donor; None where images are the source's own, or there are none.

    Args:
        source: The source's folder; a str may also be a model of the Hub.
        vision_from: The donor's.

    Raises:
        CheckpointError: A model is not sound, not Gemma 3, or has a switch that the passes do not know.
        HubError: The Hub does not have one or give it out, or cannot be reached.
    """

    def __init__(self, source: Origin, vision_from: Origin | None = None) -> None:
        self.sources = Sources.open(source, vision_from)
        self.folders = self.sources.folders
        self.checkpoint, self.donor = self.sources.source, self.sources.vision_from
        self.gemma = Gemma3Reference(self.checkpoint)
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
        return any(path.is_relative_to(folder) for folder in self.folders.all)
