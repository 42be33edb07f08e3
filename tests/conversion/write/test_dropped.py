"""A dropped head must equal the embedding: plan compares headers, convert compares values."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from t5g2convert import CheckpointError, convert, plan, verify
from t5g2convert.conversion.write import shards
from tests.conftest import TwinFolder
from tests.models.twins import Tensors, respell

TABLE = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def headed(
    twin: Path, folder: Path, head: torch.dtype, table: torch.dtype, *, at: tuple[int, int] | None = None
) -> Path:
    """Copy a twin and add a head; its table holds small integers, exact in every dtype."""

    def change(tensors: Tensors) -> Tensors:
        values = torch.arange(tensors[TABLE].numel()).remainder(97).sub(48).view(tensors[TABLE].shape).float()
        other = values.clone()
        if at is not None:
            other[at] += 1
        return {**tensors, TABLE: values.to(table), HEAD: other.to(head)}

    respell(twin, folder, change)
    return folder


PAIRS = [
    (torch.float32, torch.bfloat16),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float16, torch.bfloat16),
    (torch.bfloat16, torch.bfloat16),
]


@pytest.mark.parametrize(("head", "table"), PAIRS, ids=str)
def test_I6_an_equal_head_of_any_dtype_is_dropped(
    head: torch.dtype, table: torch.dtype, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    source = headed(twin_folder("text-8"), tmp_path / "source", head, table)
    done = convert(source, tmp_path / "out")
    (note,) = (note for note in done.notes if note.startswith(HEAD))
    assert f"it must equal {TABLE}" in note
    assert ("by value" in note) == (head != table)
    assert verify(tmp_path / "out", source, record=False).passed


@pytest.mark.sampled
@pytest.mark.parametrize("piece", [64, 1000, shards.CHUNK_BYTES])
@pytest.mark.parametrize("at", [(0, 0), (151, 13), (299, 23)], ids=str)
@pytest.mark.parametrize(("head", "table"), PAIRS, ids=str)
def test_I6_a_different_head_is_reported_with_position_and_both_values(
    head: torch.dtype,
    table: torch.dtype,
    at: tuple[int, int],
    piece: int,
    twin_folder: TwinFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(shards, "CHUNK_BYTES", piece)
    source = headed(twin_folder("text-8"), tmp_path / "source", head, table, at=at)
    plan(source)
    with pytest.raises(CheckpointError) as caught:
        convert(source, tmp_path / "out")
    value = (at[0] * 24 + at[1]) % 97 - 48
    assert caught.value.where == f"tensor {HEAD}"
    assert caught.value.message.startswith(f"differs from {TABLE} at {list(at)} ({value + 1}, expected {value})")
    assert "untied" in (caught.value.hint or "")
    assert not (tmp_path / "out").exists()


def test_I6_a_head_of_another_shape_is_refused_by_the_plan(twin_folder: TwinFolder, tmp_path: Path) -> None:
    respell(twin_folder("text-8"), tmp_path / "source", lambda held: {**held, HEAD: held[TABLE][:-1].clone()})
    with pytest.raises(CheckpointError) as caught:
        plan(tmp_path / "source")
    message = f"misshapen: {HEAD} has shape [299, 24], but it must repeat {TABLE} of shape [300, 24]"
    assert caught.value.details == (message,)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn, torch.int8], ids=str)
def test_I6_a_head_that_cannot_be_compared_is_refused_by_the_plan(
    dtype: torch.dtype, twin_folder: TwinFolder, tmp_path: Path
) -> None:
    respell(twin_folder("text-8"), tmp_path / "source", lambda held: {**held, HEAD: held[TABLE].to(dtype)})
    with pytest.raises(CheckpointError) as caught:
        plan(tmp_path / "source")
    (detail,) = caught.value.details
    assert detail.startswith(f"misshapen: {HEAD} has dtype ")
    assert "only BF16, F16, F32 can be compared with it" in detail


def test_a_widened_nan_is_the_same_number(twin_folder: TwinFolder, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> Tensors:
        tensors[TABLE][5, 5] = torch.nan
        return {**tensors, HEAD: tensors[TABLE].float()}

    respell(twin_folder("text-8"), tmp_path / "source", change)
    convert(tmp_path / "source", tmp_path / "out", allow_nonfinite=True)
    with pytest.raises(CheckpointError, match="NaN"):
        convert(tmp_path / "source", tmp_path / "none")


def test_a_comparison_loads_no_torch(twin_folder: TwinFolder, tmp_path: Path) -> None:
    source = headed(twin_folder("text-8"), tmp_path / "source", torch.float32, torch.bfloat16)
    code = (
        "import sys\nfrom pathlib import Path\nfrom t5g2convert import convert\n"
        "convert(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code, source, tmp_path / "out"], check=True)
