"""What comes of a run's last checkpoint, and what of it never appears; the run was made without training."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from t5g2convert.adaptation import export as finishing
from t5g2convert.adaptation.export import Finished, finish
from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from t5g2convert.adaptation.trained_export import export
from t5g2convert.checkpoint.manifest import read_manifest
from t5g2convert.errors import CheckpointError, OutputError, T5g2Error, VerificationError
from t5g2convert.mapping.inspection import Inspection, inspect
from tests.adaptation.runs import FACTS, SHARD, text_only, trained_from, write_checkpoint, write_run


@pytest.fixture
def model(small: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small / "model", tmp_path / "model"))


@pytest.fixture
def run(model: Path, tmp_path: Path) -> Path:
    """A run of `model`, with one checkpoint, of step 20, and the export of an earlier one, of step 10."""
    write_run(tmp_path / "run", model, 20)
    earlier = write_checkpoint(tmp_path / "earlier", trained_from(model, text_only, seed=1), 10)
    facts = {**FACTS, "steps": 10, "checkpoints": [10]}
    export(model, CheckpointReader(earlier), tmp_path / "run/model", facts=facts, flush=False)
    write_checkpoint(tmp_path / "run/checkpoints/step-00000020", trained_from(model, text_only), 20)
    return tmp_path / "run"


def step_of(folder: Path) -> int:
    """The step that an export is of."""
    return int(read_manifest(folder).document()["adaptation"]["steps"])


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def finished(run: Path, model: Path) -> Finished:
    return finish(run, run / "checkpoints/step-00000020", model)


def refused(run: Path, model: Path, error: type[T5g2Error], told: str) -> None:
    """It is, and what stood there still stands, and nothing more."""
    with pytest.raises(error, match=told):
        finished(run, model)
    assert step_of(run / "model") == 10
    assert {item.name for item in run.iterdir()} == {"run.json", "metrics.jsonl", "checkpoints", "model"}


def test_an_export_replaces_an_earlier_one(run: Path, model: Path) -> None:
    found = finished(run, model)
    assert found.output == found.inspection.path == run / "model"
    assert step_of(run / "model") == 20


def test_O9_what_was_exported_before_is_not_exported_again(run: Path, model: Path) -> None:
    assert not finished(run, model).before
    (run / "model/README.md").write_text("my card")
    (run / "model/eval").mkdir()
    (run / "model/eval/results.csv").write_text("0.73")
    before = contents(run / "model")
    found = finished(run, model)
    assert found.before
    assert found.to_json()["exported_before"]
    assert contents(run / "model") == before
    moved = run.with_name("elsewhere")
    (run / "model").rename(moved)
    (run / "model").symlink_to(moved)
    assert finished(run, model).before, "an export on another disk is one too, and only read"
    assert contents(moved) == before


def test_O9_files_of_people_are_not_replaced_by_another_export(run: Path, model: Path) -> None:
    (run / "model/eval").mkdir()
    (run / "model/eval/results.csv").write_text("0.73")
    before = contents(run / "model")
    with pytest.raises(OutputError, match=r"eval/.*t5g2 average .* --last 1"):
        finished(run, model)
    assert contents(run / "model") == before


def test_O9_a_link_in_the_place_of_the_export_is_not_followed(run: Path, model: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "model")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/backup.tar").write_text("all")
    (run / "model").symlink_to(tmp_path / "disk")
    with pytest.raises(OutputError, match="is a link, and what it leads to is not replaced"):
        finished(run, model)
    assert contents(tmp_path / "disk") == {"backup.tar": b"all"}


def test_O9_the_mean_of_checkpoints_is_not_replaced_by_an_export(run: Path, model: Path) -> None:
    shutil.rmtree(run / "model")
    values = CheckpointReader(run / "checkpoints/step-00000020")
    export(model, values, run / "model", facts={**FACTS, "checkpoints": [50, 100]}, flush=False)
    before = contents(run / "model")
    with pytest.raises(OutputError, match="is not an export of this run"):
        finished(run, model)
    assert contents(run / "model") == before


def test_O9_an_export_that_was_damaged_is_not_taken_for_one(run: Path, model: Path) -> None:
    finished(run, model)
    (run / "model/generation_config.json").unlink()
    assert not finished(run, model).before
    assert (run / "model/generation_config.json").is_file()


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
    path = run / "checkpoints/step-00000020" / SHARD
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(run, model, CheckpointError, f"is damaged: {SHARD} was modified")


def test_tensors_that_are_missing_are_found_before_anything_appears(
    run: Path, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def short(folder: Path) -> Inspection:
        return replace(inspect(folder), missing=("model.decoder.norm.weight",))

    monkeypatch.setattr(finishing, "inspect", short)
    refused(run, model, VerificationError, "with tensors missing or left over")
