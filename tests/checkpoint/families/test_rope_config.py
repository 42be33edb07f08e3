"""RoPE: accepted spellings rotate as in transformers, and all others are refused with their field."""

from copy import deepcopy
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from transformers import Gemma3TextConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

from t5g2convert.checkpoint.families.gemma2 import read_gemma2
from t5g2convert.checkpoint.families.gemma3 import read_gemma3
from t5g2convert.errors import CheckpointError

WHERE: Final = Path("config.json")
SIZES: Final[dict[str, Any]] = {"num_hidden_layers": 7, "head_dim": 16, "hidden_size": 32, "num_attention_heads": 4}
LINEAR: Final = {"rope_type": "linear", "factor": 8.0}
SLIDING: Final = {"rope_type": "default", "rope_theta": 1e4}

ACCEPTED: Final[dict[str, dict[str, Any]]] = {
    "absent": {},
    "null": {"rope_scaling": None, "rope_parameters": None},
    "empty": {"rope_scaling": {}},
    "scaling": {"rope_scaling": LINEAR},
    "scaling, whole number": {"rope_scaling": {"rope_type": "linear", "factor": 8}, "rope_theta": 500_000},
    "scaling, default": {"rope_scaling": {"rope_type": "default"}},
    "scaling, old word for default": {"rope_scaling": {"type": "default"}},
    "scaling, both words": {"rope_scaling": {"type": "linear", **LINEAR}},
    "scaling, old word, factor 1": {"rope_scaling": {"type": "linear", "factor": 1.0}},
    "scaling, factor 1 without a type": {"rope_scaling": {"factor": 1.0}},
    "scaling, its theta is the default": {"rope_scaling": {**LINEAR, "rope_theta": 1e6}},
    "scaling, its theta is that beside it": {"rope_scaling": {**LINEAR, "rope_theta": 5e5}, "rope_theta": 5e5},
    "thetas": {"rope_theta": 5e5, "rope_local_base_freq": 2e4},
    "nested": {"rope_parameters": {"full_attention": {**LINEAR, "rope_theta": 5e5}, "sliding_attention": SLIDING}},
    "nested, old word": {
        "rope_parameters": {
            "full_attention": {"type": "linear", "factor": 8.0, "rope_theta": 1e6}, "sliding_attention": SLIDING,
        }
    },
    "nested, full alone": {"rope_parameters": {"full_attention": LINEAR}},
    "nested, sliding alone": {"rope_parameters": {"sliding_attention": {"rope_type": "default", "rope_theta": 3e4}}},
    "nested, null": {"rope_parameters": {"full_attention": LINEAR, "sliding_attention": None}},
    "nested, sliding linear by 1": {
        "rope_parameters": {
            "full_attention": LINEAR, "sliding_attention": {"rope_type": "linear", "factor": 1.0, "rope_theta": 1e4},
        }
    },
    "nested, without types": {
        "rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": {"rope_theta": 2e4}}
    },
    "nested, factor apart": {
        "rope_parameters": {"full_attention": {"rope_theta": 5e5}, "sliding_attention": SLIDING},
        "rope_scaling": LINEAR,
    },
    "nested, thetas apart": {"rope_parameters": {"full_attention": LINEAR}, "rope_theta": 5e5},
    "flat, what holds without it": {"rope_parameters": {"full_attention": LINEAR, "rope_type": "default"}},
    "original length": {"rope_scaling": {**LINEAR, "original_max_position_embeddings": 32}},
    "whole heads": {"rope_scaling": {**LINEAR, "partial_rotary_factor": 1.0}},
}  # fmt: skip


def frequencies(theta: float, factor: float) -> torch.Tensor:
    """The paper's formula, in float32 as in transformers."""
    channels = torch.arange(0, 16, 2, dtype=torch.float32)
    return 1.0 / theta ** (channels / 16) / factor


@pytest.mark.parametrize("name", ACCEPTED)
def test_accepted_spellings_rotate_as_in_transformers(name: str) -> None:
    fields = {**SIZES, **ACCEPTED[name]}
    ours = read_gemma3({"model_type": "gemma3_text", **fields}, WHERE).text
    # transformers itself fails on null instead of a section.
    given = {key: value for key, value in deepcopy(fields).items() if value is not None}
    theirs = Gemma3RotaryEmbedding(Gemma3TextConfig(**given))
    full = frequencies(ours.rope_full_theta, ours.rope_full_factor)
    torch.testing.assert_close(theirs.full_attention_inv_freq, full, rtol=1e-6, atol=0)
    sliding = frequencies(ours.rope_sliding_theta, 1.0)
    torch.testing.assert_close(theirs.sliding_attention_inv_freq, sliding, rtol=1e-6, atol=0)
    assert theirs.full_attention_attention_scaling == theirs.sliding_attention_attention_scaling == 1.0


