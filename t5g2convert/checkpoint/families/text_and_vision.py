"""What the configs of all families say of a text stack and of a vision tower, under the same names."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from t5g2convert.checkpoint.families.config_section import ConfigSection, Depth, Number, Positive, Size, Token
from t5g2convert.checkpoint.families.rope_config import LayerType, Rope
from t5g2convert.errors import CheckpointError

Activation = Literal[
    "gelu", "gelu_fast", "gelu_new", "gelu_python", "gelu_pytorch_tanh", "hardswish", "leaky_relu", "linear", "mish",
    "quick_gelu", "relu", "relu2", "relu6", "sigmoid", "silu", "swish", "tanh",
]  # fmt: skip
"""The activation functions of transformers that the reference passes compute; what they cannot judge is refused."""


class TextConfig(ConfigSection):
    """One text stack; a default stands where the classes of transformers have one and the same."""

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
    # Where a dialect lists none, its reader settles them before validation.
    layer_types: list[LayerType]

    qk_norm: ClassVar[bool] = True
    """Whether queries and keys are normed; no config says so."""

    @property
    def ropes(self) -> Mapping[LayerType, Rope]:
        """The position embedding of each kind of layer."""
        raise NotImplementedError

    @property
    def dims(self) -> Mapping[str, int]:
        """The sizes of a layer in elements, and the depth, by the names that maps use."""
        return {
            "intermediate": self.intermediate_size,
            "query": self.num_attention_heads * self.head_dim,
            "key_value": self.num_key_value_heads * self.head_dim,
            "head": self.head_dim,
            "layers": self.num_hidden_layers,
        }


class GemmaText(TextConfig):
    """A decoder-only Gemma; where a default stands, Gemma2Config and Gemma3TextConfig of transformers have the same."""

    hidden_size: Size = 2304
    intermediate_size: Size = 9216
    num_hidden_layers: Annotated[Depth, Field(gt=0)] = 26
    num_attention_heads: Size = 8
    num_key_value_heads: Size = 4
    head_dim: Size = 256
    sliding_window: Size = 4096


class SiglipConfig(ConfigSection):
    """A SigLIP tower; a default stands where the classes of transformers have one and the same."""

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
    """How images stand among the tokens; a default stands where the classes of transformers have one and the same."""

    mm_tokens_per_image: Size = 256
    boi_token_index: Token = 255_999
    eoi_token_index: Token = 256_000
    image_token_index: Token


def stack_fields(path: str) -> Mapping[str, str]:
    """Where the sizes of a stack's layers stand in config.json; `path` is its section, with a dot behind."""
    return {
        "intermediate": f"{path}intermediate_size",
        "query": f"{path}num_attention_heads * {path}head_dim",
        "key_value": f"{path}num_key_value_heads * {path}head_dim",
        "head": f"{path}head_dim",
    }


def tower_fields(path: str) -> Mapping[str, str]:
    """Where the sizes of a tower stand in config.json; `path` is its section, with a dot behind."""
    return {
        "vision_hidden": f"{path}hidden_size",
        "vision_intermediate": f"{path}intermediate_size",
        "vision_channels": f"{path}num_channels",
        "vision_patch": f"{path}patch_size",
        "vision_positions": f"({path}image_size // {path}patch_size) squared",
    }


def check_stack(stack: TextConfig, where: Path, section: str = "") -> None:
    """Refuse a stack that contradicts itself; `section` is its name in config.json.

    Raises:
        CheckpointError: It lists more or fewer layers than it has, or its heads share no whole number of queries.
    """
    dot = f"{section}." if section else ""
    if len(stack.layer_types) != stack.num_hidden_layers:
        raise CheckpointError(
            f"{dot}layer_types lists {len(stack.layer_types)} layers, num_hidden_layers is {stack.num_hidden_layers}",
            where=where,
        )
    check_multiple(stack, "num_attention_heads", "num_key_value_heads", where, dot)


def activation_note(fields: Mapping[str, Any], activation: str, dot: str = "") -> Iterator[str]:
    """A note of an older `hidden_act` that is another than the activation that is read; `dot` is the section's name."""
    other = fields.get("hidden_act")
    if other is not None and other != activation:
        yield (
            f"{dot}hidden_act is {other!r}, which these models do not read: "
            f"{dot}hidden_activation is {activation!r}, and taken"
        )


def check_images(tokens: ImageTokens, tower: SiglipConfig, where: Path) -> None:
    """Refuse images that the projector cannot make the stated tokens of, and tokens of images without an id.

    Raises:
        CheckpointError: The patches do not pool to mm_tokens_per_image, or an id is negative.
    """
    across, wanted = tower.image_size // tower.patch_size, tokens.mm_tokens_per_image
    side = math.isqrt(wanted)
    if side > across or across // (across // side) != side or side * side != wanted:
        raise CheckpointError(
            f"mm_tokens_per_image is {wanted}, which {across} x {across} patches of an image cannot be pooled to",
            where=where,
        )
    for name in ("boi_token_index", "eoi_token_index", "image_token_index"):
        if (number := getattr(tokens, name, 0)) < 0:
            raise CheckpointError(f"{name} is {number}, expected a token id", where=where)


def check_multiple(section: ConfigSection, multiple: str, divisor: str, where: Path, prefix: str = "") -> None:
    """Refuse two sizes of which the first is not a multiple of the second; `prefix` stands before the first.

    Raises:
        CheckpointError: It is none.
    """
    one, other = getattr(section, multiple), getattr(section, divisor)
    if one % other:
        raise CheckpointError(f"{prefix}{multiple} {one} is not a multiple of {divisor} {other}", where=where)
