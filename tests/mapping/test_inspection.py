import json
from collections.abc import Callable, Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from t5g2convert import CheckpointError, Inspection, Plan, convert, inspect, plan
from t5g2convert.checkpoint.families.registry import expected_tensors
from t5g2convert.checkpoint.header import TensorEntry, encode_header
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.synthetic import write_synthetic_source
from tests.models.sizes import FIELDS, SIGLIP, SIZES, TOTALS

Config = dict[str, Any]
Arrays = dict[str, np.ndarray[Any, Any]]

TOWER_PARAMETERS = 416_866_032


def fields(size: str) -> Config:
    return dict(zip(FIELDS, SIZES[size], strict=True))


def edit(folder: Path, change: Callable[[Arrays], None]) -> None:
    arrays = load_file(folder / "model.safetensors")
    change(arrays)
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})


def counted(folder: Path, *prefixes: str) -> int:
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "np") as file:
            names = [name for name in file.keys() if name.startswith(prefixes)]  # noqa: SIM118
            total += sum(prod(file.get_slice(name).get_shape()) for name in names)
    return total


def write_hollow(folder: Path, config: Config, tensors: Iterable[tuple[str, tuple[int, ...]]]) -> None:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    entries: list[TensorEntry] = []
    position = 0
    for name, shape in tensors:
        entries.append(TensorEntry(name, "BF16", shape, position, position + 2 * prod(shape)))
        position = entries[-1].end
    header = encode_header(entries)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(header)
        file.truncate(len(header) + position)


def assert_complete(inspection: Inspection) -> None:
    assert inspection.family == "t5gemma2"
    assert inspection.layout == {"names": "published"}
    assert inspection.missing == ()
    assert inspection.unexpected == ()


def test_the_demo_source_is_described(demo_source: Path, demo_config: Mapping[str, Any]) -> None:
    found = inspect(demo_source)
    assert found.path == demo_source
    assert found.family == "gemma3"
    assert found.layout == {
        "text": "language_model.model.",
        "vision": "vision_tower.vision_model.",
        "projector": "multi_modal_projector.",
    }
    assert found.missing == ()
    assert found.unexpected == ()
    assert found.notes == ()
    assert found.parameters == {
        "embedding": 256 * 48,
        "encoder": 0,
        "decoder": counted(demo_source, "language_model.model.layers.", "language_model.model.norm."),
        "vision": counted(demo_source, "vision_tower."),
        "projector": 32 * 48 + 32,
        "total": counted(demo_source, ""),
    }
    assert found.dtypes == {"BF16": found.parameters["total"]}
    assert found.files == {"model.safetensors": (demo_source / "model.safetensors").stat().st_size}
    text = demo_config["text_config"]
    assert {name: found.facts[name] for name in FIELDS} == {name: text[name] for name in FIELDS}
    assert found.facts["sliding_window"] == 16
    assert found.facts["layer_types"].count("full_attention") == 1
    assert found.facts["rope_parameters"] == {
        "full_attention": {"rope_theta": 1e6, "factor": 1.0},
        "sliding_attention": {"rope_theta": 1e4},
    }


def test_the_demo_conversion_is_described(demo_source: Path, tmp_path: Path) -> None:
    done = convert(demo_source, tmp_path / "out")
    found = inspect(tmp_path / "out")
    assert_complete(found)
    assert found.parameters == done.parameters
    assert found.parameters == {
        "embedding": 256 * 48 + 48,
        "encoder": counted(tmp_path / "out", "model.encoder.layers.", "model.encoder.norm."),
        "decoder": counted(tmp_path / "out", "model.decoder."),
        "vision": counted(tmp_path / "out", "model.encoder.vision_tower."),
        "projector": counted(tmp_path / "out", "model.encoder.multi_modal_projector."),
        "total": counted(tmp_path / "out", "model."),
    }
    assert found.parameters["encoder"] == found.parameters["decoder"] == inspect(demo_source).parameters["decoder"]
    assert found.facts["encoder"]["sliding_window"] == found.facts["decoder"]["sliding_window"] == 16
    assert found.facts["vision"]["num_hidden_layers"] == 2


def test_the_json_form_is_json_and_holds_everything(demo_source: Path) -> None:
    found = inspect(demo_source)
    short = json.loads(json.dumps(found.to_json()))
    assert short["parameters"] == dict(found.parameters)
    assert short["files"] == [{"name": "model.safetensors", "bytes": found.files["model.safetensors"]}]
    assert "tensors" not in short
    long = json.loads(json.dumps(found.to_json(tensors=True)))
    assert {key: value for key, value in long.items() if key != "tensors"} == short
    assert len(long["tensors"]) == len(found.tensors)
    assert {
        "name": "language_model.model.norm.weight",
        "part": "decoder",
        "dtype": "BF16",
        "shape": [48],
        "file": "model.safetensors",
    } in long["tensors"]


def test_a_missing_and_an_unknown_source_tensor_are_described(demo_source: Path) -> None:
    name = "language_model.model.layers.3.mlp.up_proj.weight"
    before = inspect(demo_source).parameters
    edit(demo_source, lambda arrays: arrays.update({"adapter.weight": arrays.pop(name)}))
    found = inspect(demo_source)
    assert found.missing == (name,)
    assert found.unexpected == ("adapter.weight",)
    assert found.parameters["decoder"] == before["decoder"] - 96 * 48


