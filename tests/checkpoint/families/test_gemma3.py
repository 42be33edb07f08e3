from collections.abc import Callable, Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma3Config, Gemma3TextConfig

from t5g2convert.checkpoint.families.config_section import KNOWN_MODELS
from t5g2convert.checkpoint.families.gemma3 import (
    Gemma3,
    Gemma3Text,
    Gemma3Tokens,
    Gemma3Vision,
    has_tower,
    is_towerless,
    read_gemma3,
)
from t5g2convert.errors import CheckpointError

Config = dict[str, Any]

WHERE = Path("somewhere/config.json")

SIZES: Config = {
    "vocab_size": 262144,
    "hidden_size": 640,
    "intermediate_size": 2048,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "sliding_window": 512,
    "max_position_embeddings": 32768,
}
LAYERS = ["sliding_attention"] * 5 + ["full_attention"] + ["sliding_attention"] * 2
THETAS: Config = {"rope_theta": 1_000_000.0, "rope_local_base_freq": 10_000.0}
NESTED: Config = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1_000_000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0},
    }
}
SCALED: Config = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}

DIALECTS: dict[str, Config] = {
    "4.50": {**THETAS, **SCALED, "sliding_window_pattern": 6, "torch_dtype": "bfloat16"},
    "4.50-defaults-left-out": {**SCALED},
    "4.50-both-words-for-the-type": {
        **THETAS,
        "rope_scaling": {"type": "linear", "rope_type": "linear", "factor": 8.0},
    },
    "4.50-whole-numbers": {
        "rope_theta": 1_000_000,
        "rope_local_base_freq": 10_000,
        "rope_scaling": {"rope_type": "linear", "factor": 8},
    },
    "4.57": {**THETAS, **SCALED, "layer_types": LAYERS, "_sliding_window_pattern": 6, "dtype": "bfloat16"},
    "4.57-pattern-alone": {**THETAS, **SCALED, "_sliding_window_pattern": 6},
    "5": {**NESTED, "layer_types": LAYERS, "dtype": "bfloat16"},
    "5-with-pattern": {**NESTED, "layer_types": LAYERS, "_sliding_window_pattern": 6},
    "both": {**NESTED, **THETAS, **SCALED, "layer_types": LAYERS, "sliding_window_pattern": 6},
    "both-with-nulls": {**NESTED, "rope_theta": None, "rope_scaling": None, "rope_local_base_freq": None},
    "5-factor-apart": {
        **SCALED,
        "rope_parameters": {
            "full_attention": {"rope_theta": 1_000_000.0},
            "sliding_attention": {"rope_theta": 10_000.0},
        },
    },
}


def text_only(**fields: Any) -> Config:
    return {"model_type": "gemma3_text", **fields}


def multimodal(*, vision: Config | None = None, top: Config | None = None, **fields: Any) -> Config:
    return {
        "model_type": "gemma3",
        "text_config": {"model_type": "gemma3_text", **fields},
        "vision_config": {"model_type": "siglip_vision_model", **(vision or {})},
        **(top or {}),
    }


def read(config: Config) -> Gemma3:
    return read_gemma3(config, WHERE)


def refusal(config: Config) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read(config)
    assert caught.value.where == str(WHERE)
    return caught.value


@pytest.mark.parametrize("make", [text_only, multimodal])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_says_the_same(dialect: str, make: Callable[..., Config]) -> None:
    text = read(make(**SIZES, **DIALECTS[dialect])).text
    expected = Gemma3Text(
        **SIZES, layer_types=LAYERS, rope_full_theta=1e6, rope_full_factor=8.0, rope_sliding_theta=1e4
    )
    assert text == expected


@pytest.mark.parametrize(
    "rope",
    [
        {},
        THETAS,
        {"rope_scaling": None},
        {"rope_scaling": {"rope_type": "default"}},
        {"rope_parameters": None},
        {"rope_parameters": {}},
        {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e6}}},
        {"rope_parameters": {"full_attention": None, "sliding_attention": {"rope_type": "default"}}},
    ],
    ids=str,
)
def test_rope_without_scaling_has_factor_one(rope: Config) -> None:
    text = read(text_only(**SIZES, **rope)).text
    assert (text.rope_full_theta, text.rope_full_factor, text.rope_sliding_theta) == (1e6, 1.0, 1e4)


def test_reading_leaves_the_config_as_it_is() -> None:
    config = multimodal(**SIZES, **DIALECTS["both"])
    before = deepcopy(config)
    read(config)
    assert config == before


