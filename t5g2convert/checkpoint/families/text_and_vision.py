"""The configs of a text stack and of a vision tower, shared by all families."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from t5g2convert.checkpoint.families.config_section import (
    ConfigSection,
    Depth,
    ExpectedTensor,
    Number,
    Positive,
    Size,
    Token,
)
from t5g2convert.checkpoint.families.rope_config import LayerType, Rope
from t5g2convert.errors import CheckpointError

Activation = Literal[
    "gelu", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "hardswish", "leaky_relu", "linear", "mish",
    "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh",
]  # fmt: skip
"""The activation functions that the reference passes compute; others are refused."""


class TextConfig(ConfigSection):
    """One text stack; a field has a default if it is the same in all classes of transformers."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[Depth, Field(gt=0)]
    num_attention_heads: Size
    num_key_value_heads: Size
    head_dim: Size
    hidden_activation: Activation = "gelu_pytorch_tanh"
    max_position_embeddings: Size = 131_072
    initializer_range: Number = 0.02
    rms_norm_eps: Positive = 1e-6
    use_cache: bool = True
    bos_token_id: Token | None = 2
    eos_token_id: Token | list[Token] | None = 1
    pad_token_id: Token | None = 0
    attention_bias: bool = False
    attention_dropout: Number = 0.0
    query_pre_attn_scalar: Size = 256
    sliding_window: Size
    final_logit_softcapping: Positive | None = None
    attn_logit_softcapping: Positive | None = None
    # If a dialect does not list them, its reader fills them in before validation.
    layer_types: list[LayerType]

    qk_norm: ClassVar[bool] = True
    """Whether queries and keys are normed; configs do not state it."""

    @property
    def ropes(self) -> Mapping[LayerType, Rope]:
        """The position embedding of each kind of layer."""
        raise NotImplementedError

    @property
    def dims(self) -> Mapping[str, int]:
        """The sizes of a layer in elements, and the number of layers, by the names that maps use."""
        return {
            "intermediate": self.intermediate_size,
            "query": self.num_attention_heads * self.head_dim,
            "key_value": self.num_key_value_heads * self.head_dim,
            "head": self.head_dim,
            "layers": self.num_hidden_layers,
        }


class GemmaText(TextConfig):
    """A decoder-only Gemma, with the defaults that transformers' Gemma2Config and Gemma3TextConfig share."""

    hidden_size: Size = 2304
    intermediate_size: Size = 9216
    num_hidden_layers: Annotated[Depth, Field(gt=0)] = 26
    num_attention_heads: Size = 8
    num_key_value_heads: Size = 4
    head_dim: Size = 256
    sliding_window: Size = 4096