def test_a_dropped_tensor_is_neither_counted_nor_unexpected(demo_source: Path) -> None:
    embedding = "language_model.model.embed_tokens.weight"
    before = inspect(demo_source)
    edit(demo_source, lambda arrays: arrays.update({"lm_head.weight": arrays[embedding].copy()}))
    found = inspect(demo_source)
    assert found.unexpected == ()
    assert found.parameters == before.parameters
    assert [item.part for item in found.tensors if item.name == "lm_head.weight"] == ["dropped"]
    assert found.dtypes["BF16"] == before.dtypes["BF16"] + 256 * 48


def test_a_target_with_other_names_is_described(demo_source: Path, tmp_path: Path) -> None:
    convert(demo_source, tmp_path / "out")
    before = inspect(tmp_path / "out").parameters
    tower = "model.encoder.vision_tower."

    def rename(arrays: Arrays) -> None:
        for name in [name for name in arrays if name.startswith(tower + "vision_model.")]:
            arrays[name.replace("vision_model.", "")] = arrays.pop(name)
        arrays["model.decoder.embed_tokens.weight"] = arrays["model.encoder.embed_tokens.weight"].copy()
        arrays["lm_head.out_proj.weight"] = arrays["model.encoder.embed_tokens.weight"].copy()
        arrays["optimizer.step"] = np.zeros(3, dtype=np.float32)

    edit(tmp_path / "out", rename)
    found = inspect(tmp_path / "out")
    assert found.layout == {
        "encoder": "model.encoder.",
        "vision": tower,
        "projector": "model.encoder.multi_modal_projector.",
        "decoder": "model.decoder.",
    }
    assert found.unexpected == ("optimizer.step",)
    assert not found.missing
    assert found.parameters == before
    assert found.dtypes["F32"] == 3
    assert {item.name for item in found.tensors if item.part == "tied copy"} == {
        "model.decoder.embed_tokens.weight",
        "lm_head.out_proj.weight",
    }


@pytest.mark.parametrize("model_type", ["gemma", "gemma4", None])
def test_I10_another_family_is_refused(model_type: str | None, demo_source: Path) -> None:
    (demo_source / "config.json").write_text(json.dumps({"model_type": model_type}))
    with pytest.raises(CheckpointError, match="cannot be converted"):
        inspect(demo_source)


@pytest.mark.parametrize("size", ["4b", "12b", "27b"])
def test_the_multimodal_sizes_have_their_published_totals(size: str, gemma3_map: WeightMap, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source_config = {"model_type": "gemma3", "text_config": fields(size), "vision_config": SIGLIP}
    write_synthetic_source(tmp_path / "source", gemma3_map, source_config, seed=None)
    made: Plan = plan(tmp_path / "source")
    write_hollow(tmp_path / "out", dict(made.config), [(item.name, item.shape) for item in made.tensors])
    found = inspect(tmp_path / "out")
    assert_complete(found)
    assert found.parameters == made.parameters
    assert found.parameters["total"] == TOTALS[size]
    assert found.parameters["vision"] == TOWER_PARAMETERS
    assert found.files["model.safetensors"] > 2 * TOTALS[size]

    source = inspect(tmp_path / "source")
    assert source.missing == ()
    assert source.parameters["decoder"] == made.parameters["decoder"]
    assert source.parameters["embedding"] == 262208 * SIZES[size][1]


@pytest.mark.parametrize("size", SIZES)
def test_a_release_of_any_size_has_its_published_total(size: str, tmp_path: Path) -> None:
    stack = {
        **fields(size),
        "vocab_size": 262144,
        "sliding_window": 512,
        "layer_types": ["full_attention"] * SIZES[size][0],
        "rope_parameters": {"full_attention": {"rope_theta": 1e6}},
    }
    config = {
        "model_type": "t5gemma2",
        "encoder": {"text_config": stack, "vision_config": SIGLIP},
        "decoder": stack,
    }
    implied = expected_tensors(config, tmp_path / "config.json")
    write_hollow(tmp_path / "out", config, [(item.name, item.shape) for item in implied])
    found = inspect(tmp_path / "out")
    assert_complete(found)
    assert found.parameters["total"] == TOTALS[size]
    assert found.parameters["encoder"] == found.parameters["decoder"]
    assert found.parameters["vision"] == TOWER_PARAMETERS


@pytest.mark.parametrize("size", ["270m", "1b"])
def test_a_text_only_conversion_has_both_stacks_and_a_stub(size: str, gemma3_map: WeightMap, tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    source_config = {"model_type": "gemma3_text", "vocab_size": 262144, **fields(size)}
    write_synthetic_source(tmp_path / "source", gemma3_map, source_config, seed=None)
    made: Plan = plan(tmp_path / "source")
    write_hollow(tmp_path / "out", dict(made.config), [(item.name, item.shape) for item in made.tensors])
    found = inspect(tmp_path / "out")
    assert_complete(found)
    hidden = SIZES[size][1]
    stub = 16 * 3 * 14 * 14 + 16 + 4 * 16 + 16 + 16
    published_projector = 1152 * hidden + 1152
    assert found.parameters["vision"] == stub
    assert found.parameters["projector"] == 16 * hidden + 16
    assert found.parameters["total"] == (
        TOTALS[size] - TOWER_PARAMETERS - published_projector + stub + 16 * hidden + 16
    )
    source = inspect(tmp_path / "source")
    assert source.layout == {"text": "model."}
    assert source.parameters["total"] == found.parameters["decoder"] + 262144 * hidden
