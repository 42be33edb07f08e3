"""T5Gemma's config.json (the first generation), and the tensors that it implies.

The list of tensors is written in code, independently of any weight map, to catch a map that forgets a tensor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families.config_section import (
    ConfigSection,
    ExpectedTensor,
    describe_model_type,
    parse_section,
    subsection,
)
from t5g2convert.checkpoint.families.gemma2 import Gemma2Text, read_stack
from t5g2convert.errors import CheckpointError

MODEL_TYPE: Final = "t5gemma"


class Top(ConfigSection):
    """The fields at the top of config.json, with the default of transformers' T5GemmaConfig."""

    tie_word_embeddings: bool = True


@dataclass(frozen=True, slots=True)
class T5Gemma:
    """A T5Gemma model as its config describes it.

    Attributes:
        encoder: The settings of its encoder, as of a Gemma 2.
        decoder: The settings of its decoder, as of a Gemma 2.
        tied: Whether the softmax reads the decoder's embedding matrix; the encoder's matrix is always separate.
    """

    encoder: Gemma2Text
    decoder: Gemma2Text
    tied: bool


def read_t5gemma(config: Mapping[str, Any], where: Path) -> T5Gemma:
    """Read the config of a T5Gemma.

    Raises:
        CheckpointError: The config is another model's, or a field is missing or of the wrong type.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{describe_model_type(config)} is not T5Gemma", where=where)
    encoder, decoder = (read_stack(subsection(config, part, where), where, part) for part in ("encoder", "decoder"))
    return T5Gemma(encoder, decoder, parse_section(Top, config, where).tie_word_embeddings)


def expected_tensors(config: Mapping[str, Any], where: Path) -> Iterator[ExpectedTensor]:
    """Yield every tensor that transformers saves, without a tied softmax and rotary buffers.

    Raises:
        CheckpointError: As `read_t5gemma`.
    """
    model = read_t5gemma(config, where)
    for part, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        yield ExpectedTensor(f"model.{part}.embed_tokens.weight", "embedding", (stack.vocab_size, stack.hidden_size))
        layer = _layer_tensors(stack)
        if part == "decoder":
            layer |= _attention_tensors("cross_attn", stack, model.encoder.hidden_size)
        for number in range(stack.num_hidden_layers):
            for name, shape in layer.items():
                yield ExpectedTensor(f"model.{part}.layers.{number}.{name}.weight", part, shape)
        yield ExpectedTensor(f"model.{part}.norm.weight", part, (stack.hidden_size,))
    if not model.tied:
        shape = (model.decoder.vocab_size, model.decoder.hidden_size)
        yield ExpectedTensor("lm_head.out_proj.weight", "embedding", shape)


def _layer_tensors(stack: Gemma2Text) -> dict[str, tuple[int, ...]]:
    hidden, ffn = stack.hidden_size, stack.intermediate_size
    return {
        **_attention_tensors("self_attn", stack, hidden),
        "mlp.gate_proj": (ffn, hidden),
        "mlp.up_proj": (ffn, hidden),
        "mlp.down_proj": (hidden, ffn),
        "pre_feedforward_layernorm": (hidden,),
        "post_feedforward_layernorm": (hidden,),
    }


def _attention_tensors(name: str, stack: Gemma2Text, memory: int) -> dict[str, tuple[int, ...]]:
    """Return the tensors of an attention and its norms; `memory` is the input width of its keys and values."""
    hidden, head = stack.hidden_size, stack.head_dim
    query, key_value = stack.num_attention_heads * head, stack.num_key_value_heads * head
    return {
        f"{name}.q_proj": (query, hidden),
        f"{name}.k_proj": (key_value, memory),
        f"{name}.v_proj": (key_value, memory),
        f"{name}.o_proj": (hidden, query),
        f"pre_{name}_layernorm": (hidden,),
        f"post_{name}_layernorm": (hidden,),
    }