class SiglipConfig(ConfigSection):
    """A SigLIP tower; a field has a default if it is the same in all classes of transformers."""

    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Depth
    num_attention_heads: Size = 12
    num_channels: Size = 3
    image_size: Size
    patch_size: Size
    hidden_act: Activation = "gelu_pytorch_tanh"
    layer_norm_eps: Positive = 1e-6
    attention_dropout: Number = 0.0

    @property
    def dims(self) -> Mapping[str, int]:
        """Sizes in elements, and the depth, by the names that maps use."""
        return {
            "vision_hidden": self.hidden_size,
            "vision_intermediate": self.intermediate_size,
            "vision_channels": self.num_channels,
            "vision_patch": self.patch_size,
            "vision_positions": (self.image_size // self.patch_size) ** 2,
            "vision_layers": self.num_hidden_layers,
        }


class ImageTokens(ConfigSection):
    """The tokens of images; a field has a default if it is the same in all classes of transformers."""

    mm_tokens_per_image: Size = 256
    boi_token_index: Token = 255_999
    eoi_token_index: Token = 256_000
    image_token_index: Token


def stack_fields(path: str) -> Mapping[str, str]:
    """Return the fields of config.json with the sizes of a stack; `path` is its section with a final dot."""
    return {
        "intermediate": f"{path}intermediate_size",
        "query": f"{path}num_attention_heads * {path}head_dim",
        "key_value": f"{path}num_key_value_heads * {path}head_dim",
        "head": f"{path}head_dim",
    }


def tower_fields(path: str) -> Mapping[str, str]:
    """Return the fields of config.json with the sizes of a tower; `path` is its section with a final dot."""
    return {
        "vision_hidden": f"{path}hidden_size",
        "vision_intermediate": f"{path}intermediate_size",
        "vision_channels": f"{path}num_channels",
        "vision_patch": f"{path}patch_size",
        "vision_positions": f"({path}image_size // {path}patch_size) squared",
    }


def check_stack(stack: TextConfig, where: Path, section: str = "") -> None:
    """Refuse a stack that contradicts itself; `section` is its name in config.json, for errors.

    Raises:
        CheckpointError: The number of layers or of heads contradicts other fields.
    """
    dot = f"{section}." if section else ""
    if len(stack.layer_types) != stack.num_hidden_layers:
        raise CheckpointError(
            f"{dot}layer_types lists {len(stack.layer_types)} layers, num_hidden_layers is {stack.num_hidden_layers}",
            where=where,
        )
    check_multiple(stack, "num_attention_heads", "num_key_value_heads", where, dot)


def activation_note(fields: Mapping[str, Any], activation: str, dot: str = "") -> Iterator[str]:
    """Yield a note if `hidden_act`, which is not used, differs from the activation; `dot` is the section's prefix."""
    other = fields.get("hidden_act")
    if other is not None and other != activation:
        yield (
            f"{dot}hidden_act is {other!r}, which these models ignore: {dot}hidden_activation {activation!r} is used"
        )


def check_images(tokens: ImageTokens, tower: SiglipConfig, where: Path) -> None:
    """Refuse images that cannot be pooled to mm_tokens_per_image tokens, and image tokens without an id.

    Raises:
        CheckpointError: The patches cannot be pooled to that number, or an id is negative.
    """
    across, wanted = tower.image_size // tower.patch_size, tokens.mm_tokens_per_image
    side = math.isqrt(wanted)
    if side > across or across // (across // side) != side or side * side != wanted:
        raise CheckpointError(
            f"mm_tokens_per_image is {wanted}, which {across} x {across} image patches cannot be pooled to",
            where=where,
        )
    for name in ("boi_token_index", "eoi_token_index", "image_token_index"):
        if (number := getattr(tokens, name, 0)) < 0:
            raise CheckpointError(f"{name} is {number}, expected a token id", where=where)


def check_multiple(section: ConfigSection, multiple: str, divisor: str, where: Path, prefix: str = "") -> None:
    """Refuse a size that is not a multiple of another; `prefix` is written before the first.

    Raises:
        CheckpointError: The size is not a multiple.
    """
    one, other = getattr(section, multiple), getattr(section, divisor)
    if one % other:
        raise CheckpointError(f"{prefix}{multiple} {one} is not a multiple of {divisor} {other}", where=where)


def stack_tensors(stack: TextConfig, norms: tuple[str, str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of a stack, named without its root; `norms` names the norms before and after attention."""
    hidden, ffn = stack.hidden_size, stack.intermediate_size
    layer_tensors = {
        **attention_tensors(stack, "self_attn", norms),
        "mlp.gate_proj.weight": (ffn, hidden),
        "mlp.up_proj.weight": (ffn, hidden),
        "mlp.down_proj.weight": (hidden, ffn),
        "pre_feedforward_layernorm.weight": (hidden,),
        "post_feedforward_layernorm.weight": (hidden,),
    }
    for layer in range(stack.num_hidden_layers):
        for name, shape in layer_tensors.items():
            yield f"layers.{layer}.{name}", shape
    yield "norm.weight", (hidden,)


def attention_tensors(stack: TextConfig, name: str, norms: tuple[str, str]) -> dict[str, tuple[int, ...]]:
    """Return the tensors of an attention called `name`, and of the norms before and after it."""
    hidden, head = stack.hidden_size, stack.head_dim
    query, key_value = stack.num_attention_heads * head, stack.num_key_value_heads * head
    biases = {"q": query, "k": key_value, "v": key_value, "o": hidden} if stack.attention_bias else {}
    return {
        **{f"{name}.{projection}_proj.bias": (size,) for projection, size in biases.items()},
        f"{name}.q_proj.weight": (query, hidden),
        f"{name}.k_proj.weight": (key_value, hidden),
        f"{name}.v_proj.weight": (key_value, hidden),
        f"{name}.o_proj.weight": (hidden, query),
        f"{name}.q_norm.weight": (head,),
        f"{name}.k_norm.weight": (head,),
        **{f"{norm}.weight": (hidden,) for norm in norms},
    }


def vision_tensors(tower: SiglipConfig, hidden: int, root: str) -> Iterator[ExpectedTensor]:
    """Yield the tensors of the tower and the projector."""
    for name, shape in _tower_tensors(tower):
        yield ExpectedTensor(f"{root}vision_tower.vision_model.{name}", "vision", shape)
    projector = f"{root}multi_modal_projector."
    yield ExpectedTensor(projector + "mm_input_projection_weight", "projector", (tower.hidden_size, hidden))
    yield ExpectedTensor(projector + "mm_soft_emb_norm.weight", "projector", (tower.hidden_size,))


def _tower_tensors(tower: SiglipConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
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