REFUSED: Final[list[tuple[str, dict[str, Any], str]]] = [
    ("flat", {"rope_parameters": {**LINEAR, "rope_theta": 1e6}}, "rope_parameters.rope_type"),
    ("flat theta", {"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_parameters.rope_theta"),
    ("flat beside nested", {"rope_parameters": {"full_attention": LINEAR, "factor": 8.0}}, "rope_parameters.factor"),
    ("another layer type", {"rope_parameters": {"chunked_attention": LINEAR}}, "rope_parameters.chunked_attention"),
    ("layer types in scaling", {"rope_scaling": {"full_attention": LINEAR}}, "rope_scaling.full_attention"),
    ("layer types in scaling", {"rope_scaling": {"sliding_attention": {}}}, "rope_scaling.sliding_attention"),
    ("factor without a type", {"rope_scaling": {"factor": 8.0}}, "rope_scaling.factor"),
    ("factor of a default", {"rope_scaling": {"rope_type": "default", "factor": 8.0}}, "rope_scaling.factor"),
    (
        "factor without a type, nested",
        {"rope_parameters": {"full_attention": {"factor": 8.0}}},
        "rope_parameters.full_attention.factor",
    ),
    ("old word", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "rope_scaling.type"),
    ("two words", {"rope_scaling": {"type": "yarn", **LINEAR}}, "rope_scaling.type"),
    ("theta of scaling alone", {"rope_scaling": {**LINEAR, "rope_theta": 5e5}}, "rope_scaling.rope_theta"),
    (
        "theta of scaling and another",
        {"rope_scaling": {**LINEAR, "rope_theta": 5e5}, "rope_theta": 1e6},
        "rope_scaling.rope_theta",
    ),
    (
        "sliding by a factor",
        {"rope_parameters": {"sliding_attention": LINEAR}},
        "rope_parameters.sliding_attention has factor 8.0",
    ),
    (
        "sliding factor without a type",
        {"rope_parameters": {"sliding_attention": {"factor": 2.0}}},
        "rope_parameters.sliding_attention.factor",
    ),
    ("half heads", {"rope_scaling": {**LINEAR, "partial_rotary_factor": 0.5}}, "rope_scaling.partial_rotary_factor"),
    ("half heads beside", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("attention factor", {"rope_scaling": {**LINEAR, "attention_factor": 1.2}}, "rope_scaling.attention_factor"),
    ("a stranger", {"rope_scaling": {**LINEAR, "beta_fast": 32}}, "rope_scaling.beta_fast"),
    *(
        (
            f"{kind} in {place}",
            {"rope_parameters": {place: {"rope_type": kind, "factor": 4.0}}},
            f"{place} has rope_type",
        )
        for kind in ("yarn", "dynamic", "longrope", "llama3", "proportional", "axial")
        for place in ("full_attention", "sliding_attention")
    ),
]


@pytest.mark.parametrize(("name", "fields", "place"), REFUSED, ids=[name for name, _, _ in REFUSED])
@pytest.mark.parametrize("section", ["", "text_config"])
def test_settings_that_readers_interpret_differently_are_refused_with_their_field(
    name: str, fields: dict[str, Any], place: str, section: str
) -> None:
    config = {"model_type": "gemma3_text", **SIZES, **fields}
    if section:
        config = {"model_type": "gemma3", "text_config": config, "vision_config": {}}
    with pytest.raises(CheckpointError) as caught:
        read_gemma3(config, WHERE)
    assert place in caught.value.message
    assert not section or "text_config." in caught.value.message
    assert caught.value.hint is not None or "only default and linear" in caught.value.message


@pytest.mark.parametrize(
    ("fields", "place"),
    [
        ({"rope_parameters": {"full_attention": LINEAR}}, "rope_parameters.full_attention"),
        ({"rope_scaling": {"factor": 8.0}}, "rope_scaling.factor"),
        ({"rope_scaling": {**LINEAR, "rope_theta": 5e5}}, "rope_scaling.rope_theta"),
        ({"rope_parameters": {**LINEAR, "beta_slow": 1}}, "rope_parameters.beta_slow"),
    ],
)
def test_the_same_of_gemma_2(fields: dict[str, Any], place: str) -> None:
    with pytest.raises(CheckpointError, match=place):
        read_gemma2({"model_type": "gemma2", **fields}, WHERE)


def test_gemma_2_reads_the_old_word() -> None:
    read = read_gemma2({"model_type": "gemma2", "rope_scaling": {"type": "linear", "factor": 8.0}}, WHERE).text
    assert read.rope_factor == 8.0
