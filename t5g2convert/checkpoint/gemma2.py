"""Gemma 2's config.json in all its dialects, as one set of values.

Dialects, by the transformers version that writes them: 4.42 to 4.5x `rope_theta`, no `layer_types`, sometimes
`cache_implementation` and `hidden_act`, which the model does not read; later ones list `layer_types`; 5.x has
`rope_parameters`. What is absent has the default of `Gemma2Config` in transformers 5.23.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from t5g2convert.checkpoint.config import (
    MAX_DEPTH,
    ConfigSection,
    Depth,
    Number,
    Positive,
    Scalar,
    Size,
    Token,
    describe_model_type,
    parse_section,
    refuse_bidirectional,
)
from t5g2convert.checkpoint.gemma3 import LayerType
from t5g2convert.checkpoint.rope import read_rope
from t5g2convert.errors import CheckpointError, MappingError

MODEL_TYPE: Final = "gemma2"


class Gemma2Text(ConfigSection):
    """The model; field names and defaults are those of transformers' Gemma2Config and T5GemmaModuleConfig."""

    vocab_size: Size = 256_000
    hidden_size: Size = 2304
    intermediate_size: Size = 9216
    num_hidden_layers: Annotated[Depth, Field(gt=0)] = 26
    num_attention_heads: Size = 8
    num_key_value_heads: Size = 4
    head_dim: Size = 256
    hidden_activation: str = "gelu_pytorch_tanh"
    max_position_embeddings: Size = 8192
    initializer_range: Number = 0.02
    rms_norm_eps: Positive = 1e-6
    use_cache: bool = True
    bos_token_id: Token | None = 2
    eos_token_id: Token | list[Token] | None = 1
    pad_token_id: Token | None = 0
    attention_bias: bool = False
    attention_dropout: Number = 0.0
    query_pre_attn_scalar: Size | Positive = 256
    sliding_window: Size = 4096
    final_logit_softcapping: Positive | None = 30.0
    attn_logit_softcapping: Positive | None = 50.0
    tie_word_embeddings: bool = True
    # Settled from the dialects before validation; never absent afterwards.
    layer_types: list[LayerType]
    rope_theta: Positive
    rope_factor: Positive


@dataclass(frozen=True, slots=True)
class Gemma2:
    """A Gemma 2 model as its config describes it.

    Attributes:
        text: Its settings.
        family: The `model_type` of its config.
    """

    text: Gemma2Text
    family: str = MODEL_TYPE

    @property
    def conditions(self) -> frozenset[str]:
        """`text_only`, and `tied` or `untied` as the softmax reads the embedding matrix or one of its own."""
        return frozenset({"text_only", "tied" if self.text.tie_word_embeddings else "untied"})

    def with_vision_of(self, donor: "Gemma2", projector: str | None) -> "Gemma2":
        """T5Gemma has no images; see `SourceModel`."""
        raise MappingError("--vision-from is for sources that become T5Gemma 2; Gemma 2 becomes T5Gemma without images")

    @property
    def symbols(self) -> Mapping[str, int]:
        """Sizes in elements and counts, by the names that maps use."""
        text = self.text
        return {
            "rows": text.vocab_size,
            "hidden": text.hidden_size,
            "intermediate": text.intermediate_size,
            "query": text.num_attention_heads * text.head_dim,
            "key_value": text.num_key_value_heads * text.head_dim,
            "layers": text.num_hidden_layers,
        }

    @property
    def fields(self) -> Mapping[str, str]:
        """Where the symbols stand in config.json."""
        return {
            "rows": "vocab_size",
            "hidden": "hidden_size",
            "intermediate": "intermediate_size",
            "query": "num_attention_heads * head_dim",
            "key_value": "num_key_value_heads * head_dim",
        }

    @property
    def values(self) -> Mapping[str, Scalar]:
        """The fields under their own names."""
        return self.text.model_dump()


def read_gemma2(config: Mapping[str, Any], where: Path) -> Gemma2:
    """Settle the dialect of a Gemma 2 config and fill its defaults.

    Raises:
        CheckpointError: Another model, a field of the wrong type, two dialects that contradict each other, or a switch
            that T5Gemma does not have.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{describe_model_type(config)} is not Gemma 2", where=where)
    refuse_bidirectional(config, where)
    return Gemma2(read_stack(config, where))


def read_stack(fields: Mapping[str, Any], where: Path, section: str = "") -> Gemma2Text:
    """The settings of Gemma 2, or of a stack of T5Gemma, which has the same under the same names.

    Args:
        fields: A section of config.json.
        where: The file, for errors.
        section: The section's name, for errors.

    Raises:
        CheckpointError: A field of the wrong type, two that contradict each other, or biases.
    """
    dot = f"{section}." if section else ""
    rope = read_rope(fields, 10_000.0, where, dot)
    settled = {"layer_types": _layer_types(fields), "rope_theta": rope.theta, "rope_factor": rope.factor}
    stack = parse_section(Gemma2Text, {**fields, **settled}, where, section)
    if stack.attention_bias:
        raise CheckpointError(f"{dot}attention_bias is true; biases are not converted", where=where)
    if len(stack.layer_types) != stack.num_hidden_layers:
        raise CheckpointError(
            f"{dot}layer_types lists {len(stack.layer_types)} layers, num_hidden_layers is {stack.num_hidden_layers}",
            where=where,
        )
    # transformers 5.23 refuses the first of both models, and nobody can compute the second.
    for multiple, divisor in (("hidden_size", "num_attention_heads"), ("num_attention_heads", "num_key_value_heads")):
        if getattr(stack, multiple) % getattr(stack, divisor):
            raise CheckpointError(
                f"{dot}{multiple} {getattr(stack, multiple)} is no multiple of {divisor} {getattr(stack, divisor)}",
                where=where,
            )
    return stack


def _layer_types(fields: Mapping[str, Any]) -> object:
    """The listed kinds, or sliding and full by turns where none are listed."""
    if fields.get("layer_types") is not None:
        return fields["layer_types"]
    depth = fields.get("num_hidden_layers", 26)
    if type(depth) is not int or depth > MAX_DEPTH:
        return []  # num_hidden_layers is refused by its own name
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(depth)]
