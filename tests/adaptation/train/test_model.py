from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from t5g2convert.adaptation.train.model import (
    compare_values,
    freeze,
    load_model,
    parts_of,
    published_names,
    recompute_activations,
)
from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint
from t5g2convert.errors import CheckpointError, UsageError
from tests.conftest import TwinFolder

Shapes = dict[str, tuple[int, ...]]


@pytest.fixture
def checkpoint(converted_twin: TwinFolder) -> Checkpoint:
    return open_checkpoint(converted_twin("images-8"))


def shapes_of(checkpoint: Checkpoint) -> Shapes:
    return {name: tensor.entry.shape for name, tensor in checkpoint.tensors.items()}


def test_every_parameter_has_one_tensor_of_its_shape_and_values(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint.path, checkpoint.config)
    names = published_names(model, shapes_of(checkpoint), checkpoint.path)
    assert sorted(names.values()) == sorted(checkpoint.tensors)
    assert names["model.encoder.text_model.layers.0.mlp.up_proj.weight"] == "model.encoder.layers.0.mlp.up_proj.weight"
    compare_values(model, names, checkpoint)


def test_older_and_newer_module_names_map_to_the_same_tensors() -> None:
    shapes: Shapes = {
        "model.encoder.norm.weight": (3,),
        "model.encoder.vision_tower.vision_model.post_layernorm.weight": (3,),
    }
    for encoder in ("", "text_model."):
        for tower in ("", "vision_model."):
            model = nn.Module()
            module = model
            for part in ("model", "encoder"):
                module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            for path in (f"{encoder}norm", f"vision_tower.{tower}post_layernorm"):
                inner = module
                for part in path.split("."):
                    if part not in dict(inner.named_children()):
                        inner.add_module(part, nn.Module())
                    inner = inner.get_submodule(part)
                inner.register_parameter("weight", nn.Parameter(torch.zeros(3)))
            assert sorted(published_names(model, shapes, Path()).values()) == sorted(shapes)


def _without_one(shapes: Shapes) -> None:
    del shapes["model.decoder.layers.3.mlp.up_proj.weight"]


def _with_another(shapes: Shapes) -> None:
    shapes["model.decoder.layers.8.mlp.up_proj.weight"] = (40, 24)


def _of_another_shape(shapes: Shapes) -> None:
    shapes["model.decoder.norm.weight"] = (25,)


def _with_both_spellings(shapes: Shapes) -> None:
    shapes["model.encoder.text_model.norm.weight"] = (24,)


@pytest.mark.parametrize("damage", [_without_one, _with_another, _of_another_shape, _with_both_spellings])
def test_a_mapping_that_is_not_one_to_one_is_refused(damage: Callable[[Shapes], None], checkpoint: Checkpoint) -> None:
    model, shapes = load_model(checkpoint.path, checkpoint.config), shapes_of(checkpoint)
    damage(shapes)
    with pytest.raises(CheckpointError, match="do not match the parameters"):
        published_names(model, shapes, checkpoint.path)


def test_swapped_names_of_equal_shapes_are_found_by_their_values(checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint.path, checkpoint.config)
    names = published_names(model, shapes_of(checkpoint), checkpoint.path)
    one, other = (f"model.decoder.layers.{layer}.mlp.up_proj.weight" for layer in (2, 5))
    names[one], names[other] = names[other], names[one]
    with pytest.raises(CheckpointError, match="other values were loaded") as raised:
        compare_values(model, names, checkpoint)
    assert len(raised.value.details) == 2


@pytest.mark.parametrize("images", [False, True])
def test_the_tower_is_frozen_and_the_projector_without_images(images: bool, checkpoint: Checkpoint) -> None:
    model = load_model(checkpoint.path, checkpoint.config)
    names = published_names(model, shapes_of(checkpoint), checkpoint.path)
    freeze(model, names, parts_of(checkpoint), images=images)
    frozen = {names[name] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    fixed = "model.encoder.vision_tower.", *(() if images else ("model.encoder.multi_modal_projector.",))
    assert frozen == {name for name in checkpoint.tensors if name.startswith(fixed)}
    assert len(frozen) > 2


def test_another_kind_of_model_is_refused(twin_folder: TwinFolder) -> None:
    checkpoint = open_checkpoint(twin_folder("images-8"))
    with pytest.raises(CheckpointError, match="cannot be trained: expected a T5Gemma 2 checkpoint"):
        load_model(checkpoint.path, checkpoint.config)


def test_a_model_without_gradient_checkpointing_is_refused() -> None:
    with pytest.raises(UsageError, match="--no-gradient-checkpointing"):
        recompute_activations(nn.Linear(2, 2))
