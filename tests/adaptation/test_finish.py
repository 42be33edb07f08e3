"""What comes of a run's last checkpoint, and what of it never appears; the run was made without training."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from t5g2convert.adaptation import finish as finishing
from t5g2convert.adaptation.finish import Finished, finish
from t5g2convert.errors import CheckpointError, T5g2Error, VerificationError
from t5g2convert.mapping.inspection import Inspection, inspect
from tests.adaptation.runs import text_only, trained_from, write_checkpoint, write_run


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small / "model", tmp_path / "model"))


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """A run of `model`, with one checkpoint, of step 20, and the export of an earlier one."""
    write_run(tmp_path / "run", model, 20)
    write_checkpoint(tmp_path / "run/checkpoints/step-00000020", trained_from(model, text_only), 20)
    (tmp_path / "run/model").mkdir()
    (tmp_path / "run/model/earlier").touch()
    return tmp_path / "run"


def finished(run: Path, model: Path) -> Finished:
    return finish(run, run / "checkpoints/step-00000020", model)


def refused(run: Path, model: Path, error: type[T5g2Error], told: str) -> None:
    """It is, and what stood there still stands, and nothing more."""
    with pytest.raises(error, match=told):
        finished(run, model)
    assert [item.name for item in (run / "model").iterdir()] == ["earlier"]
    assert {item.name for item in run.iterdir()} == {"run.json", "metrics.jsonl", "checkpoints", "model"}


def test_an_export_replaces_an_earlier_one(run: Path, model: Path) -> None:
    found = finished(run, model)
    assert found.output == found.inspection.path == run / "model"
    assert not (run / "model/earlier").exists()


def test_a_model_that_was_changed_since_is_refused(run: Path, model: Path) -> None:
    path = model / "t5g2.json"
    path.unlink()
    refused(run, model, CheckpointError, "is not the model that was trained")


def test_weights_that_were_damaged_since_are_refused(run: Path, model: Path) -> None:
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    refused(run, model, CheckpointError, r"model\.safetensors is not what t5g2\.json beside it tells of")


def test_a_damaged_checkpoint_is_refused(run: Path, model: Path) -> None:
    path = run / "checkpoints/step-00000020/__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(run, model, CheckpointError, "is damaged: __0_0.distcp is not what was written")


def test_tensors_that_are_missing_are_found_before_anything_appears(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(folder: Path) -> Inspection:
        return replace(inspect(folder), missing=("model.decoder.norm.weight",))

    monkeypatch.setattr(finishing, "inspect", short)
    refused(run, model, VerificationError, "with tensors missing or left over")
