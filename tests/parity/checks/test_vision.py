import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.parity.batches import pixels
from t5g2convert.parity.checks.vision import judge_vision
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.vision import VisionTower
from tests.conftest import TwinFolder

TOWER = "model.encoder.vision_tower.vision_model."
STAGES = ["embeddings", *(f"encoder.layers.{layer}" for layer in range(3)), "post_layernorm", "multi_modal_projector"]


def tower_of(kind: type[Gemma3Reference] | type[T5Gemma2Reference], folder: Path, dtype: torch.dtype) -> VisionTower:
    tower = kind(open_checkpoint(folder), dtype=dtype).vision
    assert tower is not None
    return tower


def silent(_: str) -> None:
    pass


@pytest.fixture
def changed(converted_twin: TwinFolder, tmp_path: Path) -> Callable[..., VisionTower]:
    """Return the converted tower of images-float32 with one tensor changed."""

    def make(name: str, value: float = 0.5) -> VisionTower:
        shutil.copytree(converted_twin("images-float32"), tmp_path / name)
        tensors = load_file(tmp_path / name / "model.safetensors")
        tensors[name] += value
        save_file(tensors, tmp_path / name / "model.safetensors")
        return tower_of(T5Gemma2Reference, tmp_path / name, torch.float32)

    return make


@pytest.fixture(scope="module")
def source(twin_folder: TwinFolder) -> VisionTower:
    return tower_of(Gemma3Reference, twin_folder("images-float32"), torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["images-8", "images-float32", "images-with-head"])
def test_the_same_tower_gives_the_same_features(
    name: str, dtype: torch.dtype, twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    ours = tower_of(Gemma3Reference, twin_folder(name), dtype)
    theirs = tower_of(T5Gemma2Reference, converted_twin(name), dtype)
    progress: list[str] = []
    images = pixels(ours, 2, dtype)
    check, features = judge_vision(ours, theirs, images, tolerance=0, progress=progress.append)
    assert (check.name, check.passed) == ("vision_parity", True)
    assert check.figures is not None
    assert (check.figures.max_abs, check.figures.departs) == (0.0, None)
    assert check.figures.compared == features.numel() == 2 * 4 * 24
    assert [drift.layer for drift in check.figures.drifts] == STAGES
    assert all(drift.max_abs == 0 for drift in check.figures.drifts)
    assert torch.equal(features, ours.features(images))
    assert len(progress) == len(STAGES)


@pytest.mark.parametrize(
    ("tensor", "stage", "module"),
    [
        (f"{TOWER}embeddings.position_embedding.weight", 0, ""),
        (f"{TOWER}embeddings.patch_embedding.bias", 0, "patch_embedding"),
        (f"{TOWER}encoder.layers.1.self_attn.k_proj.weight", 2, "self_attn.k_proj"),
        (f"{TOWER}encoder.layers.2.layer_norm2.bias", 3, "layer_norm2"),
        (f"{TOWER}encoder.layers.0.mlp.fc2.bias", 1, "mlp.fc2"),
        (f"{TOWER}post_layernorm.weight", 4, ""),
        ("model.encoder.multi_modal_projector.mm_input_projection_weight", 5, ""),
        ("model.encoder.multi_modal_projector.mm_soft_emb_norm.weight", 5, "mm_soft_emb_norm"),
    ],
)
def test_the_first_stage_that_differs_is_named(
    tensor: str, stage: int, module: str, source: VisionTower, changed: Callable[..., VisionTower]
) -> None:
    check, features = judge_vision(
        source, changed(tensor), pixels(source, 1, torch.float32), tolerance=0, progress=silent
    )
    assert not check.passed
    assert check.figures is not None
    assert check.figures.departs is not None
    assert check.figures.departs.startswith(STAGES[stage])
    assert module in check.figures.departs
    assert check.figures.departs in check.detail
    assert [drift.max_abs > 0 for drift in check.figures.drifts] == [number >= stage for number in range(len(STAGES))]
    assert torch.equal(features, source.features(pixels(source, 1, torch.float32)))


@pytest.mark.parametrize("tensor", ["embeddings.position_embedding.weight", "post_layernorm.weight"])
def test_a_stage_without_attention_has_its_own_message(
    tensor: str, source: VisionTower, changed: Callable[..., VisionTower]
) -> None:
    images = pixels(source, 1, torch.float32)
    check, _ = judge_vision(source, changed(TOWER + tensor), images, tolerance=0, progress=silent)
    assert check.figures is not None
    assert check.figures.departs is not None
    assert "attention" not in check.figures.departs
    assert check.figures.departs == check.figures.departs.strip(", ")


def test_a_tolerance_lets_a_small_difference_pass(source: VisionTower, changed: Callable[..., VisionTower]) -> None:
    tower = changed(f"{TOWER}encoder.layers.1.self_attn.k_proj.weight", 1e-6)
    images = pixels(source, 1, torch.float32)
    strict, _ = judge_vision(source, tower, images, tolerance=0, progress=silent)
    lenient, _ = judge_vision(source, tower, images, tolerance=1e-3, progress=silent)
    assert not strict.passed
    assert lenient.passed
    assert lenient.figures == strict.figures
    assert lenient.figures is not None
    assert 0 < lenient.figures.relative < 1e-3


def test_towers_of_different_depth_are_not_compared(
    source: VisionTower, converted_twin: TwinFolder, tmp_path: Path
) -> None:
    shutil.copytree(converted_twin("images-float32"), tmp_path / "out")
    text = (tmp_path / "out/config.json").read_text()
    (tmp_path / "out/config.json").write_text(text.replace('"num_hidden_layers": 3', '"num_hidden_layers": 2'))
    tower = tower_of(T5Gemma2Reference, tmp_path / "out", torch.float32)
    images = pixels(source, 1, torch.float32)
    check, features = judge_vision(source, tower, images, tolerance=0.9, progress=silent)
    assert not check.passed
    assert "3 layers" in check.detail
    assert check.figures is None
    assert torch.equal(features, source.features(images))
