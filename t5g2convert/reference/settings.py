"""What the passes read of a config: one set of values for all model families."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final, Literal

from t5g2convert.checkpoint.families.config_section import MAX_INTEGER
from t5g2convert.checkpoint.families.gemma2 import Gemma2, Gemma2Text
from t5g2convert.checkpoint.families.gemma3 import Gemma3, Gemma3Text
from t5g2convert.checkpoint.families.t5gemma import T5Gemma
from t5g2convert.checkpoint.families.t5gemma2 import Stack, T5Gemma2Encoder
from t5g2convert.checkpoint.families.text_stack import Activation, LayerType, SiglipTower

Kernel = Literal["eager", "sdpa"]
"""`eager`: the order of operations of transformers' eager attention. `sdpa`: torch's fused attention, faster."""

NO_TOKEN: Final = MAX_INTEGER + 1
"""An id that no token has: behind every table."""


@dataclass(frozen=True, slots=True)
class RopeSettings:
    """Rotary position embedding: the base of the wavelengths, and the factor that positions are divided by."""

    theta: float
    factor: float


@dataclass(frozen=True, slots=True)
class TextSettings:
    """A text stack; sizes in elements, field names as in config.json.

    Two settings no config names: `qk_norm`, whether queries and keys are normed, and `memory_size`, the width of the
    encoder's output where a decoder has an attention of its own for it.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    hidden_activation: Activation
    rms_norm_eps: float
    attention_bias: bool
    query_pre_attn_scalar: float
    sliding_window: int
    layer_types: tuple[LayerType, ...]
    ropes: Mapping[LayerType, RopeSettings]
    attn_logit_softcapping: float | None
    final_logit_softcapping: float | None
    eoi_token_index: int = NO_TOKEN
    qk_norm: bool = True
    memory_size: int = 0


@dataclass(frozen=True, slots=True)
class VisionSettings:
    """SigLIP and the projector; sizes in elements, image and patch in pixels."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_channels: int
    image_size: int
    patch_size: int
    hidden_act: Activation
    layer_norm_eps: float
    mm_tokens_per_image: int
    image_token_index: int


def gemma3_text(model: Gemma3) -> TextSettings:
    """The text model of a Gemma 3."""
    text = model.text
    ropes: dict[LayerType, RopeSettings] = {
        "full_attention": RopeSettings(text.rope_full_theta, text.rope_full_factor),
        "sliding_attention": RopeSettings(text.rope_sliding_theta, 1.0),
    }
    return _text(text, ropes, eoi_token_index=model.tokens.eoi_token_index)


def t5gemma2_text(model: T5Gemma2Encoder, stack: Stack) -> TextSettings:
    """The encoder's or the decoder's stack of a T5Gemma 2."""
    ropes = {kind: RopeSettings(rope.rope_theta, rope.linear_factor) for kind, rope in stack.rope_parameters.items()}
    return _text(stack, ropes, eoi_token_index=model.tokens.eoi_token_index)


def gemma2_text(model: Gemma2) -> TextSettings:
    """The layers of a Gemma 2."""
    return _first_generation(model.text)


def t5gemma_text(model: T5Gemma, stack: Gemma2Text) -> TextSettings:
    """The encoder's or the decoder's stack of a T5Gemma."""
    return _first_generation(stack, memory_size=model.encoder.hidden_size)


def _first_generation(stack: Gemma2Text, *, memory_size: int = 0) -> TextSettings:
    rope = RopeSettings(stack.rope_theta, stack.rope_factor)
    ropes: dict[LayerType, RopeSettings] = {"full_attention": rope, "sliding_attention": rope}
    return _text(stack, ropes, qk_norm=False, memory_size=memory_size)


def gemma3_vision(model: Gemma3) -> VisionSettings | None:
    """The vision tower of a Gemma 3, if it has one."""
    tokens = model.tokens
    return None if model.vision is None else _vision(model.vision, tokens.mm_tokens_per_image, tokens.image_token_index)


def t5gemma2_vision(model: T5Gemma2Encoder) -> VisionSettings | None:
    """The vision tower of a T5Gemma 2; None for the stub of a text-only one."""
    tokens = model.tokens
    if model.vision.num_hidden_layers == 0:
        return None
    return _vision(model.vision, tokens.mm_tokens_per_image, tokens.image_token_index)


def _text(
    source: Stack | Gemma3Text | Gemma2Text,
    ropes: Mapping[LayerType, RopeSettings],
    *,
    eoi_token_index: int = NO_TOKEN,
    qk_norm: bool = True,
    memory_size: int = 0,
) -> TextSettings:
    return TextSettings(
        vocab_size=source.vocab_size,
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_attention_heads=source.num_attention_heads,
        num_key_value_heads=source.num_key_value_heads,
        head_dim=source.head_dim,
        hidden_activation=source.hidden_activation,
        rms_norm_eps=source.rms_norm_eps,
        attention_bias=source.attention_bias,
        query_pre_attn_scalar=source.query_pre_attn_scalar,
        sliding_window=source.sliding_window,
        layer_types=tuple(source.layer_types),
        ropes=ropes,
        attn_logit_softcapping=source.attn_logit_softcapping,
        final_logit_softcapping=source.final_logit_softcapping,
        eoi_token_index=eoi_token_index,
        qk_norm=qk_norm,
        memory_size=memory_size,
    )


def _vision(source: SiglipTower, mm_tokens_per_image: int, image_token_index: int) -> VisionSettings:
    return VisionSettings(
        hidden_size=source.hidden_size,
        intermediate_size=source.intermediate_size,
        num_hidden_layers=source.num_hidden_layers,
        num_attention_heads=source.num_attention_heads,
        num_channels=source.num_channels,
        image_size=source.image_size,
        patch_size=source.patch_size,
        hidden_act=source.hidden_act,
        layer_norm_eps=source.layer_norm_eps,
        mm_tokens_per_image=mm_tokens_per_image,
        image_token_index=image_token_index,
    )
