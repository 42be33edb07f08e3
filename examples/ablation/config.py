"""The config.json of a research model, a variant of T5Gemma 2's ablations (arXiv 2512.14856), and its tensors.

Tied or untied: one embedding table, or one for each stack. Merged or separate: the decoder attends to the encoder in
its self-attention, or in a separate cross-attention. It does so in all layers, or only in full-attention layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal

from t5g2convert.checkpoint.families.config_section import (
    ConfigSection,
    ExpectedTensor,
    describe_model_type,
    parse_section,
    subsection,
)
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2, T5Gemma2Tokens, read_stack
from t5g2convert.checkpoint.families.text_and_vision import SiglipConfig, attention_tensors, stack_tensors
from t5g2convert.errors import CheckpointError

MODEL_TYPE: Final = "t5g2_research"

NORMS: Final = ("pre_self_attn_layernorm", "post_self_attn_layernorm")
CROSS_NORMS: Final = ("pre_cross_attn_layernorm", "post_cross_attn_layernorm")

NO_TOWER: Final = SiglipConfig(hidden_size=1, intermediate_size=1, num_hidden_layers=0, image_size=1, patch_size=1)


class Variant(ConfigSection):
    """The settings that the ablations vary.

    Attributes:
        tied: Whether encoder, decoder and softmax share one table; otherwise the softmax uses the decoder's.
        attention: Whether the decoder attends to the encoder in its self-attention or in a cross-attention after it.
        cross_layers: Which of the decoder's layers attend to the encoder.
    """

    tied: bool
    attention: Literal["merged", "separate"]
    cross_layers: Literal["all", "full"]


@dataclass(frozen=True, slots=True)
class ResearchConfig(T5Gemma2):
    """A research model: a variant of a text-only T5Gemma 2."""

    variant: Variant = field(kw_only=True)

    def reads_encoder(self, layer: int) -> bool:
        """Return whether a layer of the decoder attends to the encoder's output."""
        return self.variant.cross_layers == "all" or self.decoder.layer_types[layer] == "full_attention"

    def has_cross_attention(self, layer: int) -> bool:
        """Return whether a layer of the decoder has a cross-attention."""
        return self.variant.attention == "separate" and self.reads_encoder(layer)


def read_research(config: Mapping[str, Any], where: Path) -> ResearchConfig:
    """Read the settings that determine a folder's tensors and their computation.

    Raises:
        CheckpointError: The config is another model's, a field is missing or of the wrong type, the stacks differ in
            size, or no layer of the decoder attends to the encoder.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{describe_model_type(config)} is not a research model", where=where)
    variant = parse_section(Variant, config, where)
    encoder, decoder = (read_stack(subsection(config, part, where), where, part) for part in ("encoder", "decoder"))
    for name in ("hidden_size", "vocab_size"):
        if (one := getattr(encoder, name)) != (other := getattr(decoder, name)):
            raise CheckpointError(f"decoder.{name} is {other}, expected the encoder's {one}", where=where)
    # The model does not read images, so their ids are outside the table.
    outside = encoder.vocab_size
    tokens = T5Gemma2Tokens(
        mm_tokens_per_image=1, boi_token_index=outside, eoi_token_index=outside, image_token_index=outside
    )
    model = ResearchConfig(encoder, NO_TOWER, tokens, decoder, variant=variant)
    if not any(map(model.reads_encoder, range(decoder.num_hidden_layers))):
        raise CheckpointError(
            "cross_layers is 'full', but decoder.layer_types has no full_attention: no layer attends to the encoder",
            where=where,
        )
    return model


def research_tensors(config: Mapping[str, Any], where: Path) -> Iterator[ExpectedTensor]:
    """Yield every tensor of a research model once; a tied table is the encoder's.

    Raises:
        CheckpointError: As `read_research`.
    """
    model = read_research(config, where)
    table = (model.encoder.vocab_size, model.encoder.hidden_size)
    yield ExpectedTensor("model.encoder.embed_tokens.weight", "embedding", table)
    if not model.variant.tied:
        yield ExpectedTensor("model.decoder.embed_tokens.weight", "embedding", table)
    for part, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        for name, shape in stack_tensors(stack, NORMS):
            yield ExpectedTensor(f"model.{part}.{name}", part, shape)
    for layer in filter(model.has_cross_attention, range(model.decoder.num_hidden_layers)):
        for name, shape in attention_tensors(model.decoder, "cross_attn", CROSS_NORMS).items():
            yield ExpectedTensor(f"model.decoder.layers.{layer}.{name}", "decoder", shape)


def research_settings(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Read the settings that `inspect` shows.

    Raises:
        CheckpointError: As `read_research`.
    """
    model = read_research(config, where)
    stacks = {"encoder": model.encoder.model_dump(), "decoder": model.decoder.model_dump()}
    return {**model.variant.model_dump(), **stacks}
