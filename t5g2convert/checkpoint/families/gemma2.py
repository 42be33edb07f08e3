"""Gemma 2's config.json, in all its dialects, as one typed config.

Dialects, by the transformers version that writes them: 4.42 to 4.5x have `rope_theta`, no `layer_types`, and sometimes
`cache_implementation` and `hidden_act`, which the model does not read; later versions list `layer_types`; 5.x has
`rope_parameters`. Absent fields have the defaults of `Gemma2Config` in transformers 5.23.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Final

from t5g2convert.checkpoint.families.config_section import (
    MAX_DEPTH,
    Positive,
    Scalar,
    Size,
    describe_model_type,
    parse_section,
    refuse_bidirectional,
    whole,
)
from t5g2convert.checkpoint.families.known_settings import GEMMA2
from t5g2convert.checkpoint.families.rope_config import LayerType, Rope, read_rope
from t5g2convert.checkpoint.families.setting_rules import account, left_note, present
from t5g2convert.checkpoint.families.text_and_vision import (
    GemmaText,
    activation_note,
    check_multiple,
    check_stack,
    stack_fields,
)
from t5g2convert.errors import CheckpointError, MappingError

MODEL_TYPE: Final = "gemma2"


class Gemma2Text(GemmaText):
    """The model, with field names and defaults of transformers' Gemma2Config and T5GemmaModuleConfig."""

    vocab_size: Size = 256_000
    max_position_embeddings: Size = 8192
    final_logit_softcapping: Positive | None = 30.0
    attn_logit_softcapping: Positive | None = 50.0
    tie_word_embeddings: bool = True
    # Settled from the dialects before validation; never absent afterwards.
    rope_theta: Positive
    rope_factor: Positive

    qk_norm: ClassVar[bool] = False

    @property
    def ropes(self) -> Mapping[LayerType, Rope]:
        """The position embedding of each kind of layer; both kinds have the same."""
        rope = Rope(rope_type="linear", rope_theta=self.rope_theta, factor=self.rope_factor)
        return {"full_attention": rope, "sliding_attention": rope}


@dataclass(frozen=True, slots=True)
class Gemma2:
    """A Gemma 2 model as its config describes it.

    Attributes:
        text: Its settings.
        family: The `model_type` of its config.
        notes: Notes on the config for the user.
    """

    text: Gemma2Text
    family: str = MODEL_TYPE
    notes: tuple[str, ...] = ()

    @property
    def features(self) -> frozenset[str]:
        """`text_only`, and `tied` if the softmax reads the embedding matrix, else `untied`."""
        return frozenset({"text_only", "tied" if self.text.tie_word_embeddings else "untied"})

    def with_vision_of(self, donor: "Gemma2", projector: str | None) -> "Gemma2":
        """Refuse a donor: T5Gemma does not read images; see `SourceModel`."""
        raise MappingError("--vision-from does not apply to Gemma 2: it becomes T5Gemma, which has no vision tower")

    @property
    def dims(self) -> Mapping[str, int]:
        """Sizes in elements and counts, by the names that maps use."""
        text = self.text
        return {"rows": text.vocab_size, "hidden": text.hidden_size, **text.dims}

    @property
    def fields(self) -> Mapping[str, str]:
        """The fields of config.json of each dimension."""
        return {"rows": "vocab_size", "hidden": "hidden_size", **stack_fields("")}

    @property
    def values(self) -> Mapping[str, Scalar]:
        """The fields under their own names."""
        return self.text.model_dump()


def read_gemma2(config: Mapping[str, Any], where: Path) -> Gemma2:
    """Read a Gemma 2 config in any dialect, and fill in its defaults.

    Raises:
        CheckpointError: The config is another model's, a field has the wrong type, two dialects contradict each other,
            or T5Gemma lacks a switch that is on.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{describe_model_type(config)} is not Gemma 2", where=where)
    config = present(config)
    refuse_bidirectional(config, where)
    _, rope_left = read_rope(config, 10_000.0, where)
    left = (*account(GEMMA2, config, where), *rope_left)
    text = read_stack(config, where)
    return Gemma2(text, notes=(*left_note(left), *activation_note(config, text.hidden_activation)))


def read_stack(fields: Mapping[str, Any], where: Path, section: str = "") -> Gemma2Text:
    """Read the settings of Gemma 2, or of a stack of T5Gemma, which has the same settings.

    Args:
        fields: A section of config.json.
        where: The file, for errors.
        section: The section's name, for errors.

    Raises:
        CheckpointError: A field has the wrong type, two fields contradict each other, or the model has biases.
    """
    dot = f"{section}." if section else ""
    fields = present(fields)
    rope, _ = read_rope(fields, 10_000.0, where, dot)
    settled = {"layer_types": _layer_types(fields), "rope_theta": rope.rope_theta, "rope_factor": rope.factor}
    stack = parse_section(Gemma2Text, {**fields, **settled}, where, section)
    if stack.attention_bias:
        raise CheckpointError(f"{dot}attention_bias is true; biases are not supported", where=where)
    # transformers 5.23 refuses it.
    check_multiple(stack, "hidden_size", "num_attention_heads", where, dot)
    check_stack(stack, where, section)
    return stack


def _layer_types(fields: Mapping[str, Any]) -> object:
    """Return the listed kinds of layers; by default sliding and full alternate."""
    if fields.get("layer_types") is not None:
        return fields["layer_types"]
    depth = whole(fields.get("num_hidden_layers", 26))
    if type(depth) is not int or depth > MAX_DEPTH:
        return []  # num_hidden_layers is refused by its own name
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(depth)]
