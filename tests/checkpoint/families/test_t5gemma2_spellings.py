"""Every spelling of T5Gemma 2's names is read as the published one."""

import json
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from t5g2convert import convert
from t5g2convert.checkpoint.families.t5gemma2_spellings import HEADS, ROOTS, as_published, published_name
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.inspection import inspect
from t5g2convert.mapping.library import find_map

TABLE = "model.encoder.embed_tokens.weight"


@pytest.fixture
def folder(demo_source: Path, tmp_path: Path) -> Path:
    convert(demo_source, tmp_path / "out")
    return tmp_path / "out"


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("model.encoder.layers.0.mlp.up_proj.weight", "model.encoder.layers.0.mlp.up_proj.weight"),
        ("model.encoder.text_model.norm.weight", "model.encoder.norm.weight"),
        ("encoder.embed_tokens.eoi_embedding", "model.encoder.embed_tokens.eoi_embedding"),
        ("encoder.text_model.norm.weight", "model.encoder.norm.weight"),
        ("encoder.vision_tower.encoder.layers.1.mlp.fc1.bias",
         "model.encoder.vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"),
        ("model.encoder.vision_tower.vision_model.post_layernorm.bias",
         "model.encoder.vision_tower.vision_model.post_layernorm.bias"),
        ("encoder.multi_modal_projector.mm_soft_emb_norm.weight",
         "model.encoder.multi_modal_projector.mm_soft_emb_norm.weight"),
        ("decoder.norm.weight", "model.decoder.norm.weight"),
        ("optimizer.step", "optimizer.step"),
    ],
)  # fmt: skip
def test_a_name_is_read_as_the_published_one(name: str, published: str) -> None:
    assert published_name(name) == published


@pytest.mark.parametrize(
    ("name", "published"),
    [
        ("text_model.layers.0.mlp.up_proj.weight", "layers.0.mlp.up_proj.weight"),
        ("norm.weight", "norm.weight"),
        ("vision_tower.post_layernorm.bias", "vision_tower.vision_model.post_layernorm.bias"),
    ],
)
def test_so_is_one_of_the_encoder_alone(name: str, published: str) -> None:
    assert published_name(name, alone=True) == published


@pytest.mark.parametrize("part", ["encoder", "decoder"])
def test_the_maps_that_take_a_part_out_know_the_same_spellings_and_heads(part: str) -> None:
    found = find_map(f"t5gemma2-{part}").map
    assert {root: tuple(spellings) for root, spellings in found.roots.items()} == ROOTS
    assert {name for drop in found.drop for name in drop.patterns} >= set(HEADS)


def test_a_raw_state_dict_of_the_inner_model_with_a_head_is_whole(folder: Path) -> None:
    arrays = load_file(folder / "model.safetensors")
    names = {
        name: name.removeprefix("model.")
        .replace("encoder.layers", "encoder.text_model.layers")
        .replace("encoder.norm", "encoder.text_model.norm")
        .replace("encoder.embed_tokens", "encoder.text_model.embed_tokens")
        .replace("vision_model.encoder.text_model.", "encoder.")
        .replace("vision_model.", "")
        for name in arrays
    }
    respelled = {names[name]: array for name, array in arrays.items()}
    respelled["decoder.embed_tokens.weight"] = respelled["lm_head.out_proj.weight"] = arrays[TABLE]
    respelled["score.out_proj.weight"] = arrays["model.encoder.norm.weight"]
    save_file(respelled, folder / "model.safetensors", {"format": "pt"})
    found = as_published(open_checkpoint(folder))
    assert found.spelled == names
    assert set(found.copies.values()) == {TABLE}
    assert (found.heads, found.unexpected) == (("score.out_proj.weight",), ())
    inspected = inspect(folder)
    assert not inspected.missing
    assert not inspected.unexpected
    assert inspected.layout["encoder"] == "encoder.text_model."
    parts = {item.name: item.part for item in inspected.tensors}
    assert parts["score.out_proj.weight"] == "head"
    assert parts["lm_head.out_proj.weight"] == "tied copy"


def test_a_tensor_in_two_spellings_is_refused(folder: Path) -> None:
    arrays = load_file(folder / "model.safetensors")
    arrays["model.encoder.text_model.norm.weight"] = arrays["model.encoder.norm.weight"]
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=r"1 tensor\(s\) under two names each: .*text_model\.norm"):
        as_published(open_checkpoint(folder))


def test_an_unknown_name_is_unexpected(folder: Path) -> None:
    arrays = load_file(folder / "model.safetensors")
    arrays["model.encoder.layers.99.mlp.up_proj.weight"] = arrays["model.encoder.norm.weight"]
    save_file(arrays, folder / "model.safetensors", {"format": "pt"})
    assert as_published(open_checkpoint(folder)).unexpected == ("model.encoder.layers.99.mlp.up_proj.weight",)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "t5gemma2"
