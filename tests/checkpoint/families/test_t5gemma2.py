import json
from collections import Counter
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import Any

import pytest

from t5g2convert.checkpoint.families.config_section import KNOWN_MODELS
from t5g2convert.checkpoint.families.registry import expected_tensors
from t5g2convert.checkpoint.families.rope_config import Rope
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2Text, read_t5gemma2
from t5g2convert.checkpoint.families.text_and_vision import SiglipConfig
from t5g2convert.errors import CheckpointError
from tests.models.sizes import FIELDS, SIZES, TOTALS

Config = dict[str, Any]

WHERE = Path("somewhere/config.json")

EMBEDDING_AND_STACK = {
    "270m": (167.8, 100.3),
    "1b": (302.0, 697.9),
    "4b": (671.1, 3209.0),
    "12b": (1006.6, 10759.2),
    "27b": (1409.3, 25599.7),
}
TOWER: Config = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 27,
    "image_size": 896,
    "patch_size": 14,
}


def stack(size: str, **changes: Any) -> Config:
    fields: Config = dict(zip(FIELDS, SIZES[size], strict=True))
    return {
        **fields,
        "vocab_size": 262144,
        "sliding_window": 512,
        "layer_types": ["full_attention"] * fields["num_hidden_layers"],
        "rope_parameters": {"full_attention": {"rope_theta": 1e6}},
        **changes,
    }


def config(size: str = "270m", *, vision: Config | None = None) -> Config:
    return {
        "model_type": "t5gemma2",
        "encoder": {"text_config": stack(size), "vision_config": dict(TOWER if vision is None else vision)},
        "decoder": stack(size),
    }


def section(document: Config, place: str) -> Config:
    for key in place.split("."):
        document = document[key]
    return document


def refusal(document: Config) -> CheckpointError:
    with pytest.raises(CheckpointError) as caught:
        read_t5gemma2(document, WHERE)
    assert caught.value.where == str(WHERE)
    return caught.value


def counted(document: Config) -> Counter[str]:
    parts: Counter[str] = Counter()
    for item in expected_tensors(document, WHERE):
        parts[item.part] += prod(item.shape)
    return parts


@pytest.mark.parametrize("size", SIZES)
def test_the_published_sizes_have_their_published_totals(size: str) -> None:
    assert counted(config(size)).total() == TOTALS[size]


@pytest.mark.parametrize("size", SIZES)
def test_parameters_by_part_are_the_published_ones(size: str) -> None:
    parts = {part: round(count / 1e6, 1) for part, count in counted(config(size)).items()}
    embedding, one_stack = EMBEDDING_AND_STACK[size]
    projector = round((1152 * SIZES[size][1] + 1152) / 1e6, 1)
    assert parts == {
        "embedding": embedding,
        "encoder": one_stack,
        "decoder": one_stack,
        "vision": 416.9,
        "projector": projector,
    }


@pytest.mark.parametrize("size", SIZES)
def test_every_name_is_implied_once(size: str) -> None:
    names = Counter(item.name for item in expected_tensors(config(size), WHERE))
    layers = SIZES[size][0]
    assert set(names.values()) == {1}
    assert len(names) == 2 + 2 * (13 * layers + 1) + (3 + 27 * 16 + 2) + 2


def test_names_are_those_of_the_published_layout() -> None:
    implied = {item.name: item for item in expected_tensors(config(), WHERE)}
    assert implied["model.encoder.embed_tokens.weight"].shape == (262144, 640)
    assert implied["model.encoder.embed_tokens.eoi_embedding"].shape == (640,)
    assert implied["model.encoder.norm.weight"].shape == (640,)
    for part in ("encoder", "decoder"):
        last = f"model.{part}.layers.17."
        assert {name.removeprefix(last): item.shape for name, item in implied.items() if name.startswith(last)} == {
            "self_attn.q_proj.weight": (1024, 640),
            "self_attn.k_proj.weight": (256, 640),
            "self_attn.v_proj.weight": (256, 640),
            "self_attn.o_proj.weight": (640, 1024),
            "self_attn.q_norm.weight": (256,),
            "self_attn.k_norm.weight": (256,),
            "mlp.gate_proj.weight": (2048, 640),
            "mlp.up_proj.weight": (2048, 640),
            "mlp.down_proj.weight": (640, 2048),
            "pre_self_attn_layernorm.weight": (640,),
            "post_self_attn_layernorm.weight": (640,),
            "pre_feedforward_layernorm.weight": (640,),
            "post_feedforward_layernorm.weight": (640,),
        }
    tower = "model.encoder.vision_tower.vision_model."
    assert implied[tower + "embeddings.patch_embedding.weight"].shape == (1152, 3, 14, 14)
    assert implied[tower + "embeddings.position_embedding.weight"].shape == (4096, 1152)
    assert implied[tower + "encoder.layers.26.mlp.fc1.bias"].shape == (4304,)
    assert implied[tower + "encoder.layers.26.mlp.fc2.weight"].shape == (1152, 4304)
    assert implied["model.encoder.multi_modal_projector.mm_input_projection_weight"].shape == (1152, 640)
    assert implied["model.encoder.multi_modal_projector.mm_soft_emb_norm.weight"].shape == (1152,)
    assert not [name for name in implied if "lm_head" in name or "rotary" in name or "head." in name]
    assert not [name for name in implied if name.startswith("model.decoder.embed")]


