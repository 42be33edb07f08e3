from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from t5g2convert import CheckpointError, UsageError
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.reference import overflow
from t5g2convert.reference.overflow import not_finite
from t5g2convert.reference.weights import Weights
from tests.conftest import TwinFolder


@pytest.mark.parametrize("name", ["text-float32", "images-8"])
def test_finite_weights_in_float16_blame_the_dtype_and_name_another(name: str, twin_folder: TwinFolder) -> None:
    error = not_finite("the logits", Weights(open_checkpoint(twin_folder(name)), dtype=torch.float16))
    assert isinstance(error, UsageError)
    assert "float16 overflows" in error.message
    assert (error.where, error.hint) == (None, "compute with --dtype float32")


def test_a_float16_checkpoint_that_is_read_as_stored_computes_in_float16(twin_folder: TwinFolder) -> None:
    assert isinstance(not_finite("the logits", Weights(open_checkpoint(twin_folder("text-float16")))), UsageError)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, None], ids=str)
def test_other_dtypes_do_not_overflow_so_the_checkpoint_is_named(
    dtype: torch.dtype | None, twin_folder: TwinFolder
) -> None:
    folder = twin_folder("text-8")
    error = not_finite("the logits", Weights(open_checkpoint(folder), dtype=dtype))
    assert isinstance(error, CheckpointError)
    assert error.where == str(folder)
    assert str(dtype or torch.bfloat16).removeprefix("torch.") in error.message


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight"])
def test_weights_that_are_not_finite_are_the_checkpoints_fault_in_float16_too(
    name: str, value: float, twin_folder: TwinFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overflow, "PIECE_ELEMENTS", 7)
    tensors = load_file(twin_folder("text-float32") / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    (tmp_path / "config.json").write_bytes((twin_folder("text-float32") / "config.json").read_bytes())
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    error = not_finite("the logits", Weights(open_checkpoint(tmp_path), dtype=torch.float16))
    assert isinstance(error, CheckpointError)
    assert error.where == str(tmp_path)
