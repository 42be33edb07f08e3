"""The model that a folder was made from, and the other checkpoints that the conversion read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from t5g2convert.checkpoint.families.gemma3 import Gemma3, Gemma3Text
from t5g2convert.checkpoint.sources import DECODER_FROM, VISION_FROM, Sources
from t5g2convert.errors import CheckpointError
from t5g2convert.reference.gemma2 import Gemma2Reference
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.vision import VisionTower
from t5g2convert.reference.weights import ReadOptions


@dataclass(frozen=True, slots=True)
class StackSettings:
    """The expected settings of both text stacks of a target, and the number of rows of their shared table."""

    encoder: Gemma3Text
    decoder: Gemma3Text
    rows: int


class SourceModel:
    """The source of a conversion, and the other checkpoints that it read.

    Attributes:
        sources: All checkpoints, open.
        folders: The folders of the checkpoints.
        checkpoint: The source.
        donor: The checkpoint that the vision tower came from; None if it is the source's own, or there is no tower.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.folders = sources.folders
        self.checkpoint, self.donor = sources.source, sources.others.get(VISION_FROM)

    @property
    def vision(self) -> VisionTower | None:
        """The expected vision tower of the target."""
        return None

    @property
    def generation_folder(self) -> Path:
        """The folder with the relevant generation_config.json, the decoder parent's."""
        return self.folders.by_role.get(DECODER_FROM, self.folders.source)

    def holds(self, path: Path) -> bool:
        """Return whether a path is in one of the source folders: faults in it are not the output's."""
        return any(path.is_relative_to(folder) for folder in self.folders.all)


class Gemma2Source(SourceModel):
    """Gemma 2 as the source; `gemma` is its reference pass.

    Raises:
        CheckpointError: The model is not Gemma 2, or has a setting that the passes do not know.
    """

    def __init__(self, sources: Sources) -> None:
        super().__init__(sources)
        self.gemma = Gemma2Reference(self.checkpoint)


class T5Gemma2Source(SourceModel):
    """T5Gemma 2 as the source of an extracted part or of a training; `whole` is its reference pass.

    Raises:
        CheckpointError: The model is not T5Gemma 2, or has a setting that the passes do not know.
    """

    def __init__(self, sources: Sources) -> None:
        super().__init__(sources)
        self.whole = T5Gemma2Reference(self.checkpoint)

    @property
    def vision(self) -> VisionTower | None:
        """The model's own tower."""
        return self.whole.vision


class Gemma3Source(SourceModel):
    """Gemma 3 as the source.

    Attributes:
        gemma: Its reference pass.
        decoder: The checkpoint that gave the decoder.

    Raises:
        CheckpointError: A model is not Gemma 3, or has a setting that the passes do not know.
    """

    def __init__(self, sources: Sources) -> None:
        super().__init__(sources)
        self.gemma = Gemma3Reference(self.checkpoint)
        self._with_tower = self.gemma if self.donor is None else Gemma3Reference(self.donor)
        self.decoder = sources.others.get(DECODER_FROM, self.checkpoint)
        self._of_decoder = self.gemma if self.decoder is self.checkpoint else Gemma3Reference(self.decoder)

    @property
    def vision(self) -> VisionTower | None:
        """The tower of the source, or of the donor."""
        return self._with_tower.vision

    def tower(self, **reading: Unpack[ReadOptions]) -> VisionTower | None:
        """Return the tower of the source or donor, read with other options."""
        return Gemma3Reference(self._with_tower.weights.checkpoint, **reading).vision

    def model(self, projector: str | None) -> Gemma3:
        """Return the expected settings of the target.

        Raises:
            MappingError: Source and donor do not fit each other.
        """
        model = self.gemma.model
        return model if self.donor is None else model.with_vision_of(self._with_tower.model, projector)

    def stacks(self, options: Mapping[str, Any]) -> StackSettings:
        """Return the expected settings of both stacks under the options that the manifest records.

        Raises:
            CheckpointError: A checkpoint lacks a layer that the options name.
        """
        own = {"encoder": self.gemma.model.text, "decoder": self._of_decoder.model.text}
        taken = {part: taken_layers(part, len(text.layer_types), options) for part, text in own.items()}
        encoder, decoder = (_with_layers(text, taken[part]) for part, text in own.items())
        table = self._of_decoder if options.get("embedding_from") == "decoder-from" else self.gemma
        return StackSettings(encoder, decoder, table.model.text.vocab_size)


def taken_layers(part: str, depth: int, options: Mapping[str, Any]) -> tuple[int, ...]:
    """Return which of the source's layers a stack has, by number, under the options that the manifest records.

    Raises:
        CheckpointError: The source lacks one of them.
    """
    layers: Sequence[int] | None = options.get(f"{part}_layers")
    if layers is not None and max(layers) >= depth:
        raise CheckpointError(f"t5g2.json names layer {max(layers)}, but the {part}'s parent has {depth} layers")
    return tuple(range(depth) if layers is None else layers)


def _with_layers(text: Gemma3Text, layers: tuple[int, ...]) -> Gemma3Text:
    kinds = [text.layer_types[layer] for layer in layers]
    return text.model_copy(update={"num_hidden_layers": len(kinds), "layer_types": kinds})
