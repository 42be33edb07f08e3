"""Every setting of a config does what it does in transformers."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from transformers import Gemma3ForCausalLM, Gemma3ForConditionalGeneration, T5Gemma2ForConditionalGeneration
from transformers.activations import ACT2FN

from t5g2convert.checkpoint.families.text_and_vision import Activation
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.errors import CheckpointError
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.layers import ACTIVATIONS
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from tests.models.twins import SIGLIP, Twin, write_twin
from tests.reference.models import (
    EOI,
    IMAGE,
    SOFTCAPPED,
    TEXT,
    difference,
    loaded,
    padded_batch,
    pixels,
    with_images,
    write_t5gemma2,
)

Changes = Mapping[str, Any]

LIMIT = 1e-5

TOKENS = {"boi_token_index": 290, "eoi_token_index": EOI, "image_token_index": IMAGE, "mm_tokens_per_image": 4}


def only(kind: str, depth: int = 4) -> Changes:
    return {"num_hidden_layers": depth, "layer_types": [kind] * depth}


def ropes(full: float, sliding: float) -> Changes:
    sections = {"full_attention": (2e5, full), "sliding_attention": (3e3, sliding)}
    return {
        "rope_parameters": {
            kind: {"rope_type": "default" if factor == 1 else "linear", "rope_theta": theta, "factor": factor}
            for kind, (theta, factor) in sections.items()
        }
    }


TEXT_CHANGES: dict[str, Changes] = {
    "window-1": {"sliding_window": 1},
    "window-2": {"sliding_window": 2},
    "window-3": {"sliding_window": 3},
    "full-only": only("full_attention"),
    "sliding-only": only("sliding_attention"),
    "full-first": {"num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "sliding_attention"]},
    "one-layer": {"num_hidden_layers": 1},
    "as-many-key-value-heads": {"num_key_value_heads": 4},
    "one-head": {"num_attention_heads": 1},
    "scalar": {"query_pre_attn_scalar": 3},
    "attention-softcap": {"attn_logit_softcapping": 0.5},
    "final-softcap": {"final_logit_softcapping": 1.5},
    "rope-linear": ropes(8.0, 1.0),
    "bias": {"attention_bias": True},
    "gelu": {"hidden_activation": "gelu"},
    "silu": {"hidden_activation": "silu"},
    "relu": {"hidden_activation": "relu"},
    "norm-eps": {"rms_norm_eps": 0.3},
}

SMALL = {"num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 6}

PAIRS: dict[str, tuple[Changes, Changes]] = {
    **{name: (changes, changes) for name, changes in TEXT_CHANGES.items()},
    "small-encoder": ({**SMALL, "intermediate_size": 20, "sliding_window": 3}, {"intermediate_size": 52}),
    "small-decoder": ({"intermediate_size": 52}, {**SMALL, "intermediate_size": 20, "sliding_window": 2}),
    "unequal-kinds": (only("full_attention", 2), only("sliding_attention", 3)),
    "unequal-ropes": (ropes(2.0, 4.0), ropes(1.0, 8.0)),
    "unequal-attention-softcaps": ({"attn_logit_softcapping": 0.5}, {"attn_logit_softcapping": 2.0}),
    "unequal-norm-eps": ({"rms_norm_eps": 0.3}, {"rms_norm_eps": 1e-6}),
}


@pytest.mark.sampled
@pytest.mark.parametrize("name", PAIRS)
@torch.no_grad()
def test_settings_of_both_stacks_of_t5gemma_2(name: str, tmp_path: Path) -> None:
    write_t5gemma2(tmp_path, *PAIRS[name])
    theirs = loaded(T5Gemma2ForConditionalGeneration, tmp_path, SOFTCAPPED)
    model = T5Gemma2Reference(open_checkpoint(tmp_path))
    inputs, encoder_inputs = padded_batch(21, seed=3), padded_batch(14, seed=4, left=2, right=3)
    expected = theirs(
        input_ids=encoder_inputs.ids,
        attention_mask=encoder_inputs.mask,
        decoder_input_ids=inputs.ids,
        decoder_attention_mask=inputs.mask,
    )
    memory = model.encode(encoder_inputs.ids, encoder_inputs.kept)
    kept = encoder_inputs.kept
    assert difference(memory[kept], expected.encoder_last_hidden_state[kept]) <= LIMIT
    logits = model.decoder.logits(model.decode(inputs.ids, inputs.kept, memory, kept))
    assert difference(logits[inputs.kept], expected.logits[inputs.kept]) <= LIMIT


@pytest.mark.parametrize("name", TEXT_CHANGES)
@torch.no_grad()
def test_settings_of_gemma_3(name: str, tmp_path: Path) -> None:
    write_twin(Twin(name, {**TEXT, **TEXT_CHANGES[name]}, dtype=torch.float32), tmp_path)
    theirs = loaded(Gemma3ForCausalLM, tmp_path, SOFTCAPPED)
    model = Gemma3Reference(open_checkpoint(tmp_path))
    inputs = padded_batch(21, seed=5)
    expected = theirs(input_ids=inputs.ids, attention_mask=inputs.mask).logits
    found = model.logits(inputs.ids, inputs.kept)
    assert difference(found[inputs.kept], expected[inputs.kept]) <= LIMIT


IMAGE_CHANGES: dict[str, tuple[Changes, Changes, Changes]] = {
    "image-wider-than-the-window": ({"sliding_window": 2}, {}, {}),
    "image-token-behind-the-table": ({}, {}, {"image_token_index": 262_144}),
    "one-token-per-image": ({}, {}, {"mm_tokens_per_image": 1}),
    "every-patch-a-token": ({}, {"image_size": 28}, {}),
    "patches-left-over": ({}, {"image_size": 70}, {}),
    "pixels-left-over": ({}, {"image_size": 60}, {}),
    "patch-size": ({}, {"patch_size": 7}, {}),
    "one-channel": ({}, {"num_channels": 1}, {}),
    "one-vision-head": ({}, {"num_attention_heads": 1}, {}),
    "vision-norm-eps": ({}, {"layer_norm_eps": 0.3}, {}),
    "vision-gelu": ({}, {"hidden_act": "gelu"}, {}),
    "vision-relu": ({}, {"hidden_act": "relu"}, {}),
}
"""Changes to the text, to the tower, and to the tokens."""


@pytest.mark.sampled
@pytest.mark.parametrize("name", IMAGE_CHANGES)
@torch.no_grad()
def test_settings_of_gemma_3_with_images(name: str, tmp_path: Path) -> None:
    text, tower, tokens = IMAGE_CHANGES[name]
    tower, tokens = {**SIGLIP, **tower}, {**TOKENS, **tokens}
    write_twin(Twin(name, {**TEXT, **text}, tower, tokens, dtype=torch.float32), tmp_path)
    theirs = loaded(Gemma3ForConditionalGeneration, tmp_path)
    model = Gemma3Reference(open_checkpoint(tmp_path))
    assert model.vision is not None
    inputs, count = with_images(padded_batch(21, seed=6), tokens["image_token_index"], tokens["mm_tokens_per_image"])
    images = pixels(count, torch.float32, tower["image_size"], tower.get("num_channels", 3))
    features = theirs.get_image_features(images).pooler_output
    assert difference(model.vision.features(images), features) <= LIMIT
    expected = theirs(
        input_ids=inputs.ids,
        attention_mask=inputs.mask,
        pixel_values=images,
        token_type_ids=(inputs.ids == tokens["image_token_index"]).long(),
    ).logits
    found = model.logits(inputs.ids, inputs.kept, features)
    assert difference(found[inputs.kept], expected[inputs.kept]) <= LIMIT


@torch.no_grad()
def test_images_in_a_t5gemma_2_written_by_transformers(tmp_path: Path) -> None:
    write_t5gemma2(tmp_path, {"num_hidden_layers": 2}, {"num_hidden_layers": 3}, tower=SIGLIP)
    theirs = loaded(T5Gemma2ForConditionalGeneration, tmp_path)
    model = T5Gemma2Reference(open_checkpoint(tmp_path))
    assert model.vision is not None
    inputs, count = with_images(padded_batch(21, seed=7), IMAGE)
    images = pixels(count, torch.float32)
    expected = theirs.model.encoder(
        input_ids=inputs.ids, attention_mask=inputs.mask, pixel_values=images
    ).last_hidden_state
    features = theirs.get_image_features(images).pooler_output
    assert difference(model.vision.features(images), features) <= LIMIT
    found = model.encode(inputs.ids, inputs.kept, features)
    assert difference(found[inputs.kept], expected[inputs.kept]) <= LIMIT


def test_a_softcap_leaves_the_fused_kernel_to_others(tmp_path: Path) -> None:
    changes = {**only("full_attention", 1), "attn_logit_softcapping": 0.5}
    write_t5gemma2(tmp_path, changes, changes)
    inputs = padded_batch(9, seed=8)
    eager, fused = (T5Gemma2Reference(open_checkpoint(tmp_path), kernel=kernel) for kernel in ("eager", "sdpa"))
    assert torch.equal(eager.encode(inputs.ids, inputs.kept), fused.encode(inputs.ids, inputs.kept))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_is_that_of_transformers(name: Activation, dtype: torch.dtype) -> None:
    x = torch.cat((torch.randn(4096, generator=torch.Generator().manual_seed(3)) * 6, torch.linspace(-20, 20, 801)))
    x = x.to(dtype)
    assert torch.equal(ACTIVATIONS[name](x), ACT2FN[name](x))


def test_activations_in_configs_and_implemented_activations_match() -> None:
    assert set(get_args(Activation)) == set(ACTIVATIONS)


def test_an_unknown_activation_is_refused_by_name(tmp_path: Path) -> None:
    changes = {"num_hidden_layers": 1, "hidden_activation": "laplace"}
    write_t5gemma2(tmp_path, changes, changes)
    with pytest.raises(CheckpointError, match=r"hidden_activation: Input should be 'gelu', .* or 'tanh'"):
        T5Gemma2Reference(open_checkpoint(tmp_path))
