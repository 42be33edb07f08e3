"""What a conversion was made of, opened and understood."""

from pathlib import Path
from typing import Final, Unpack

from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.checkpoint.gemma3 import Gemma3
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.reference.gemma2 import Gemma2Reference
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.vision import VisionTower
from t5g2convert.reference.weights import ReadOptions

GENERATION: Final = "generation_config.json"


class Parent:
    """The source of a conversion, and the donor of its vision tower if it has one.

    Attributes:
        sources: Both, open.
        folders: Where both lie.
        checkpoint: The source.
        donor: The donor; None where images are the source's own, or there are none.

    Args:
        sources: Both, open.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.folders = sources.folders
        self.checkpoint, self.donor = sources.source, sources.vision_from

    @property
    def vision(self) -> VisionTower | None:
        """The tower that the target should have."""
        return None

    @property
    def ends(self) -> int | list[int] | None:
        """The end tokens of generation_config.json, if it is there and names some."""
        path = self.folders.source / GENERATION
        ends: int | list[int] | None = read_json_object(path).get("eos_token_id") if path.exists() else None
        return ends

    def holds(self, path: Path) -> bool:
        """Whether a path is in one of the folders read, and so its faults are not the output's."""
        return any(path.is_relative_to(folder) for folder in self.folders.all)


class Gemma2Parent(Parent):
    """Gemma 2, as the source of a conversion.

    Attributes:
        gemma: What the source computes.

    Raises:
        CheckpointError: The model is not Gemma 2, or has a switch that the passes do not know.
    """

    def __init__(self, sources: Sources) -> None:
        super().__init__(sources)
        self.gemma = Gemma2Reference(self.checkpoint)


class Gemma3Parent(Parent):
    """Gemma 3, as the source of a conversion.

    Attributes:
        gemma: What the source computes.

    Raises:
        CheckpointError: A model is not Gemma 3, or has a switch that the passes do not know.
    """

    def __init__(self, sources: Sources) -> None:
        super().__init__(sources)
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
