import json
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from t5g2convert import CheckpointError, Plan, UsageError, convert, plan, verify
from t5g2convert.conversion.plan.types import Change
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.schema import PresetSettings, WeightMap
from t5g2convert.mapping.source_families import FAMILIES
from t5g2convert.mapping.synthetic import write_synthetic_source
from tests.conftest import TwinFolder
from tests.processes.memory import run_and_measure

GEMMA3_27B: dict[str, Any] = {
    "model_type": "gemma3",
    "text_config": {
        "hidden_size": 5376,
        "intermediate_size": 21504,
        "num_hidden_layers": 62,
        "num_attention_heads": 32,
        "num_key_value_heads": 16,
        "head_dim": 128,
        "query_pre_attn_scalar": 168,
        "sliding_window": 1024,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
    },
    "vision_config": {
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 896,
        "patch_size": 14,
    },
}
"""The published, sparse form."""


def test_every_byte_of_every_shard_is_planned_once(demo_source: Path) -> None:
    made = plan(demo_source, max_shard_bytes=60_000)
    assert len(made.shards) > 5
    for shard in made.shards:
        position = shard.header_size
        for tensor in sorted((item for item in made.tensors if item.shard == shard.name), key=lambda item: item.start):
            assert tensor.start == position
            assert tensor.nbytes == tensor.elements * 2
            position = tensor.end
        assert position == shard.size
        assert shard.size - shard.header_size <= 60_000


def test_shared_tensors_name_one_source_range(demo_source: Path) -> None:
    made = plan(demo_source)
    ranges = Counter(tensor.content.source for tensor in made.tensors if tensor.content.kind == "copy")
    stacks = [tensor for tensor in made.tensors if tensor.part in ("encoder", "decoder")]
    assert {ranges[tensor.content.source] for tensor in stacks} == {2}
    others = [tensor for tensor in made.tensors if tensor.part in ("vision", "projector")]
    assert {ranges[tensor.content.source] for tensor in others} == {1}


def test_merged_attention_is_marked_on_six_tensors_of_every_layer(demo_source: Path) -> None:
    marked = [tensor.name for tensor in plan(demo_source).tensors if tensor.merged_attention]
    assert len(marked) == 2 * 8 * 6
    assert all(".self_attn." in name for name in marked)


def test_a_sharded_decoder_starts_a_file_of_its_own(demo_source: Path) -> None:
    made = plan(demo_source, max_shard_bytes=500_000)
    parts = {
        shard.name: {tensor.part for tensor in made.tensors if tensor.shard == shard.name} for shard in made.shards
    }
    assert list(parts) == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert "decoder" not in parts["model-00001-of-00002.safetensors"]
    assert parts["model-00002-of-00002.safetensors"] == {"decoder"}


def test_a_tensor_larger_than_a_shard_gets_one_of_its_own(demo_source: Path) -> None:
    made = plan(demo_source, max_shard_bytes=1)
    assert len(made.shards) == len(made.tensors)


def test_the_plan_is_json(demo_source: Path) -> None:
    made = plan(demo_source)
    assert json.loads(json.dumps(made.to_json())) == made.to_json()


def test_a_text_only_source_gets_the_stub_tower(
    demo_config: Mapping[str, Any], gemma3_map: WeightMap, tmp_path: Path
) -> None:
    config = {**demo_config["text_config"], "model_type": "gemma3_text"}
    write_synthetic_source(tmp_path, gemma3_map, config, seed=0)
    made = plan(tmp_path)
    stub = [tensor for tensor in made.tensors if tensor.part in ("vision", "projector")]
    assert len(stub) == 7
    assert {tensor.content.kind for tensor in stub} == {"zeros"}
    assert made.config["encoder"]["vision_config"]["num_hidden_layers"] == 0
    assert made.config["encoder"]["mm_tokens_per_image"] == 4
    assert any("no vision tower" in note for note in made.notes)


