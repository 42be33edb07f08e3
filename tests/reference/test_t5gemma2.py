"""The equalities between the references: a decoder without memory and a causal encoder equal Gemma 3."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import T5Gemma2ForConditionalGeneration

from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.errors import CheckpointError
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from tests.conftest import TwinFolder
from tests.reference.models import difference, loaded, padded_batch, pixels, with_images

DTYPES = [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_decoder_without_memory_equals_gemma_3_at_any_length(
    dtype: torch.dtype, twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    gemma = Gemma3Reference(open_checkpoint(twin_folder("text-8")), dtype=dtype, resident=True)
    model = T5Gemma2Reference(open_checkpoint(converted_twin("text-8")), dtype=dtype, resident=True)
    ids = padded_batch(40, seed=1, eoi=None).ids
    memory = model.encode(ids[:, :9], torch.ones_like(ids[:, :9]).bool())
    hidden = torch.zeros(3, 9, dtype=torch.bool)
    for length in (1, 2, 7, 8, 15, 23, 40):
        kept = torch.ones_like(ids[:, :length]).bool()
        kept[1, : length // 3] = False
        found = model.decoder.logits(model.decode(ids[:, :length], kept, memory, hidden))
        assert torch.equal(found[kept], gemma.logits(ids[:, :length], kept)[kept]), f"{length} tokens"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_encoder_under_causal_masks_is_gemma_3_exactly(
    dtype: torch.dtype, twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    gemma = Gemma3Reference(open_checkpoint(twin_folder("images-8")), dtype=dtype)
    model = T5Gemma2Reference(open_checkpoint(converted_twin("images-8")), dtype=dtype)
    assert gemma.vision is not None
    assert model.vision is not None
    batch, count = with_images(padded_batch(23, seed=2, eoi=None), gemma.vision.tokens.image_token_index)
    features = gemma.vision.features(pixels(count, dtype))
    assert torch.equal(features, model.vision.features(pixels(count, dtype)))
    theirs = gemma.start(batch.ids, batch.kept, features)
    states = theirs.through(gemma.text)
    assert torch.equal(model.start_encoder(batch.ids, theirs.masks, features).through(model.encoder), states)
    assert not torch.equal(model.encode(batch.ids, batch.kept, features), states)


def as_module_names(name: str) -> str:
    """Return a tensor's name in the modules of transformers."""
    if name.startswith(("model.encoder.embed_tokens", "model.encoder.layers", "model.encoder.norm")):
        return name.replace("model.encoder.", "model.encoder.text_model.")
    return name.replace("vision_tower.vision_model.", "vision_tower.")


def test_names_of_the_modules_are_read_as_well(converted_twin: TwinFolder, tmp_path: Path) -> None:
    source = converted_twin("images-8")
    tensors = load_file(source / "model.safetensors")
    renamed = {as_module_names(name): tensor for name, tensor in tensors.items()}
    assert len(renamed.keys() - tensors.keys()) > 100
    for name in ("model.decoder.embed_tokens.weight", "lm_head.out_proj.weight"):
        renamed[name] = tensors["model.encoder.embed_tokens.weight"].clone()
    shutil.copy(source / "config.json", tmp_path)
    save_file(renamed, tmp_path / "model.safetensors")
    batch, images = padded_batch(15, seed=3), pixels(2, torch.bfloat16)
    published, modules = (T5Gemma2Reference(open_checkpoint(path)) for path in (source, tmp_path))
    memory = published.encode(batch.ids, batch.kept)
    assert torch.equal(modules.encode(batch.ids, batch.kept), memory)
    assert torch.equal(
        modules.decode(batch.ids, batch.kept, memory, batch.kept),
        published.decode(batch.ids, batch.kept, memory, batch.kept),
    )
    assert published.vision is not None
    assert modules.vision is not None
    assert torch.equal(modules.vision.features(images), published.vision.features(images))


def test_the_stub_of_a_text_only_model_is_not_a_vision_tower(converted_twin: TwinFolder) -> None:
    assert T5Gemma2Reference(open_checkpoint(converted_twin("text-8"))).vision is None


def test_settings_may_be_given_in_place_of_the_configs(converted_twin: TwinFolder) -> None:
    checkpoint, other = (open_checkpoint(converted_twin(name)) for name in ("images-8", "images-sharded"))
    model = T5Gemma2Reference(checkpoint, model=T5Gemma2Reference(other).model)
    assert (model.encoder.settings.sliding_window, model.decoder.settings.sliding_window) == (7, 7)
    assert T5Gemma2Reference(checkpoint).decoder.settings.sliding_window == 5


@pytest.mark.parametrize(
    ("make", "name", "expected"),
    [
        (T5Gemma2Reference, "text-8", "is not T5Gemma 2"),
        (Gemma3Reference, "converted", "is not Gemma 3"),
    ],
)
def test_another_model_is_refused(
    make: Callable[..., object], name: str, expected: str, twin_folder: TwinFolder, converted_twin: TwinFolder
) -> None:
    folder = converted_twin("text-8") if name == "converted" else twin_folder(name)
    with pytest.raises(CheckpointError, match=expected):
        make(open_checkpoint(folder))


@pytest.mark.parametrize("field", ["eoi_token_index", "image_token_index"])
@torch.no_grad()
def test_special_tokens_equal_those_of_transformers(field: str, converted_twin: TwinFolder, tmp_path: Path) -> None:
    """If the config has a token twice, transformers uses the encoder's end-of-image and the outer image token."""
    shutil.copytree(converted_twin("images-8"), tmp_path / "edited")
    config = json.loads((tmp_path / "edited/config.json").read_text())
    config[field] = 295
    (tmp_path / "edited/config.json").write_text(json.dumps(config))
    theirs = loaded(T5Gemma2ForConditionalGeneration, tmp_path / "edited")
    model = T5Gemma2Reference(open_checkpoint(tmp_path / "edited"), dtype=torch.float32)
    batch, count = with_images(padded_batch(17, seed=4), theirs.model.encoder.config.image_token_id)
    images = pixels(count, torch.float32)
    expected = theirs.model.encoder(
        input_ids=batch.ids, attention_mask=batch.mask, pixel_values=images
    ).last_hidden_state
    found = model.encode(batch.ids, batch.kept, theirs.get_image_features(images).pooler_output)
    assert difference(found[batch.kept], expected[batch.kept]) <= 1e-5
