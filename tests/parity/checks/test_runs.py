import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.parity.checks.runs import judge_runs
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from tests.conftest import TwinFolder
from tests.models.twins import TWINS


def opened(folder: Path, dtype: torch.dtype = torch.float32) -> T5Gemma2Reference:
    return T5Gemma2Reference(open_checkpoint(folder), dtype=dtype)


def silent(_: str) -> None:
    pass


def without_effect(folder: Path, target: Path, ending: str, value: float = 0.0) -> T5Gemma2Reference:
    """Copy a converted folder and set all tensors with this name ending to `value`."""
    shutil.copytree(folder, target)
    tensors = load_file(target / "model.safetensors")
    chosen = [name for name in tensors if name.endswith(ending)]
    assert chosen
    for name in chosen:
        tensors[name] = torch.full_like(tensors[name], value)
    save_file(tensors, target / "model.safetensors")
    return opened(target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["text-8", "images-13", "images-with-fill"])
def test_a_conversion_depends_on_its_encoder(name: str, dtype: torch.dtype, converted_twin: TwinFolder) -> None:
    progress: list[str] = []
    check = judge_runs(opened(converted_twin(name), dtype), progress=progress.append)
    assert (check.name, check.passed) == ("runs", True)
    assert ("image" in check.detail) == name.startswith("images")
    assert "text" in check.detail
    assert progress


def test_there_are_twins_of_both_kinds() -> None:
    assert {twin.vision is None for twin in TWINS} == {True, False}


@pytest.mark.parametrize("name", ["text-float32", "images-float32"])
def test_a_decoder_that_ignores_the_encoder_fails(name: str, converted_twin: TwinFolder, tmp_path: Path) -> None:
    # Attention adds nothing: the decoder sees only its own tokens.
    target = without_effect(converted_twin(name), tmp_path / "out", "decoder.norm.weight", -1.0)
    check = judge_runs(target, progress=silent)
    assert not check.passed
    assert "do not depend" in check.detail
    assert "text" in check.detail


def test_an_encoder_that_ignores_images_fails_only_for_images(converted_twin: TwinFolder, tmp_path: Path) -> None:
    target = without_effect(converted_twin("images-float32"), tmp_path / "out", "mm_input_projection_weight")
    check = judge_runs(target, progress=silent)
    assert not check.passed
    assert "image" in check.detail
    assert "text" not in check.detail


@pytest.mark.parametrize("where", ["encoder.norm.weight", "decoder.norm.weight", "embed_tokens.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_fail(where: str, value: float, converted_twin: TwinFolder, tmp_path: Path) -> None:
    target = without_effect(converted_twin("images-float32"), tmp_path / "out", where, value)
    check = judge_runs(target, progress=silent)
    assert not check.passed
    assert "not finite" in check.detail


def test_the_three_sequences_differ_as_intended(converted_twin: TwinFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    target = opened(converted_twin("images-float32"))
    seen: list[tuple[Tensor, Tensor | None]] = []
    encode = target.encode

    def watched(ids: Tensor, kept: Tensor, features: Tensor | None = None) -> Tensor:
        seen.append((ids, features))
        return encode(ids, kept, features)

    monkeypatch.setattr(target, "encode", watched)
    judge_runs(target, progress=silent)
    ((ids, features),) = seen
    assert features is not None
    assert torch.equal(ids[0], ids[1])
    assert not torch.equal(ids[0], ids[2])
    assert torch.equal(features[0], features[2])
    assert not torch.equal(features[0], features[1])
    assert ((ids == 292).sum(1) == 4).all()
    assert 291 not in ids
