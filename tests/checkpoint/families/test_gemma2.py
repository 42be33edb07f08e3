from collections.abc import Mapping
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from transformers import Gemma2Config

from t5g2convert.checkpoint.families.gemma2 import Gemma2, Gemma2Text, read_gemma2
from t5g2convert.errors import CheckpointError, MappingError

Config = dict[str, Any]

WHERE = Path("somewhere/config.json")

SIZES: Config = {"hidden_size": 24, "num_hidden_layers": 5, "num_attention_heads": 4, "num_key_value_heads": 2}

ALTERNATING = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]

DIALECTS: Mapping[str, Config] = {
    "4.42": {
        "rope_theta": 20_000.0,
        "cache_implementation": "hybrid",
        "hidden_act": "gelu_pytorch_tanh",
        "torch_dtype": "float32",
    },
    "4.42-whole-number": {"rope_theta": 20_000},
    "4.5x": {"rope_theta": 20_000.0, "rope_scaling": None, "layer_types": ALTERNATING, "tie_word_embeddings": True},
    "5": {"rope_parameters": {"rope_theta": 20_000.0, "rope_type": "default"}, "use_bidirectional_attention": None},
    "both": {"rope_theta": 20_000.0, "rope_parameters": {"rope_theta": 20_000.0, "rope_type": "default"}},
    "both-with-nulls": {"rope_theta": None, "rope_scaling": None, "rope_parameters": {"rope_theta": 20_000.0}},
}

PUBLISHED = {
    "2b": {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26, "num_attention_heads": 8,
           "num_key_value_heads": 4, "head_dim": 256, "query_pre_attn_scalar": 256},
    "9b": {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "num_attention_heads": 16,
           "num_key_value_heads": 8, "head_dim": 256, "query_pre_attn_scalar": 256},
    "27b": {"hidden_size": 4608, "intermediate_size": 36864, "num_hidden_layers": 46, "num_attention_heads": 32,
            "num_key_value_heads": 16, "head_dim": 128, "query_pre_attn_scalar": 144},
}  # fmt: skip


def config(**fields: Any) -> Config:
    return {"model_type": "gemma2", **fields}


def read(document: Config) -> Gemma2:
    return read_gemma2(document, WHERE)


def refusal(document: Config) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read(document)
    assert caught.value.where == str(WHERE)
    return caught.value


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_says_the_same(dialect: str) -> None:
    document = config(**SIZES, **DIALECTS[dialect])
    before = deepcopy(document)
    assert read(document).text == Gemma2Text(**SIZES, layer_types=ALTERNATING, rope_theta=2e4, rope_factor=1.0)
    assert document == before


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 4}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0}, "rope_theta": 10_000},
    ],
    ids=str,
)
def test_a_linear_scaling_is_read_in_every_dialect(rope: Config) -> None:
    text = read(config(**SIZES, **rope)).text
    assert (text.rope_theta, text.rope_factor) == (1e4, 4.0)


def assert_same_text(ours: Gemma2Text, theirs: Gemma2Config) -> None:
    named = [name for name in Gemma2Text.model_fields if not name.startswith("rope_")]
    assert {name: getattr(ours, name) for name in named} == {name: getattr(theirs, name) for name in named}
    rope: Any = theirs.rope_parameters
    assert (ours.rope_theta, ours.rope_factor) == (rope["rope_theta"], rope.get("factor", 1.0))


@pytest.mark.parametrize(
    "fields",
    [
        {},
        *PUBLISHED.values(),
        {"attn_logit_softcapping": None, "final_logit_softcapping": None, "tie_word_embeddings": False},
        {
            "sliding_window": 17,
            "rms_norm_eps": 1e-3,
            "hidden_activation": "gelu",
            "vocab_size": 300,
            "use_cache": False,
        },
        {"bos_token_id": 7, "eos_token_id": [8, 9], "pad_token_id": 5, "use_cache": False},
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 5e5, "factor": 3.0}, "max_position_embeddings": 99},
        {"num_hidden_layers": 3, "layer_types": ["full_attention", "full_attention", "sliding_attention"]},
        {"hidden_act": "relu"},
    ],
    ids=str,
)
def test_transformers_reads_the_same_of_the_same_fields(fields: Config) -> None:
    assert_same_text(read(config(**fields)).text, Gemma2Config(**deepcopy(fields)))