def test_a_sparse_text_config_gets_the_published_defaults() -> None:
    text = read(multimodal(hidden_size=2560, intermediate_size=10240, num_hidden_layers=34)).text
    assert text.vocab_size == 262208
    assert (text.num_attention_heads, text.num_key_value_heads, text.head_dim) == (8, 4, 256)
    assert text.max_position_embeddings == 131072
    assert (text.rope_full_theta, text.rope_sliding_theta, text.rope_full_factor) == (1e6, 1e4, 1.0)
    assert text.query_pre_attn_scalar == 256
    assert text.rms_norm_eps == 1e-6
    assert text.sliding_window == 4096
    assert text.hidden_activation == "gelu_pytorch_tanh"
    assert text.layer_types == ["full_attention" if (at + 1) % 6 == 0 else "sliding_attention" for at in range(34)]
    assert (text.final_logit_softcapping, text.attn_logit_softcapping) == (None, None)


PUBLISHED_4B: Config = {
    "hidden_size": 2560,
    "intermediate_size": 10240,
    "num_hidden_layers": 34,
    "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    "sliding_window": 1024,
}
UNLIKE_DEFAULTS: Config = {
    "vocab_size": 300,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 7,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "max_position_embeddings": 99,
    "initializer_range": 0.5,
    "rms_norm_eps": 1e-3,
    "use_cache": False,
    "bos_token_id": 7,
    "eos_token_id": [8, 9],
    "pad_token_id": 5,
    "attention_bias": True,
    "attention_dropout": 0.25,
    "query_pre_attn_scalar": 12,
    "sliding_window": 17,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "hidden_activation": "gelu",
}


def rope_of(theirs: Any) -> tuple[float, float, float]:
    full, sliding = theirs.rope_parameters["full_attention"], theirs.rope_parameters["sliding_attention"]
    assert sliding["rope_type"] == "default"
    return full["rope_theta"], full["factor"] if full["rope_type"] == "linear" else 1.0, sliding["rope_theta"]


def assert_same_text(ours: Gemma3Text, theirs: Any) -> None:
    named = [name for name in Gemma3Text.model_fields if not name.startswith("rope_")]
    assert {name: getattr(ours, name) for name in named} == {name: getattr(theirs, name) for name in named}
    assert (ours.rope_full_theta, ours.rope_full_factor, ours.rope_sliding_theta) == rope_of(theirs)


TEXTS: dict[str, Config] = {
    "sparse": {},
    "published-4b": PUBLISHED_4B,
    "unlike-defaults": UNLIKE_DEFAULTS,
    "pattern-4": {"num_hidden_layers": 9, "sliding_window_pattern": 4},
    "pattern-1": {"num_hidden_layers": 3, "sliding_window_pattern": 1},
    "other-thetas": {"rope_theta": 5e5, "rope_local_base_freq": 2e4},
    "other-thetas-nested": {
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5e5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
        }
    },
    **{f"dialect-{name}": {**SIZES, **fields} for name, fields in DIALECTS.items()},
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_config_has_the_values_that_transformers_reads(name: str) -> None:
    fields = TEXTS[name]
    assert_same_text(read(text_only(**fields)).text, Gemma3TextConfig(**deepcopy(fields)))


@pytest.mark.parametrize("name", TEXTS)
def test_a_config_that_transformers_writes_is_read_as_it_was_meant(name: str) -> None:
    theirs = Gemma3TextConfig(**deepcopy(TEXTS[name]))
    assert_same_text(read(theirs.to_dict()).text, theirs)


VISIONS: dict[str, Config] = {
    "sparse": {},
    "published": {
        "hidden_size": 1152,
        "image_size": 896,
        "intermediate_size": 4304,
        "num_attention_heads": 16,
        "num_hidden_layers": 27,
        "patch_size": 14,
        "vision_use_head": False,
    },
    "unlike-defaults": {
        "hidden_size": 20,
        "intermediate_size": 28,
        "num_hidden_layers": 3,
        "num_attention_heads": 5,
        "num_channels": 1,
        "image_size": 56,
        "patch_size": 7,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-3,
        "attention_dropout": 0.5,
    },
}
TOPS: dict[str, Config] = {
    "sparse": {},
    "unlike-defaults": {
        "mm_tokens_per_image": 4,
        "boi_token_index": 253,
        "eoi_token_index": 254,
        "image_token_index": 255,
    },
}


