"""The shape of a LoRA adapter that is trained: its rank, its scale, and the layers that it changes."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from t5g2convert.errors import UsageError

TARGETS: Final = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All linear layers of attention and MLP."""


@dataclass(frozen=True, slots=True)
class LoraShape:
    """An adapter: its rank, the numerator of its scale alpha / rank, and the layers that it changes, by name."""

    rank: int
    alpha: float
    targets: tuple[str, ...]

    def parameters(self, shapes: Mapping[str, tuple[int, ...]]) -> int:
        """Return the number of the adapter's parameters, from the shapes of the model's tensors on disk."""
        targets = [shape for name, shape in shapes.items() if re.fullmatch(rf"{self.pattern}\.weight", name)]
        return sum(self.rank * (rows + columns) for rows, columns in targets)

    @property
    def pattern(self) -> str:
        """The targets as one regular expression, as peft reads it: it matches whole names of modules."""
        return rf"model\.(encoder(\.text_model)?|decoder)\.layers\.\d+\.(self_attn|mlp)\.({'|'.join(self.targets)})"


def parse_targets(text: str) -> tuple[str, ...]:
    """Return the names of `--lora-targets`.

    >>> parse_targets("q_proj,v_proj")
    ('q_proj', 'v_proj')
    """
    return tuple(text.split(","))


def check_targets(targets: tuple[str, ...]) -> None:
    """Refuse targets that are not linear layers of the text stacks.

    Raises:
        UsageError: A target is another module, or there is none.
    """
    if wrong := [name for name in targets if name not in TARGETS]:
        raise UsageError(
            f"--lora-targets {','.join(wrong)}: not a linear layer of the text stacks",
            hint=f"expected some of {','.join(TARGETS)}; the vision tower, the projector and the embedding stay frozen",
        )
    if not targets or len(set(targets)) < len(targets):
        raise UsageError(f"--lora-targets {','.join(targets)}: expected different names")