def test_dtype_is_only_at_the_top_of_the_config(demo_source: Path) -> None:
    config = plan(demo_source).config
    assert config["dtype"] == "bfloat16"
    below = [config["encoder"], config["encoder"]["text_config"], config["encoder"]["vision_config"], config["decoder"]]
    assert not any(key in section for section in below for key in ("dtype", "torch_dtype"))


def test_the_config_has_the_sources_settings(demo_source: Path) -> None:
    path = demo_source / "config.json"
    source = json.loads(path.read_text())
    source["text_config"] |= {
        "rope_theta": 2e6,
        "rope_local_base_freq": 3e4,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
        "sliding_window": 11,
        "rms_norm_eps": 1e-4,
        "attn_logit_softcapping": 50.0,
        "attention_dropout": 0.1,
        "layer_types": ["full_attention", "sliding_attention"] * 4,
        "hidden_activation": "gelu",
    }
    source["eos_token_id"] = [1, 106]
    path.write_text(json.dumps(source))
    made = plan(demo_source)
    for stack in (made.config["encoder"]["text_config"], made.config["decoder"]):
        for key in ("sliding_window", "rms_norm_eps", "attn_logit_softcapping"):
            assert stack[key] == source["text_config"][key]
        assert stack["layer_types"] == source["text_config"]["layer_types"]
        assert stack["hidden_activation"] == "gelu"
        assert stack["attention_dropout"] == made.config["attention_dropout"] == 0.1
        assert stack["rope_parameters"] == {
            "full_attention": {"rope_type": "linear", "rope_theta": 2e6, "factor": 4.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 3e4},
        }
        assert stack["eos_token_id"] == [1, 106]
    assert made.generation_config == {"bos_token_id": 2, "eos_token_id": [1, 106], "pad_token_id": 0}


def test_the_end_tokens_of_generation_config_win(demo_source: Path) -> None:
    (demo_source / "generation_config.json").write_text('{"eos_token_id": [1, 106]}')
    assert plan(demo_source).generation_config["eos_token_id"] == [1, 106]


def test_an_unscaled_rope_is_written_as_linear_with_factor_one(demo_source: Path) -> None:
    rope = plan(demo_source).config["decoder"]["rope_parameters"]["full_attention"]
    assert rope == {"rope_type": "linear", "rope_theta": 1e6, "factor": 1.0}


def test_an_image_token_past_the_table_is_refused(demo_source: Path) -> None:
    path = demo_source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"image_token_index": 256}))
    with pytest.raises(CheckpointError, match="image_token_index is 256, beyond the 256 rows"):
        plan(demo_source)


def test_a_text_vocabulary_without_the_end_of_image_token_gets_zeros_and_a_note(
    demo_config: Mapping[str, Any], gemma3_map: WeightMap, tmp_path: Path
) -> None:
    made = planned({**demo_config["text_config"], "model_type": "gemma3_text"}, gemma3_map, tmp_path)
    (eoi,) = [tensor for tensor in made.tensors if tensor.name.endswith("eoi_embedding")]
    assert eoi.content.kind == "zeros"
    assert any("eoi_embedding is zeros" in note for note in made.notes)


@pytest.mark.parametrize(("argument", "value"), [("dtype", "int8"), ("max_shard_bytes", 0)])
def test_an_argument_without_meaning_is_refused(argument: str, value: Any, demo_source: Path) -> None:
    with pytest.raises(UsageError):
        plan(demo_source, **{argument: value})


def planned(config: Mapping[str, Any], weight_map: WeightMap, folder: Path) -> Plan:
    write_synthetic_source(folder, weight_map, config, seed=None)
    return plan(folder)


def test_27b_is_planned_from_headers_in_little_memory(gemma3_map: WeightMap, tmp_path: Path) -> None:
    made = planned(GEMMA3_27B, gemma3_map, tmp_path)
    assert made.parameters["total"] == 53_031_784_048
    assert made.parameters["encoder"] == made.parameters["decoder"] == 25_599_716_096
    assert made.nbytes > 106e9
    assert len(made.shards) > 20
    printed, peak = run_and_measure("plan", tmp_path, "--json")
    assert json.loads(printed)["parameters"]["total"] == 53_031_784_048
    assert peak < 150e6