def test_a_stub_tower_is_seven_small_tensors() -> None:
    stub = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 0, "image_size": 28, "patch_size": 14}
    shapes = {
        item.name.rpartition("vision_model.")[2].removeprefix("model.encoder."): item.shape
        for item in expected_tensors(config(vision=stub), WHERE)
        if item.part in ("vision", "projector")
    }
    assert shapes == {
        "embeddings.patch_embedding.weight": (16, 3, 14, 14),
        "embeddings.patch_embedding.bias": (16,),
        "embeddings.position_embedding.weight": (4, 16),
        "post_layernorm.weight": (16,),
        "post_layernorm.bias": (16,),
        "multi_modal_projector.mm_input_projection_weight": (16, 640),
        "multi_modal_projector.mm_soft_emb_norm.weight": (16,),
    }


def test_stacks_of_different_depth_and_width_keep_their_own_shapes() -> None:
    document = config()
    document["decoder"] |= {"num_hidden_layers": 3, "intermediate_size": 99, "num_attention_heads": 2, "head_dim": 8}
    document["decoder"]["layer_types"] = ["full_attention"] * 3
    implied = {item.name: item.shape for item in expected_tensors(document, WHERE)}
    assert implied["model.encoder.layers.17.mlp.up_proj.weight"] == (2048, 640)
    assert implied["model.decoder.layers.2.mlp.up_proj.weight"] == (99, 640)
    assert implied["model.decoder.layers.2.self_attn.q_proj.weight"] == (16, 640)
    assert "model.decoder.layers.3.mlp.up_proj.weight" not in implied


REQUIRED = [
    (place, field)
    for place, model in (
        ("encoder.text_config", T5Gemma2Text),
        ("decoder", T5Gemma2Text),
        ("encoder.vision_config", SiglipConfig),
    )
    for field, info in model.model_fields.items()
    if info.is_required()
]


@pytest.mark.parametrize(("place", "field"), REQUIRED)
def test_I10_a_missing_field_is_named(place: str, field: str) -> None:
    document = config()
    del section(document, place)[field]
    assert field in refusal(document).message


@pytest.mark.parametrize("value", ["x", None, -1, 1.5, True], ids=repr)
@pytest.mark.parametrize(("place", "field"), REQUIRED)
def test_I10_a_field_of_the_wrong_type_is_named(place: str, field: str, value: Any) -> None:
    document = config()
    section(document, place)[field] = value
    assert field in refusal(document).message


def test_I10_an_unknown_layer_kind_is_named() -> None:
    document = config()
    document["decoder"]["layer_types"][4] = "chunked_attention"
    assert "layer_types.4" in refusal(document).message


@pytest.mark.parametrize("place", ["encoder", "encoder.text_config", "encoder.vision_config", "decoder"])
@pytest.mark.parametrize(("value", "reason"), [(None, "missing"), ([], "not an object"), ("x", "not an object")])
def test_I10_a_missing_section_is_named(place: str, value: Any, reason: str) -> None:
    document = config()
    parent, _, key = place.rpartition(".")
    (section(document, parent) if parent else document)[key] = value
    assert refusal(document).message == f"{key} is {reason}"


@pytest.mark.parametrize("model_type", [*sorted(KNOWN_MODELS.keys() - {"t5gemma2"}), "gemma3", "t5", None])
def test_I10_another_model_is_refused_by_name(model_type: str | None) -> None:
    message = refusal({**config(), "model_type": model_type}).message
    assert message.endswith("is not T5Gemma 2")
    assert KNOWN_MODELS.get(str(model_type), "") in message
    assert "without model_type" in message if model_type is None else repr(model_type) in message


def test_reading_leaves_the_config_as_it_is() -> None:
    document = config()
    before = deepcopy(document)
    list(expected_tensors(document, WHERE))
    assert json.dumps(document) == json.dumps(before)


@pytest.mark.parametrize("place", ["encoder.text_config", "decoder"])
@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"layer_types": ["full_attention"]}, "layer_types lists 1 layers, num_hidden_layers is 18"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"rope_parameters": {}}, "rope_parameters lacks full_attention"),
    ],
    ids=["layer_types", "heads", "rope"],
)
def test_I10_settings_that_contradict_each_other_are_named(place: str, changes: Config, complaint: str) -> None:
    document = config()
    section(document, place).update(changes)
    assert refusal(document).message == f"{place}.{complaint}"


def test_a_rope_factor_counts_only_where_the_embedding_is_linear() -> None:
    rope = {"rope_theta": 1e6, "factor": 8.0}
    assert Rope.model_validate({**rope, "rope_type": "linear"}).linear_factor == 8.0
    assert Rope.model_validate({**rope, "rope_type": "default"}).linear_factor == 1.0


def test_the_older_spelling_of_a_rope_is_read() -> None:
    rope = Rope.model_validate({"type": "linear", "factor": 4.0, "rope_theta": 1e4})
    assert (rope.rope_type, rope.linear_factor) == ("linear", 4.0)
    both = Rope.model_validate({"type": "linear", "rope_type": "default", "factor": 4.0, "rope_theta": 1e4})
    assert both.linear_factor == 1.0


def test_a_bidirectional_decoder_is_refused() -> None:
    document = config()
    document["decoder"]["is_causal"] = False
    with pytest.raises(CheckpointError, match=r"decoder\.is_causal is false"):
        read_t5gemma2(document, WHERE)