@pytest.mark.parametrize("top", TOPS)
@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("text", ["sparse", "published-4b", "unlike-defaults"])
def test_a_multimodal_config_has_the_values_that_transformers_reads(text: str, vision: str, top: str) -> None:
    config = multimodal(vision=VISIONS[vision], top=TOPS[top], **TEXTS[text])
    theirs = Gemma3Config(**deepcopy({key: value for key, value in config.items() if key != "model_type"}))
    for ours in (read(config), read(theirs.to_dict())):
        assert ours.vision is not None
        assert_same_text(ours.text, theirs.text_config)
        tower = theirs.vision_config
        assert ours.vision.model_dump() == {name: getattr(tower, name) for name in Gemma3Vision.model_fields}
        assert ours.tokens.model_dump() == {name: getattr(theirs, name) for name in Gemma3Tokens.model_fields}


def test_special_tokens_at_the_top_win_over_the_defaults() -> None:
    text = read(multimodal(top={"eos_token_id": [1, 106], "bos_token_id": 3, "pad_token_id": 4})).text
    assert (text.eos_token_id, text.bos_token_id, text.pad_token_id) == ([1, 106], 3, 4)


def test_terms_follow_from_the_fields() -> None:
    model = read(multimodal(vision=VISIONS["published"], **SIZES))
    assert model.family == "gemma3"
    assert model.features == {"vision", "projector_copy"}
    assert model.dims == {
        "rows": 262144,
        "hidden": 640,
        "intermediate": 2048,
        "query": 1024,
        "key_value": 256,
        "head": 256,
        "layers": 8,
        "projected": 640,
        "eoi_token": 256000,
        "vision_hidden": 1152,
        "vision_intermediate": 4304,
        "vision_channels": 3,
        "vision_patch": 14,
        "vision_positions": 4096,
        "vision_layers": 27,
    }
    assert model.values["vision_hidden_size"] == 1152
    assert model.values["hidden_size"] == 640
    assert model.values["image_token_index"] == 262144


def test_a_text_model_has_no_tower() -> None:
    model = read(text_only(**SIZES))
    assert (model.family, model.vision, model.features) == ("gemma3_text", None, {"text_only"})


@pytest.mark.parametrize("make", [text_only, multimodal])
@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({"rope_theta": 5e5}, ["rope_theta", "500000.0", "1000000.0"]),
        ({"rope_local_base_freq": 2e4}, ["rope_local_base_freq", "20000.0", "10000.0"]),
        ({"rope_scaling": {"rope_type": "linear", "factor": 4.0}}, ["rope_scaling.factor", "4.0", "8.0"]),
        ({"rope_scaling": {"rope_type": "default"}}, ["rope_scaling.factor", "1.0", "8.0"]),
    ],
    ids=["theta", "sliding-theta", "factor", "no-scaling"],
)
def test_dialects_that_contradict_each_other_are_refused(
    make: Callable[..., Config], fields: Config, names: list[str]
) -> None:
    error = refusal(make(**SIZES, **NESTED, **fields))
    assert all(name in error.message for name in names)
    assert "remove the incorrect one" in (error.hint or "")


@pytest.mark.parametrize("make", [text_only, multimodal])
def test_embedding_gemma_is_refused_by_its_name(make: Callable[..., Config]) -> None:
    error = refusal(make(**SIZES, use_bidirectional_attention=True))
    assert "use_bidirectional_attention" in error.message
    assert "EmbeddingGemma" in error.message
    assert read(make(**SIZES, use_bidirectional_attention=False)).text.hidden_size == 640