def test_an_unchanged_model_declares_no_change(demo_source: Path) -> None:
    assert plan(demo_source).changes == ()


def test_a_cast_is_declared_with_both_dtypes(demo_source: Path) -> None:
    assert plan(demo_source, dtype="float32").changes == (Change("dtype", "bfloat16", "float32"),)
    assert plan(demo_source, dtype="bfloat16").changes == ()


def test_a_cut_table_and_a_moved_token_are_declared(
    gemma3_map: WeightMap, demo_config: Mapping[str, Any], tmp_path: Path
) -> None:
    config = json.loads(json.dumps(demo_config)) | {"image_token_index": 262_144}
    config["text_config"]["vocab_size"] = 262_208
    write_synthetic_source(tmp_path, gemma3_map, config, seed=None)
    assert set(plan(tmp_path).changes) == {
        Change("vocab_size", 262_208, 262_144),
        Change("image_token_index", 262_144, 256_001),
    }


SMALL_GEMMA2: dict[str, Any] = {
    "model_type": "gemma2", "vocab_size": 20, "hidden_size": 48, "intermediate_size": 8, "num_hidden_layers": 2,
    "num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 4, "sliding_window": 4,
}  # fmt: skip


@pytest.mark.parametrize(
    ("family", "name"),
    [(family, name) for family in ("gemma3", "gemma2") for name in FAMILIES[family].terms.values
     if name in PresetSettings.model_fields],
)  # fmt: skip
def test_every_preset_setting_is_declared_for_each_stack(
    family: str, name: str, demo_config: Mapping[str, Any], tmp_path: Path
) -> None:
    shipped = find_map(family)
    preset = f"presets:\n  mine: {{requires: {{hidden_size: 48}}, settings: {{{name}: 77}}}}\n"
    text = shipped.path.read_text()
    text = text.replace("presets:\n", preset) if "\npresets:\n" in text else f"{text}{preset}"
    (tmp_path / "mine.yaml").write_text(text)
    (tmp_path / "source").mkdir()
    config = SMALL_GEMMA2 if family == "gemma2" else demo_config
    write_synthetic_source(tmp_path / "source", shipped.map, config, seed=None)
    changes = plan(tmp_path / "source", mapping=str(tmp_path / "mine.yaml"), preset="mine").changes
    assert [change.target for change in changes if change.field.startswith(("encoder.", "decoder."))] == [77, 77]


@pytest.mark.parametrize(
    ("written", "path", "before", "after"),
    [
        ("factor: $STACK.rope_full_factor", "rope_parameters.full_attention.factor", 1.0, 8.0),
        ("rope_theta: $STACK.rope_full_theta", "rope_parameters.full_attention.rope_theta", 1e6, 8.0),
        ("rope_theta: $STACK.rope_sliding_theta", "rope_parameters.sliding_attention.rope_theta", 1e4, 8.0),
        ("sliding_window: $STACK.sliding_window", "sliding_window", 16, 8.0),
    ],
)
def test_a_setting_that_a_map_writes_out_is_declared_for_each_stack(
    written: str, path: str, before: float, after: float, demo_source: Path, tmp_path: Path
) -> None:
    text = find_map("gemma3").path.read_text()
    number = "8" if path == "sliding_window" else "8.0"
    for stack in ("encoder", "decoder"):
        text = text.replace(written.replace("STACK", stack), f"{written.partition(':')[0]}: {number}")
    (tmp_path / "mine.yaml").write_text(text)
    made = plan(demo_source, mapping=str(tmp_path / "mine.yaml"))
    effect = "positions in full layers are divided by 8" if "factor" in path else "this changes the computation"
    assert sum(note.endswith(f": {effect}") for note in made.notes) == 1
    assert made.changes == tuple(
        Change(f"{stack}.{path}", before, after) for stack in ("encoder.text_config", "decoder")
    )


