"""T5Gemma 2's config.json, and the tensors that it implies in the published layout.

The list of tensors stands here in code, apart from any weight map, so that a map that forgets one is found out.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import Field

from t5g2convert.checkpoint.config import (
    ConfigSection,
    Depth,
    ImpliedTensor,
    Positive,
    Size,
    Token,
    describe_model_type,
    parse_section,
    subsection,
)
from t5g2convert.checkpoint.gemma3 import LayerType
from t5g2convert.errors import CheckpointError

MODEL_TYPE: Final = "t5gemma2"


class Rope(ConfigSection):
    """The rotary position embedding of one kind of layer; a linear factor divides the frequencies."""

    rope_type: Literal["default", "linear"] = "default"
    rope_theta: Positive
    factor: Positive = 1.0

    @property
    def linear_factor(self) -> float:
        """The factor that counts: a default embedding has none, whatever stands there."""
        return self.factor if self.rope_type == "linear" else 1.0


class Stack(ConfigSection):
    """One text stack, encoder or decoder; where a default stands, it is that of transformers' T5Gemma2TextConfig."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[Depth, Field(gt=0)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    hidden_activation: str = "gelu_pytorch_tanh"
    rms_norm_eps: Positive = 1e-6
    attention_bias: bool = False
    query_pre_attn_scalar: Size | Positive = 256
    sliding_window: Size
    layer_types: list[LayerType]
    rope_parameters: dict[LayerType, Rope]
    attn_logit_softcapping: Positive | None = None
    final_logit_softcapping: Positive | None = None
    bos_token_id: Token | None = 2
    eos_token_id: Token | list[Token] | None = 1


class Tower(ConfigSection):
    """The vision tower; 0 layers for the stub of a text-only model."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Depth
    num_attention_heads: Size = 12
    num_channels: Size = 3
    image_size: Size
    patch_size: Size
    hidden_act: str = "gelu_pytorch_tanh"
    layer_norm_eps: Positive = 1e-6


class Tokens(ConfigSection):
    """How images stand among the tokens; the defaults are those of transformers' T5Gemma2Config."""

    mm_tokens_per_image: Size = 256
    boi_token_index: Token = 255_999
    eoi_token_index: Token = 256_000
    image_token_index: Token = 256_001


@dataclass(frozen=True, slots=True)
class T5Gemma2:
    """A T5Gemma 2 model as its config describes it."""

    encoder: Stack
    decoder: Stack
    vision: Tower
    tokens: Tokens


def read_t5gemma2(config: Mapping[str, Any], where: Path) -> T5Gemma2:
    """Read what decides which tensors a T5Gemma 2 folder holds and what they compute.

    Raises:
        CheckpointError: Another model, or a field that is missing or of the wrong type.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{describe_model_type(config)} is not T5Gemma 2", where=where)
    encoder = subsection(config, "encoder", where)
    return T5Gemma2(
        _stack(subsection(encoder, "text_config", where), where, "encoder.text_config"),
        _stack(subsection(config, "decoder", where), where, "decoder"),
        parse_section(Tower, subsection(encoder, "vision_config", where), where, "encoder.vision_config"),
        # Both places name them; transformers takes the image token from the top, the others from the encoder.
        parse_section(Tokens, {**encoder, **_top_image_token(config)}, where, "encoder"),
    )


def _top_image_token(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"image_token_index": config.get("image_token_index", 256_001)}


def _stack(fields: Mapping[str, Any], where: Path, section: str) -> Stack:
    stack = parse_section(Stack, fields, where, section)
    if len(stack.layer_types) != stack.num_hidden_layers:
        raise CheckpointError(
            f"{section}.layer_types lists {len(stack.layer_types)} layers, num_hidden_layers is "
            f"{stack.num_hidden_layers}",
            where=where,
        )
    if stack.num_attention_heads % stack.num_key_value_heads:
        raise CheckpointError(
            f"{section}.num_attention_heads {stack.num_attention_heads} is no multiple of "
            f"num_key_value_heads {stack.num_key_value_heads}",
            where=where,
        )
    if unsettled := set(stack.layer_types) - stack.rope_parameters.keys():
        raise CheckpointError(f"{section}.rope_parameters lacks {', '.join(sorted(unsettled))}", where=where)
    return stack


def implied_tensors(config: Mapping[str, Any], where: Path) -> Iterator[ImpliedTensor]:
    """Every tensor of the published layout, once; no tied copy, no rotary buffer.

    Raises:
        CheckpointError: As `read_t5gemma2`.
    """
    model = read_t5gemma2(config, where)
    vocab, hidden = model.encoder.vocab_size, model.encoder.hidden_size
    yield ImpliedTensor("model.encoder.embed_tokens.weight", "embedding", (vocab, hidden))
    yield ImpliedTensor("model.encoder.embed_tokens.eoi_embedding", "embedding", (hidden,))
    for part, stack in (("encoder", model.encoder), ("decoder", model.decoder)):
        for name, shape in _stack_tensors(stack):
            yield ImpliedTensor(f"model.{part}.{name}", part, shape)
    for name, shape in _tower_tensors(model.vision):
        yield ImpliedTensor(f"model.encoder.vision_tower.vision_model.{name}", "vision", shape)
    projector = "model.encoder.multi_modal_projector."
    yield ImpliedTensor(projector + "mm_input_projection_weight", "projector", (model.vision.hidden_size, hidden))
    yield ImpliedTensor(projector + "mm_soft_emb_norm.weight", "projector", (model.vision.hidden_size,))


def _stack_tensors(stack: Stack) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn, head = stack.hidden_size, stack.intermediate_size, stack.head_dim
    query, key_value = stack.num_attention_heads * head, stack.num_key_value_heads * head
    layer_tensors = {
        "self_attn.q_proj.weight": (query, hidden),
        "self_attn.k_proj.weight": (key_value, hidden),
        "self_attn.v_proj.weight": (key_value, hidden),
        "self_attn.o_proj.weight": (hidden, query),
        "self_attn.q_norm.weight": (head,),
        "self_attn.k_norm.weight": (head,),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "pre_self_attn_layernorm.weight": (hidden,),
        "post_self_attn_layernorm.weight": (hidden,),
        "pre_feedforward_layernorm.weight": (hidden,),
        "post_feedforward_layernorm.weight": (hidden,),
    }
    for layer in range(stack.num_hidden_layers):
        for name, shape in layer_tensors.items():
            yield f"layers.{layer}.{name}", shape
    yield "norm.weight", (hidden,)


def _tower_tensors(tower: Tower) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn, patch = tower.hidden_size, tower.intermediate_size, tower.patch_size
    yield "embeddings.patch_embedding.weight", (hidden, tower.num_channels, patch, patch)
    yield "embeddings.patch_embedding.bias", (hidden,)
    yield "embeddings.position_embedding.weight", ((tower.image_size // patch) ** 2, hidden)
    projections = {f"self_attn.{name}_proj": (hidden, hidden) for name in ("q", "k", "v", "out")}
    projections |= {"mlp.fc1": (ffn, hidden), "mlp.fc2": (hidden, ffn)}
    for layer in range(tower.num_hidden_layers):
        for name, shape in projections.items():
            yield f"encoder.layers.{layer}.{name}.weight", shape
            yield f"encoder.layers.{layer}.{name}.bias", shape[:1]
        for norm in ("layer_norm1", "layer_norm2"):
            yield f"encoder.layers.{layer}.{norm}.weight", (hidden,)
            yield f"encoder.layers.{layer}.{norm}.bias", (hidden,)
    yield "post_layernorm.weight", (hidden,)
    yield "post_layernorm.bias", (hidden,)
