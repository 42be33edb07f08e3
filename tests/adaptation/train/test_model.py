from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import nn
from transformers import T5Gemma2ForConditionalGeneration

from t5g2convert.adaptation.train.model import (
    build_model,
    compile_layers,
    freeze,
    load_model,
    names_on_disk,
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


@pytest.mark.parametrize("twin", ["images-8", "text-13"])
def test_the_model_is_the_one_that_transformers_loads(twin: str, converted_twin: TwinFolder) -> None:
    checkpoint = open_checkpoint(converted_twin(twin))
    ours = load_model(checkpoint)
    theirs = T5Gemma2ForConditionalGeneration.from_pretrained(checkpoint.path, dtype=torch.float32)
    for kind in ("named_parameters", "named_buffers"):
        found, expected = (dict(getattr(model, kind)(remove_duplicate=False)) for model in (ours, theirs))
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            assert found[name].dtype == tensor.dtype, name
            assert torch.equal(found[name], tensor), name
    names = names_on_disk(ours, checkpoint)
    assert sorted(names.values()) == sorted(checkpoint.tensors)
    assert names["model.encoder.text_model.layers.0.mlp.up_proj.weight"] == "model.encoder.layers.0.mlp.up_proj.weight"


def test_a_model_is_built_without_memory_for_its_parameters(checkpoint: Checkpoint) -> None:
    model = build_model(checkpoint.path, checkpoint.config)
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    head = model.get_parameter("lm_head.out_proj.weight")
    assert head is model.get_parameter("model.encoder.text_model.embed_tokens.weight")
    assert not nn.Linear(2, 2).weight.is_meta


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
    model, shapes = build_model(checkpoint.path, checkpoint.config), shapes_of(checkpoint)
    damage(shapes)
    with pytest.raises(CheckpointError, match="do not match the parameters"):
        published_names(model, shapes, checkpoint.path)


@pytest.mark.parametrize("images", [False, True])
def test_the_tower_is_frozen_and_the_projector_without_images(images: bool, checkpoint: Checkpoint) -> None:
    model = build_model(checkpoint.path, checkpoint.config)
    names = published_names(model, shapes_of(checkpoint), checkpoint.path)
    freeze(model, names, parts_of(checkpoint), images=images)
    frozen = {names[name] for name, parameter in model.named_parameters() if not parameter.requires_grad}
    fixed = "model.encoder.vision_tower.", *(() if images else ("model.encoder.multi_modal_projector.",))
    assert frozen == {name for name in checkpoint.tensors if name.startswith(fixed)}
    assert len(frozen) > 2


def test_another_kind_of_model_is_refused(twin_folder: TwinFolder) -> None:
    checkpoint = open_checkpoint(twin_folder("images-8"))
    with pytest.raises(CheckpointError, match="cannot be trained: expected a T5Gemma 2 checkpoint"):
        build_model(checkpoint.path, checkpoint.config)


def test_a_model_without_recomputation_is_refused() -> None:
    with pytest.raises(UsageError, match="--recompute none"):
        recompute_activations(nn.Linear(2, 2), "full")


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
@pytest.mark.parametrize("recompute", [None, "selective", "full"])
def test_compiled_layers_compute_the_same(
    recompute: Literal["selective", "full"] | None, checkpoint: Checkpoint
) -> None:
    ids = torch.randint(4, 250, (2, 23), generator=torch.Generator().manual_seed(0))
    found, compiled = [], []
    for backend in (None, "aot_eager"):
        model: Any = load_model(checkpoint)
        if recompute is not None:
            recompute_activations(model, recompute)
        if backend is not None:
            compile_layers(model, backend=backend)
            compiled = [part for part in model.modules() if part._compiled_call_impl is not None]
        model.train()
        model(input_ids=ids, decoder_input_ids=ids, labels=ids).loss.backward()
        found.append({name: each.grad for name, each in model.named_parameters() if each.grad is not None})
    # Eight layers of each stack, and three of the tower.
    assert len(compiled) == 8 + 8 + 3
    plain, ours = found
    assert plain.keys() == ours.keys()
    for name, gradient in plain.items():
        assert torch.allclose(ours[name], gradient, rtol=1e-4, atol=1e-6), name
