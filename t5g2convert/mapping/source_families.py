"""The families that a map may convert from: for each `model_type`, the reader of its config and the terms it defines.

A new family is a reader in `t5g2convert.checkpoint` that returns a `SourceModel`, and an entry here.
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families import gemma2, gemma3, t5gemma2
from t5g2convert.checkpoint.families.config_section import SourceModel


@dataclass(frozen=True)
class Family:
    """How to read the configs of one family.

    Attributes:
        read: From the config and its path to the model.
        example: The smallest config that `read` accepts; the terms that maps may use are taken from it.
        variants: The sets of features that hold together; `when:` and `case:` may ask for any of them.
        read_held: The same as `read`, with the names of the checkpoint's tensors, for a family whose config alone does
            not say what a checkpoint is.
    """

    read: Callable[[Mapping[str, Any], Path], SourceModel]
    example: Mapping[str, Any]
    variants: tuple[frozenset[str], ...]
    read_held: Callable[[Mapping[str, Any], Path, Collection[str]], SourceModel] | None = None

    @cached_property
    def terms(self) -> SourceModel:
        """A model of this family, asked only for the names of its dims and values."""
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

FAMILIES: Final[Mapping[str, Family]] = {
    gemma3.MULTIMODAL: Family(
        gemma3.read_gemma3,
        {"model_type": gemma3.MULTIMODAL, "text_config": {}, "vision_config": {}, "mm_tokens_per_image": 49},
        _GEMMA3_VARIANTS,
        read_held=gemma3.read_gemma3,
    ),
    gemma3.TEXT_ONLY: Family(gemma3.read_gemma3, {"model_type": gemma3.TEXT_ONLY}, _GEMMA3_VARIANTS),
    gemma2.MODEL_TYPE: Family(
        gemma2.read_gemma2,
        {"model_type": gemma2.MODEL_TYPE},
        (frozenset({"text_only", "tied"}), frozenset({"text_only", "untied"})),
    ),
    t5gemma2.MODEL_TYPE: Family(
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
    """The sets of features that may hold for a source of these families."""
    return tuple(dict.fromkeys(variant for name in model_types for variant in FAMILIES[name].variants))