def test_a_text_only_source_keeps_the_cap_of_its_logits(twin_folder: TwinFolder, tmp_path: Path) -> None:
    shutil.copytree(twin_folder("text-8"), tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text()) | {"final_logit_softcapping": 30.0}
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    made = plan(tmp_path / "source").config
    assert (
        made["encoder"]["text_config"]["final_logit_softcapping"] == made["decoder"]["final_logit_softcapping"] == 30.0
    )


HALF = "load the output with dtype=torch.float32 or dtype=torch.bfloat16"


@pytest.mark.parametrize(
    ("name", "options", "noted"),
    [
        ("text-8", {"dtype": "float16"}, True),
        ("images-8", {"dtype": "float16"}, True),
        ("gemma2-5", {"dtype": "float16"}, True),
        ("text-float16", {}, True),
        ("text-float16", {"dtype": "float32"}, False),
        ("text-float16", {"dtype": "bfloat16"}, False),
        ("text-8", {}, False),
    ],
)
def test_a_float16_output_is_noted_with_a_dtype_for_loading(
    name: str, options: dict[str, Any], noted: bool, twin_folder: TwinFolder
) -> None:
    notes = [note for note in plan(twin_folder(name), **options).notes if HALF in note]
    assert len(notes) == noted
    assert all("float16" in note and "65504" in note for note in notes)


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_a_part_in_float16_is_noted_too(part: str, converted_twin: TwinFolder) -> None:
    assert any(HALF in note for note in plan(converted_twin("images-8"), part=part, dtype="float16").notes)


ACTIVATED = [
    ("text-8", "hidden_activation"),
    ("images-8", "vision_config.hidden_act"),
    ("gemma2-5", "hidden_activation"),
]


def with_activation(source: Path, target: Path, path: str, name: str) -> Path:
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    section, _, key = path.rpartition(".")
    (config[section] if section else config)[key] = name
    (target / "config.json").write_text(json.dumps(config))
    return target


@pytest.mark.parametrize(("twin", "path"), ACTIVATED)
def test_an_activation_that_verify_cannot_compute_is_refused(
    twin: str, path: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source = with_activation(twin_folder(twin), tmp_path / "source", path, "laplace")
    with pytest.raises(CheckpointError, match=f"{path.rpartition('.')[2]}: Input should be"):
        plan(source)


@pytest.mark.sampled
@pytest.mark.parametrize("name", ["quick_gelu", "gelu_new", "relu2"])
@pytest.mark.parametrize(("twin", "path"), ACTIVATED)
def test_other_activations_of_transformers_are_converted_and_verified(
    twin: str, path: str, name: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source = with_activation(twin_folder(twin), tmp_path / "source", path, name)
    convert(source, tmp_path / "out")
    assert verify(tmp_path / "out", source).passed


@pytest.mark.parametrize("window", [-1, 0, 1, 2**31])
def test_a_window_out_of_range_is_refused(window: int, twin_folder: TwinFolder) -> None:
    with pytest.raises(UsageError, match=r"--sliding-window must be between 2 and"):
        plan(twin_folder("text-8"), sliding_window=window)
    assert plan(twin_folder("text-8"), sliding_window=2).config["decoder"]["sliding_window"] == 2


def test_a_source_with_a_window_of_1_is_noted(twin_folder: TwinFolder, tmp_path: Path) -> None:
    shutil.copytree(twin_folder("text-8"), tmp_path / "source")
    config = json.loads((tmp_path / "source/config.json").read_text()) | {"sliding_window": 1}
    (tmp_path / "source/config.json").write_text(json.dumps(config))
    (note,) = [note for note in plan(tmp_path / "source").notes if "generate fails" in note]
    assert note.endswith("use use_cache=False, or convert with --sliding-window 2")
    assert not any("generate fails" in note for note in plan(tmp_path / "source", sliding_window=2).notes)
    assert not any("generate fails" in note for note in plan(twin_folder("text-8")).notes)