@pytest.mark.parametrize("model_type", KNOWN_MODELS)
def test_I10_another_model_is_refused_by_name(model_type: str) -> None:
    error = refusal({"model_type": model_type, **SIZES})
    assert repr(model_type) in error.message
    assert KNOWN_MODELS[model_type] in error.message


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"model_type": "llama"}, "model_type 'llama' is not Gemma 3"),
        ({}, "a config without model_type is not Gemma 3"),
        ({"model_type": ["gemma3"]}, "a config without model_type is not Gemma 3"),
        ({"model_type": "gemma3", "vision_config": {}}, "text_config is missing"),
        ({"model_type": "gemma3", "text_config": {}}, "vision_config is missing"),
        ({"model_type": "gemma3", "text_config": [], "vision_config": {}}, "text_config is not an object"),
        ({"model_type": "gemma3", "text_config": {}, "vision_config": "x"}, "vision_config is not an object"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_I10_a_config_that_is_not_gemma3_is_refused(config: Config, reason: str) -> None:
    assert refusal(config).message == reason


WRONG: Mapping[str, list[Any]] = {
    "vocab_size": ["262144", 0, -1, 1.5, True, [1]],
    "hidden_size": ["640", 0],
    "intermediate_size": [{}, 0],
    "num_hidden_layers": ["8", 0, -3, 8.5, True],
    "num_attention_heads": [0, "4"],
    "num_key_value_heads": [0, 1.5],
    "head_dim": [0, "256"],
    "hidden_activation": [1],
    "max_position_embeddings": [0, "x"],
    "initializer_range": ["x"],
    "rms_norm_eps": [0.0, -1e-6, "1e-6"],
    "use_cache": [1, "yes"],
    "bos_token_id": ["<bos>", 1.5],
    "eos_token_id": ["<eos>", ["<eos>"]],
    "pad_token_id": ["<pad>"],
    "attention_bias": [0, "no"],
    "query_pre_attn_scalar": [0, "256", 168.5],
    "sliding_window": [0, "512"],
    "final_logit_softcapping": ["x"],
    "attn_logit_softcapping": [[]],
    "layer_types": ["full_attention", ["full"] * 8, [1] * 8, {}],
    "rope_theta": ["1e6", True, 0, -1e6, [1]],
    "rope_local_base_freq": ["1e4", 0.0],
    "rope_scaling": ["linear", 8.0, ["linear"]],
    "sliding_window_pattern": ["6", 0, -6, 6.5, True],
}


@pytest.mark.parametrize("make", [text_only, multimodal])
@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in WRONG.items() for value in values],
    ids=lambda value: str(value),
)
def test_a_field_of_the_wrong_type_is_named(field: str, value: Any, make: Callable[..., Config]) -> None:
    assert field in refusal(make(**{**SIZES, field: value})).message


def test_the_fields_tested_are_all_that_there_are() -> None:
    settled = {"rope_full_theta", "rope_full_factor", "rope_sliding_theta", "attention_dropout", "tie_word_embeddings"}
    assert Gemma3Text.model_fields.keys() - WRONG.keys() == settled


@pytest.mark.parametrize("field", Gemma3Vision.model_fields)
def test_a_vision_field_of_the_wrong_type_is_named(field: str) -> None:
    assert field in refusal(multimodal(vision={field: []})).message


@pytest.mark.parametrize("field", Gemma3Tokens.model_fields)
def test_a_token_field_of_the_wrong_type_is_named(field: str) -> None:
    assert field in refusal(multimodal(top={field: "x"})).message


def test_all_wrong_fields_are_listed_at_once() -> None:
    message = refusal(text_only(**{**SIZES, "head_dim": "x", "sliding_window": 0})).message
    assert "head_dim" in message
    assert "sliding_window" in message


@pytest.mark.parametrize("count", [0, 7, 9])
def test_layer_types_of_the_wrong_length_are_refused(count: int) -> None:
    error = refusal(text_only(**SIZES, layer_types=["full_attention"] * count))
    assert error.message == f"layer_types lists {count} layers, num_hidden_layers is 8"


def test_heads_not_divisible_by_groups_are_refused() -> None:
    message = refusal(text_only(**{**SIZES, "num_attention_heads": 4, "num_key_value_heads": 3})).message
    assert "num_attention_heads 4" in message
    assert "num_key_value_heads 3" in message


@pytest.mark.parametrize("kind", ["dynamic", "yarn", "llama3", "longrope", "proportional", "", 3, ["linear"]])
@pytest.mark.parametrize(
    ("place", "fields"),
    [
        ("rope_scaling", lambda kind: {"rope_scaling": {"rope_type": kind, "factor": 8.0}}),
        ("rope_scaling", lambda kind: {"rope_scaling": {"type": kind, "factor": 8.0}}),
        (
            "rope_parameters.full_attention",
            lambda kind: {"rope_parameters": {"full_attention": {"rope_type": kind, "factor": 8.0}}},
        ),
        (
            "rope_parameters.sliding_attention",
            lambda kind: {"rope_parameters": {"sliding_attention": {"rope_type": kind, "factor": 8.0}}},
        ),
    ],
    ids=["scaling", "scaling-old-word", "full", "sliding"],
)
def test_an_unknown_rope_type_is_refused(place: str, fields: Callable[[Any], Config], kind: Any) -> None:
    message = refusal(text_only(**SIZES, **fields(kind))).message
    assert place in message
    assert repr(kind) in message


def test_a_linear_scaling_of_sliding_layers_is_refused() -> None:
    scaled = {"rope_parameters": {"sliding_attention": {"rope_type": "linear", "factor": 8.0}}}
    assert "rope_parameters.sliding_attention" in refusal(text_only(**SIZES, **scaled)).message


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "linear"}},
        {"rope_scaling": {"rope_type": "linear", "factor": None}},
        {"rope_scaling": {"rope_type": "linear", "factor": "8"}},
        {"rope_scaling": {"rope_type": "linear", "factor": 0}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear"}}},
        {"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": -8.0}}},
    ],
    ids=str,
)
def test_a_linear_scaling_without_a_factor_is_refused(rope: Config) -> None:
    assert "factor" in refusal(text_only(**SIZES, **rope)).message


