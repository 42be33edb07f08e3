"""The families that a map can convert from: the reader of each `model_type`'s config, and the terms that maps may use.

To add a family, add a reader to `t5g2convert.checkpoint.families` that returns a `SourceModel`, and an entry here.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families import gemma2, gemma3, t5gemma2
from t5g2convert.checkpoint.families.config_section import SourceModel


@dataclass(frozen=True)
class SourceFamily:
    """A family of sources.

    Attributes:
        read: Reads the model from its config and the config's path.
        example: The smallest config that `read` accepts; it defines the terms that maps may use.
        variants: The sets of features that a source can have; `when:` and `case:` may name any of them.
        read_held: Reads the model from its config, the config's path and the names of the checkpoint's tensors, for a
            family with configs that are ambiguous without these names.
    """

    read: Callable[[Mapping[str, Any], Path], SourceModel]
    example: Mapping[str, Any]
    variants: tuple[frozenset[str], ...]
    read_held: Callable[[Mapping[str, Any], Path, Collection[str]], SourceModel] | None = None

    @cached_property
    def terms(self) -> SourceModel:
        """Return an example model of this family, for the names of its dimensions and values."""
        return self.read(self.example, Path("example"))


_GEMMA3_VARIANTS: Final = (
    frozenset({"text_only"}),
    *(frozenset({"vision", f"projector_{made}"}) for made in ("copy", "zeros", "aligned")),
)

_T5GEMMA2_STACK: Final = {
    "vocab_size": 1, "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 1, "sliding_window": 1, "layer_types": ["full_attention"],
    "rope_parameters": {"full_attention": {"rope_theta": 1.0}},
}  # fmt: skip
_T5GEMMA2_TOWER: Final = {
    "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 1, "image_size": 1, "patch_size": 1,
}  # fmt: skip

FAMILIES: Final[Mapping[str, SourceFamily]] = {
    gemma3.MULTIMODAL: SourceFamily(
        gemma3.read_gemma3,
        {"model_type": gemma3.MULTIMODAL, "text_config": {}, "vision_config": {}, "mm_tokens_per_image": 49},
        _GEMMA3_VARIANTS,
        read_held=gemma3.read_gemma3,
    ),
    gemma3.TEXT_ONLY: SourceFamily(gemma3.read_gemma3, {"model_type": gemma3.TEXT_ONLY}, _GEMMA3_VARIANTS),
    gemma2.MODEL_TYPE: SourceFamily(
        gemma2.read_gemma2,
        {"model_type": gemma2.MODEL_TYPE},
        (frozenset({"text_only", "tied"}), frozenset({"text_only", "untied"})),
    ),
    t5gemma2.MODEL_TYPE: SourceFamily(
        t5gemma2.read_t5gemma2,
        {
            "model_type": t5gemma2.MODEL_TYPE,
            "encoder": {"text_config": _T5GEMMA2_STACK, "vision_config": _T5GEMMA2_TOWER},
            "decoder": _T5GEMMA2_STACK,
        },
        (frozenset({"vision"}), frozenset({"text_only"})),
    ),
}
"""`model_type` to family."""


def source_variants(model_types: Iterable[str]) -> tuple[frozenset[str], ...]:
    """Return the sets of features that a source of these families can have."""
    return tuple(dict.fromkeys(variant for name in model_types for variant in FAMILIES[name].variants))
