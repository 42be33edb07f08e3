"""What a conversion was made of, opened and understood."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, Unpack

from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.gemma3 import Gemma3
from t5g2convert.checkpoint.hub import Origin, again, fetch_telling, open_source
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
        source: The source's folder; a str may also be a model of the Hub.
        vision_from: The donor's.

    Raises:
        CheckpointError: A model is not sound, not Gemma 3, or has a switch that the passes do not know.
        HubError: The Hub does not have one or give it out, or cannot be reached.
    """

    def __init__(self, source: Origin, vision_from: Origin | None = None) -> None:
        self.checkpoint = open_source(source)
        self.path = self.checkpoint.path
        self.gemma = Gemma3Reference(self.checkpoint)
        self.donor = None if vision_from is None else open_source(vision_from)
        self.vision_from = None if self.donor is None else self.donor.path
        self._seeing = self.gemma if self.donor is None else Gemma3Reference(self.donor)

    @property
    def origins(self) -> tuple[Path | Checkpoint, Path | Checkpoint | None]:
        """Both, to be opened by the converter."""
        return again(self.checkpoint), None if self.donor is None else again(self.donor)

    def fetch(self, names: Mapping[Any, Iterable[str]], told: Callable[[str], None]) -> None:
        """Fetch the files that are read of a model of the Hub.

        Args:
            names: Files by role.
            told: Told how far it is.

        Raises:
            CheckpointError: A file has another header than was read on the Hub.
            HubError: The Hub does not give a file out, or cannot be reached.
            OutputError: The cache's disk has too little room or fails.
        """
        fetch_telling(self.checkpoint, names["source"], told)
        if self.donor is not None:
            fetch_telling(self.donor, names["vision_from"], told)

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