@pytest.mark.parametrize("value", ["x", 3, ["x"], {"full_attention": 3}, {"full_attention": ["x"]}], ids=str)
def test_rope_parameters_that_are_not_an_object_are_refused(value: Any) -> None:
    place = "rope_parameters.full_attention" if isinstance(value, dict) else "rope_parameters"
    assert f"{place} is not an object" in refusal(text_only(**SIZES, rope_parameters=value)).message


def test_a_bidirectional_decoder_is_refused() -> None:
    with pytest.raises(CheckpointError, match="is_causal is false"):
        read_gemma3({"model_type": "gemma3_text", "is_causal": False}, WHERE)
    assert read_gemma3({"model_type": "gemma3_text", "is_causal": True}, WHERE).family == "gemma3_text"


def test_the_older_spelling_of_a_scaled_sliding_layer_is_refused_too() -> None:
    scaled = {"sliding_attention": {"type": "linear", "factor": 4.0, "rope_theta": 1e4}}
    with pytest.raises(CheckpointError, match=r"sliding_attention has factor 4\.0"):
        read_gemma3({"model_type": "gemma3_text", "rope_parameters": scaled}, WHERE)


def test_a_pattern_that_readers_do_not_read_is_refused() -> None:
    with pytest.raises(CheckpointError, match="_sliding_window_pattern is 3, which readers take for 6"):
        read_gemma3({"model_type": "gemma3_text", "_sliding_window_pattern": 3}, WHERE)


TEXT_NAMES = ["language_model.model.embed_tokens.weight", "language_model.lm_head.weight"]
TOWER_NAMES = [
    "vision_tower.vision_model.post_layernorm.bias",
    "model.vision_tower.embeddings.position_ids",
    "multi_modal_projector.mm_soft_emb_norm.weight",
    "model.model.multi_modal_projector.mm_input_projection_weight",
]


@pytest.mark.parametrize("name", TOWER_NAMES)
def test_a_tower_is_known_by_its_modules_in_any_spelling(name: str) -> None:
    assert has_tower([*TEXT_NAMES, name])
    assert not has_tower([*TEXT_NAMES, name.replace("vision_tower", "vision_towers").replace("projector", "project")])


def test_a_config_is_read_alone_but_tensor_names_decide_if_present() -> None:
    config = {**multimodal(), "mm_tokens_per_image": 49}
    assert read_gemma3(config, WHERE) == read_gemma3(config, WHERE, [*TEXT_NAMES, TOWER_NAMES[0]])
    towerless = read_gemma3(config, WHERE, TEXT_NAMES)
    assert towerless.vision is None
    assert towerless.family == "gemma3"
    assert towerless.features == {"text_only"}
    assert towerless.tokens == read_gemma3(config, WHERE).tokens
    assert is_towerless(towerless)
    assert not is_towerless(read_gemma3(config, WHERE))
    assert not is_towerless(read_gemma3(text_only(), WHERE, TEXT_NAMES))
    del config["vision_config"]
    assert read_gemma3(config, WHERE, TEXT_NAMES) == towerless
    for names in (None, TOWER_NAMES):
        with pytest.raises(CheckpointError, match="vision_config is missing"):
            read_gemma3(config, WHERE, names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mm_tokens_per_image": 5}, "mm_tokens_per_image is 5, which 4 x 4 image patches cannot be pooled to"),
        ({"mm_tokens_per_image": 9}, "mm_tokens_per_image is 9, which"),
        ({"mm_tokens_per_image": 25}, "mm_tokens_per_image is 25, which"),
        ({"eoi_token_index": -1}, "eoi_token_index is -1, expected a token id"),
    ],
)
def test_images_that_cannot_be_placed_among_the_tokens_are_refused(change: dict[str, int], message: str) -> None:
    tower = {"image_size": 56, "patch_size": 14}
    config = {"model_type": "gemma3", "text_config": {}, "vision_config": tower, "mm_tokens_per_image": 4}
    tensors = ["vision_tower.post_layernorm.bias"]
    assert read_gemma3(config, Path("config.json"), tensors).vision is not None
    with pytest.raises(CheckpointError) as caught:
        read_gemma3({**config, **change}, Path("config.json"), tensors)
    assert message in caught.value.message
