"""The tensors that a config implies, by family.

The lists are code, independent of any weight map, so that a map that forgets a tensor is caught.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from t5g2convert.checkpoint.families.config_section import ImpliedTensor
from t5g2convert.checkpoint.families.gemma3 import Gemma3Text, read_gemma3
from t5g2convert.checkpoint.families.t5gemma2 import (
    T5Gemma2Encoder,
    T5Gemma2Text,
    read_t5gemma2,
    read_t5gemma2_encoder,
)
from t5g2convert.checkpoint.families.text_and_vision import SiglipConfig


def t5gemma2_tensors(config: Mapping[str, Any], where: Path) -> Iterator[ImpliedTensor]:
    """Yield every tensor of the published layout, without tied copies and rotary buffers.

    Raises:
        CheckpointError: As `read_t5gemma2`.
    """
    model = read_t5gemma2(config, where)
    yield from _encoder_tensors(model, "model.encoder.")
    for name, shape in stack_tensors(model.decoder, ("pre_self_attn_layernorm", "post_self_attn_layernorm")):
        yield ImpliedTensor(f"model.decoder.{name}", "decoder", shape)


def t5gemma2_encoder_tensors(config: Mapping[str, Any], where: Path) -> Iterator[ImpliedTensor]:
    """Yield every tensor of T5Gemma 2's encoder alone, under names that all versions of transformers accept.

    Raises:
        CheckpointError: As `read_t5gemma2_encoder`.
    """
    yield from _encoder_tensors(read_t5gemma2_encoder(config, where), "")


def gemma3_tensors(config: Mapping[str, Any], where: Path) -> Iterator[ImpliedTensor]:
    """Yield every tensor of Gemma 3 as repositories on the Hub name them, without tied copies and pooling heads.

    Raises:
        CheckpointError: As `read_gemma3`.
    """
    model = read_gemma3(config, where)
    root = "model." if model.vision is None else "language_model.model."
    text = model.text
    yield ImpliedTensor(f"{root}embed_tokens.weight", "embedding", (text.vocab_size, text.hidden_size))
    for name, shape in stack_tensors(text, ("input_layernorm", "post_attention_layernorm")):
        yield ImpliedTensor(root + name, "decoder", shape)
    if model.vision is not None:
        yield from _vision_tensors(model.vision, text.hidden_size, "")


def _encoder_tensors(model: T5Gemma2Encoder, root: str) -> Iterator[ImpliedTensor]:
    vocab, hidden = model.encoder.vocab_size, model.encoder.hidden_size
    yield ImpliedTensor(f"{root}embed_tokens.weight", "embedding", (vocab, hidden))
    yield ImpliedTensor(f"{root}embed_tokens.eoi_embedding", "embedding", (hidden,))
    for name, shape in stack_tensors(model.encoder, ("pre_self_attn_layernorm", "post_self_attn_layernorm")):
        yield ImpliedTensor(root + name, "encoder", shape)
    yield from _vision_tensors(model.vision, hidden, root)


def _vision_tensors(tower: SiglipConfig, hidden: int, root: str) -> Iterator[ImpliedTensor]:
    """Yield the tensors of the tower and the projector."""
    for name, shape in _tower_tensors(tower):
        yield ImpliedTensor(f"{root}vision_tower.vision_model.{name}", "vision", shape)
    projector = f"{root}multi_modal_projector."
    yield ImpliedTensor(projector + "mm_input_projection_weight", "projector", (tower.hidden_size, hidden))
    yield ImpliedTensor(projector + "mm_soft_emb_norm.weight", "projector", (tower.hidden_size,))


def stack_tensors(stack: T5Gemma2Text | Gemma3Text, norms: tuple[str, str]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield the tensors of a stack without its root; `norms` are those before and after attention."""
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


def attention_tensors(
    stack: T5Gemma2Text | Gemma3Text, name: str, norms: tuple[str, str]
) -> dict[str, tuple[int, ...]]:
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