def test_configs_written_by_transformers_are_read() -> None:
    theirs = Gemma2Config(**SIZES, final_logit_softcapping=None)
    assert_same_text(read(theirs.to_dict()).text, theirs)


@pytest.mark.parametrize(("tied", "condition"), [(True, "tied"), (False, "untied"), (None, "tied")])
def test_the_softmax_is_tied_as_the_config_says(tied: bool | None, condition: str) -> None:
    fields = {} if tied is None else {"tie_word_embeddings": tied}
    assert read(config(**SIZES, **fields)).features == {"text_only", condition}


def test_symbols_are_sizes_and_every_one_has_its_field() -> None:
    model = read(config(**SIZES, head_dim=10))
    assert model.dims == {
        "rows": 256_000, "hidden": 24, "intermediate": 9216, "query": 40, "key_value": 20, "head": 10, "layers": 5,
    }  # fmt: skip
    assert model.fields.keys() == model.dims.keys() - {"layers"}
    assert {name: model.values[name] for name in SIZES} == SIZES


def test_it_has_no_vision_tower() -> None:
    model = read(config())
    with pytest.raises(MappingError, match="has no vision tower"):
        model.with_vision_of(model, None)


@pytest.mark.parametrize("model_type", ["gemma", "gemma3_text", "t5gemma", None, 3, ["gemma2"]])
def test_another_model_is_refused(model_type: Any) -> None:
    assert "is not Gemma 2" in refusal({"model_type": model_type}).message


WRONG: Mapping[str, list[Any]] = {
    "vocab_size": [0, -1, 2.5, "300", True, 2**40],
    "hidden_size": ["x", 0],
    "intermediate_size": ["9216"],
    "num_hidden_layers": [0, 20_000, "5", 5.5, True],
    "num_attention_heads": [0],
    "num_key_value_heads": [0, "1"],
    "head_dim": [0, "256"],
    "hidden_activation": [1],
    "max_position_embeddings": [0],
    "initializer_range": ["x", float("nan")],
    "rms_norm_eps": [0.0, -1e-6, "1e-6"],
    "use_cache": [1],
    "bos_token_id": ["<bos>"],
    "eos_token_id": ["<eos>", ["<eos>"]],
    "pad_token_id": [1.5],
    "attention_bias": [True, 0, "no"],
    "attention_dropout": ["x"],
    "query_pre_attn_scalar": [0, 16.5, "256"],
    "sliding_window": [0, "512"],
    "final_logit_softcapping": ["x", 0.0, -30.0],
    "attn_logit_softcapping": [[], 0],
    "tie_word_embeddings": [1, "true"],
    "layer_types": ["full_attention", ["full"] * 5, [1] * 5, {}, ["full_attention"] * 4, ["full_attention"] * 6],
    "rope_theta": ["1e4", True, 0, -1e4, float("inf"), 10**400],
    "rope_scaling": ["linear", 8.0, ["linear"], {"rope_type": "yarn", "factor": 2.0}, {"rope_type": "linear"}],
    "rope_parameters": ["x", {"rope_theta": "x"}, {"rope_type": "llama3"}, {"rope_type": "linear", "factor": 0}],
    "use_bidirectional_attention": [True],
}


@pytest.mark.parametrize(
    ("field", "value"), [(field, value) for field, values in WRONG.items() for value in values], ids=str
)
def test_a_field_of_the_wrong_type_is_named(field: str, value: Any) -> None:
    assert field in refusal(config(**{**SIZES, field: value})).message


def test_the_fields_tested_are_all_that_there_are() -> None:
    assert Gemma2Text.model_fields.keys() - WRONG.keys() == {"rope_factor"}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 3, "num_key_value_heads": 2}, "num_attention_heads 3 is not a multiple of num_key"),
        (
            {"num_attention_heads": 5, "num_key_value_heads": 5},
            "hidden_size 24 is not a multiple of num_attention",
        ),
        ({"rope_theta": 1e4, "rope_parameters": {"rope_theta": 2e4}}, "rope_theta says 10000.0 but rope_parameters"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "linear", "factor": 3}},
            "rope_parameters.factor says 3 but rope_scaling.factor says 2",
        ),
    ],
    ids=lambda item: str(item)[:40],
)
def test_fields_that_contradict_each_other_are_refused(fields: Config, message: str) -> None:
    assert message in refusal(config(**{**SIZES, **fields})).message
