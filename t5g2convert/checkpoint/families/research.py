"""The config.json of a research model, one of the forms of the paper's ablations (arXiv 2512.14856), and its tensors.

Tied or untied: one embedding table, or one for each stack. Merged or separate: the decoder reads the encoder in its
self-attention, or in an attention of its own. In all layers, or in those of full attention alone.

The list of tensors stands here in code, apart from any weight map, so that a map that forgets one is found out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from t5g2convert.checkpoint.families.config_section import (
    ConfigSection,
    ImpliedTensor,
    Token,
    describe_model_type,
    parse_section,
    subsection,
)
from t5g2convert.checkpoint.families.expected_tensors import attention_tensors, stack_tensors
from t5g2convert.checkpoint.families.t5gemma2 import Stack, read_stack
from t5g2convert.errors import CheckpointError

MODEL_TYPE: Final = "t5g2_research"

NORMS: Final = ("pre_self_attn_layernorm", "post_self_attn_layernorm")
CROSS_NORMS: Final = ("pre_cross_attn_layernorm", "post_cross_attn_layernorm")


class Form(ConfigSection):
    """What the ablations vary, and the tokens that the model writes with.

    Attributes:
        tied: Whether one table serves encoder, decoder and softmax; otherwise the softmax reads the decoder's.
        attention: How the decoder reads the encoder: in its self-attention, or in one of its own behind it.
        cross_layers: Which of the decoder's layers read it.
    """

    tied: bool
    attention: Literal["merged", "separate"]
    cross_layers: Literal["all", "full"]
    bos_token_id: Token | None = None
    eos_token_id: Token | list[Token] | None = None
    pad_token_id: Token | None = None


@dataclass(frozen=True, slots=True)
class Research:
    """A research model as its config describes it."""

    form: Form
    encoder: Stack
    decoder: Stack

    def reads_encoder(self, layer: int) -> bool:
        """Whether a layer of the decoder reads the encoder's output."""
        return self.form.cross_layers == "all" or self.decoder.layer_types[layer] == "full_attention"

    def has_cross_attention(self, layer: int) -> bool:
        """Whether a layer of the decoder has an attention of its own to it."""
        return self.form.attention == "separate" and self.reads_encoder(layer)


def read_research(config: Mapping[str, Any], where: Path) -> Research:
    """Read what decides which tensors such a folder holds and what they compute.

    Raises:
        CheckpointError: Another model, a field that is missing or of the wrong type, stacks of unlike sizes, or a
            decoder none of whose layers reads the encoder.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{describe_model_type(config)} is no research model", where=where)
    form = parse_section(Form, config, where)
    encoder, decoder = (read_stack(subsection(config, part, where), where, part) for part in ("encoder", "decoder"))
    for name in ("hidden_size", "vocab_size"):
        if (one := getattr(encoder, name)) != (other := getattr(decoder, name)):
            raise CheckpointError(f"decoder.{name} is {other}, expected the encoder's {one}", where=where)
    model = Research(form, encoder, decoder)
    if not any(map(model.reads_encoder, range(decoder.num_hidden_layers))):
        raise CheckpointError(
            "cross_layers is 'full', and decoder.layer_types has no full_attention: nothing would read the encoder",
            where=where,
        )
    return model


def research_tensors(config: Mapping[str, Any], where: Path) -> Iterator[ImpliedTensor]:
    """Every tensor of a research model, once; a tied one is the encoder's.

    Raises:
        CheckpointError: As `read_research`.
    """
    model = read_research(config, where)
    table = (model.encoder.vocab_size, model.encoder.hidden_size)
    yield ImpliedTensor("model.encoder.embed_tokens.weight", "embedding", table)
    if not model.form.tied:
        yield ImpliedTensor("model.decoder.embed_tokens.weight", "embedding", table)
    for part, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        for name, shape in stack_tensors(stack, NORMS):
            yield ImpliedTensor(f"model.{part}.{name}", part, shape)
    for layer in filter(model.has_cross_attention, range(model.decoder.num_hidden_layers)):
        for name, shape in attention_tensors(model.decoder, "cross_attn", CROSS_NORMS).items():
            yield ImpliedTensor(f"model.decoder.layers.{layer}.{name}", "decoder", shape)
