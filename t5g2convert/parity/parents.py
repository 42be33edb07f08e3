"""What a conversion was made of, opened and understood."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Unpack

from t5g2convert.checkpoint.families.gemma3 import Gemma3, Gemma3Text
from t5g2convert.checkpoint.inputs import DECODER_FROM, VISION_FROM
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.errors import CheckpointError
from t5g2convert.reference.gemma2 import Gemma2Reference
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.vision import VisionTower
from t5g2convert.reference.weights import ReadOptions


@dataclass(frozen=True, slots=True)
class Stacks:
    """The settings that both text stacks of a target should have, and the rows of the table that they share."""

    encoder: Gemma3Text
    decoder: Gemma3Text
    rows: int


class Parent:
    """The source of a conversion, and the other checkpoints that it read.

    Attributes:
        sources: All of them, open.
        folders: Where they lie.
        checkpoint: The source.
        donor: The donor of the vision tower; None where images are the source's own, or there are none.

    Args:
        sources: All of them, open.
    """

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self.folders = sources.folders
        self.checkpoint, self.donor = sources.source, sources.others.get(VISION_FROM)

    @property
    def vision(self) -> VisionTower | None:
        """The tower that the target should have."""
        return None

    @property
    def writing(self) -> Path:
        """The folder whose generation_config.json counts: that of the decoder's parent."""
        return self.folders.by_role.get(DECODER_FROM, self.folders.source)

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
        decoder: The checkpoint of the decoder's parent.

    Raises:
        CheckpointError: A model is not Gemma 3, or has a switch that the passes do not know.
    """

    def __init__(self, sources: Sources) -> None:
        super().__init__(sources)
        self.gemma = Gemma3Reference(self.checkpoint)
        self._seeing = self.gemma if self.donor is None else Gemma3Reference(self.donor)
        self.decoder = sources.others.get(DECODER_FROM, self.checkpoint)
        self._writing = self.gemma if self.decoder is self.checkpoint else Gemma3Reference(self.decoder)

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

    def stacks(self, options: Mapping[str, Any]) -> Stacks:
        """The settings that both stacks should have, by the options of the manifest.

        Raises:
            CheckpointError: A parent has no such layers.
        """
        own = {"encoder": self.gemma.model.text, "decoder": self._writing.model.text}
        taken = {part: taken_layers(part, len(text.layer_types), options) for part, text in own.items()}
        encoder, decoder = (_with_layers(text, taken[part]) for part, text in own.items())
        table = self._writing if options.get("embedding_from") == "decoder-from" else self.gemma
        return Stacks(encoder, decoder, table.model.text.vocab_size)


def taken_layers(part: str, depth: int, options: Mapping[str, Any]) -> tuple[int, ...]:
    """The layers that a stack has of its parent, by the options of the manifest.

    Raises:
        CheckpointError: The parent has no such layers.
    """
    layers: Sequence[int] | None = options.get(f"{part}_layers")
    if layers is not None and max(layers) >= depth:
        raise CheckpointError(f"t5g2.json tells of layer {max(layers)}, the {part}'s parent has {depth} layers")
    return tuple(range(depth) if layers is None else layers)


def _with_layers(text: Gemma3Text, layers: tuple[int, ...]) -> Gemma3Text:
    kinds = [text.layer_types[layer] for layer in layers]
    return text.model_copy(update={"num_hidden_layers": len(kinds), "layer_types": kinds})
