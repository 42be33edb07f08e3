"""Estimated operations and memory of training, compared with torch's own counts."""

import json
import weakref
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode
from transformers import SiglipVisionConfig, SiglipVisionModel, T5Gemma2ForConditionalGeneration

from t5g2convert import inspect
from t5g2convert.adaptation.train.cost import Memory, memory, operations
from t5g2convert.adaptation.train.loss import ModelWithLoss
from t5g2convert.adaptation.train.model import recompute_activations
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2, read_t5gemma2
from tests.conftest import TwinFolder


class Live(TorchDispatchMode):
    """Counts the bytes that operations keep alive, parameters and their views excepted."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        super().__init__()
        self.now = self.most = 0
        self._known = {each.untyped_storage()._cdata for each in parameters}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for each in tree_leaves(made):
            if isinstance(each, torch.Tensor) and (key := each.untyped_storage()._cdata) not in self._known:
                self._known.add(key)
                self.now += (size := each.untyped_storage().nbytes())
                self.most = max(self.most, self.now)
                weakref.finalize(each.untyped_storage(), self._freed, key, size)
        return made

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize(("hidden", "inner", "patch", "size"), [(64, 172, 4, 64), (1152, 4304, 14, 224)])
def test_the_memory_of_an_image_is_what_the_frozen_tower_holds(
    converted_twin: TwinFolder, hidden: int, inner: int, patch: int, size: int
) -> None:
    sizes = {"hidden_size": hidden, "intermediate_size": inner, "patch_size": patch, "image_size": size}
    model = shapes(converted_twin("images-8"))
    model = replace(model, vision=model.vision.model_copy(update=sizes))
    config = SiglipVisionConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, vision_use_head=False)
    tower = SiglipVisionModel(config).bfloat16().requires_grad_(False)
    pixels = torch.zeros(3, 3, size, size)
    with Live(tower.parameters()) as live:
        tower(pixel_values=pixels.bfloat16())
    parts = dict.fromkeys(("embedding", "encoder", "decoder", "vision", "projector", "total"), 1)
    found = memory(model, parts, devices=1, encoder=1, decoder=1, chunk=1, images=3).images
    assert found == pytest.approx(live.most + pixels.nbytes, rel=0.15)


ENCODER, DECODER, SAMPLES = 23, 11, 2


def shapes(folder: Path) -> T5Gemma2:
    path = folder / "config.json"
    return read_t5gemma2(json.loads(path.read_text()), path)


def counted(folder: Path, images: int, *, training: bool) -> int:
    """Return torch's count for a pass over two samples, including the softmax."""
    model: Any = T5Gemma2ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )
    model.model.encoder.vision_tower.requires_grad_(False)
    if training:
        recompute_activations(model, "full")
    module = ModelWithLoss(model, tasks=1, softcap=None, chunk=3).train(training)
    ids = torch.arange(3, 3 + ENCODER).repeat(SAMPLES, 1)
    ids[:, : images * model.config.encoder.mm_tokens_per_image] = model.config.image_token_index
    labels = torch.full((SAMPLES, DECODER), 5)
    size = model.config.encoder.vision_config.image_size
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "decoder_input_ids": labels,
        "decoder_attention_mask": torch.ones_like(labels),
        "labels": labels,
        "tasks": torch.zeros(SAMPLES, dtype=torch.int64),
        **({"pixel_values": torch.zeros(SAMPLES * images, 3, size, size)} if images else {}),
    }
    with FlopCounterMode(display=False) as counter, torch.set_grad_enabled(training):
        loss, _, _ = module(batch)
        if training:
            loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(("twin", "images"), [("text-13", 0), ("images-8", 0), ("images-8", 1), ("images-8", 2)])
def test_operations_of_a_pass_equal_those_that_torch_counts(converted_twin: TwinFolder, twin: str, images: int) -> None:
    folder = converted_twin(twin)
    ours = operations(shapes(folder), encoder=ENCODER, decoder=DECODER, images=images)
    forward = ours.encoder + ours.decoder + ours.softmax + ours.vision + ours.projector
    # torch also counts the angles of the rotation, a few elements each.
    assert counted(folder, images, training=False) == pytest.approx(SAMPLES * forward, rel=2e-3)


def test_operations_of_training_equal_those_that_torch_counts(converted_twin: TwinFolder) -> None:
    folder = converted_twin("images-8")
    ours = operations(shapes(folder), encoder=ENCODER, decoder=DECODER, images=1)
    # torch does not count products that are added in place, as those of the table's gradient.
    expected = ours.training - ours.softmax
    assert counted(folder, 1, training=True) == pytest.approx(SAMPLES * expected, rel=2e-3)


def test_memory_is_divided_among_the_devices(converted_twin: TwinFolder) -> None:
    folder = converted_twin("images-8")
    parameters, model = inspect(folder).parameters, shapes(folder)
    one, four = (memory(model, parameters, devices=n, encoder=14, decoder=10, chunk=8) for n in (1, 4))
    trained = parameters["total"] - parameters["vision"]
    assert one.states == 16 * trained + 4 * parameters["vision"]
    assert four == Memory(one.states // 4, one.gathered, one.inputs, one.softmax)
    assert one.inputs == 2 * 2 * 24 * 8 * (7 + 5)
    assert one.softmax == 8 * 8 * model.decoder.vocab_size
    assert one.gathered == 8 * (parameters["embedding"] + 2 * (parameters["encoder"] // 8))
    assert one.total == one.states + one.gathered + one.inputs + one.softmax


def test_summing_gradients_once_a_step_keeps_the_whole_gradient(converted_twin: TwinFolder) -> None:
    folder = converted_twin("images-8")
    parameters, model = inspect(folder).parameters, shapes(folder)
    trained = parameters["total"] - parameters["vision"]
    for devices, rest in ((1, 0), (4, 3 * trained)):
        kept = memory(model, parameters, devices=devices, encoder=14, decoder=10, chunk=8, reduces_once=True)
        plain = memory(model, parameters, devices=devices, encoder=14, decoder=10, chunk=8)
        assert kept.gradient == rest
        assert kept.total == plain.total + rest
