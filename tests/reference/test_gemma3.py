import json
import shutil
from pathlib import Path

import pytest
import torch

from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.errors import CheckpointError
from t5g2convert.reference.gemma3 import Gemma3Reference
from tests.conftest import TwinFolder
from tests.models.twins import DIALECTS, IMAGE_SPELLINGS, TEXT_SPELLINGS, respell, rewrite_config
from tests.reference.models import IMAGE, padded_batch, pixels, with_images


def logits(folder: Path) -> torch.Tensor:
    """Return logits, with an image in the input if there is a vision tower."""
    model, batch = Gemma3Reference(open_checkpoint(folder)), padded_batch(23, seed=1)
    if model.vision is None:
        return model.logits(batch.ids, batch.kept)
    batch, count = with_images(batch, IMAGE)
    return model.logits(batch.ids, batch.kept, model.vision.features(pixels(count, torch.bfloat16)))


@pytest.mark.parametrize(
    ("twin", "spelling"),
    [("images-8", name) for name in IMAGE_SPELLINGS] + [("text-8", name) for name in TEXT_SPELLINGS],
)
def test_every_spelling_computes_the_same(twin: str, spelling: str, twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = twin_folder(twin)
    respell(source, tmp_path / "respelled", (IMAGE_SPELLINGS | TEXT_SPELLINGS)[spelling])
    assert torch.equal(logits(tmp_path / "respelled"), logits(source))


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", ["text-13", "images-13"])
def test_every_config_dialect_computes_the_same(
    name: str, dialect: str, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source = twin_folder(name)
    rewrite_config(source, tmp_path / "rewritten", DIALECTS[dialect])
    assert torch.equal(logits(tmp_path / "rewritten"), logits(source))


def test_an_image_changes_only_the_tokens_after_it(twin_folder: TwinFolder) -> None:
    model = Gemma3Reference(open_checkpoint(twin_folder("images-8")))
    assert model.vision is not None
    ids = padded_batch(20, seed=2).ids
    ids[:, 8:12] = IMAGE
    kept, features = torch.ones_like(ids).bool(), model.vision.features(pixels(3, torch.bfloat16))
    one, other = (model.logits(ids, kept, sign * features) for sign in (1, -1))
    assert torch.equal(one[:, :8], other[:, :8])
    changed = (one != other).any(-1)
    assert changed[:, 8:].all()


def test_too_few_images_are_refused(twin_folder: TwinFolder) -> None:
    model = Gemma3Reference(open_checkpoint(twin_folder("images-8")))
    assert model.vision is not None
    batch, count = with_images(padded_batch(23, seed=1), IMAGE)
    features = model.vision.features(pixels(count - 1, torch.bfloat16))
    with pytest.raises(CheckpointError, match=f"has {4 * count} image tokens, but the images need {4 * count - 4}"):
        model.logits(batch.ids, batch.kept, features)


def test_a_vision_tower_with_width_not_divisible_by_heads_is_refused(twin_folder: TwinFolder, tmp_path: Path) -> None:
    shutil.copytree(twin_folder("images-8"), tmp_path / "edited")
    config = json.loads((tmp_path / "edited/config.json").read_text())
    config["vision_config"]["num_attention_heads"] = 7
    (tmp_path / "edited/config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="vision hidden_size 20 is not a multiple of num_attention_heads 7"):
        logits(tmp_path / "edited")
