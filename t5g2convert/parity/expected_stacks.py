"""What the stacks of T5Gemma 2 should compute: which layers of which Gemma 3."""

from dataclasses import dataclass

from t5g2convert.reference.gemma3 import Gemma3Reference


@dataclass(frozen=True)
class Ancestor:
    """What a stack of T5Gemma 2 should compute: some layers of a Gemma 3, in their order.

    Attributes:
        gemma: Gemma 3, with the embedding table that the target has.
        layers: Their numbers; the stack's layer i is the layer layers[i].
    """

    gemma: Gemma3Reference
    layers: tuple[int, ...]

    @classmethod
    def whole(cls, gemma: Gemma3Reference) -> "Ancestor":
        """All layers."""
        return cls(gemma, tuple(range(len(gemma.text))))


@dataclass(frozen=True)
class Ancestors:
    """What both stacks of T5Gemma 2 should compute."""

    encoder: Ancestor
    decoder: Ancestor

    @classmethod
    def both(cls, gemma: Gemma3Reference) -> "Ancestors":
        """One Gemma 3, whole."""
        return cls(Ancestor.whole(gemma), Ancestor.whole(gemma))

    @property
    def alike(self) -> bool:
        """Whether both are the same layers of the same model."""
        return self.encoder.gemma is self.decoder.gemma and self.encoder.layers == self.decoder.layers
