import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from t5g2convert.adaptation.train import checkpoints
from t5g2convert.adaptation.train.checkpoint_manifest import complete_checkpoints, regular_checkpoints
from t5g2convert.adaptation.train.checkpoints import State, load, save
from t5g2convert.conversion.write import resources
from t5g2convert.errors import CheckpointError, OutputError
from tests.adaptation.runs import SETTINGS, write_manifest

NAMES = ("model.encoder.norm.weight", "model.decoder.norm.weight")
ENGINE: Any = SimpleNamespace(global_rank=0, world_size=1)


@pytest.fixture(autouse=True)
def without_process_group_warning() -> Iterator[None]:
    """Ignore torch's warning about loading and saving without a process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def state_of(*, steps: int) -> State:
    """Return the state of two tensors; only the first is trained."""
    torch.manual_seed(steps)
    parameters = {name: nn.Parameter(torch.randn(3, 2)) for name in NAMES}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(steps):
        parameters[NAMES[0]].grad = torch.randn(3, 2)
        optimizer.step()
    return State(parameters, optimizer)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return save(ENGINE, tmp_path, 3, state_of(steps=3), SETTINGS, keep=1)


@pytest.mark.parametrize("size", [1 << 30, 48, 1])
def test_values_and_moments_are_loaded_from_any_number_of_files(
    size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoints, "FILE_BYTES", size)
    folder = save(ENGINE, tmp_path, 3, state_of(steps=3), SETTINGS, keep=1)
    assert len(list(folder.glob("*.safetensors"))) == {1: 5, 48: 3}.get(size, 1)
    expected, found = state_of(steps=3), state_of(steps=0)
    load(folder, found)
    for name in NAMES:
        assert torch.equal(found.parameters[name], expected.parameters[name])
    moments = expected.optimizer.state[expected.parameters[NAMES[0]]]
    assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
    for name, moment in moments.items():
        assert torch.equal(found.optimizer.state[found.parameters[NAMES[0]]][name], moment)
    assert found.parameters[NAMES[1]] not in found.optimizer.state


def test_nothing_is_ever_unpickled(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a pickle was read")

    for module, name in ((pickle, "loads"), (pickle, "load"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, refuse)
    load(folder, state_of(steps=0))


def test_other_tensors_are_refused(folder: Path) -> None:
    state = state_of(steps=0)
    with pytest.raises(CheckpointError, match=r"does not fit the model: model\.model\.dec.* is not trained"):
        load(folder, State({NAMES[0]: state.parameters[NAMES[0]]}, state.optimizer))
    wider = {name: nn.Parameter(torch.zeros(3, 3)) for name in NAMES}
    with pytest.raises(CheckpointError, match=r"has shape \(3, 2\), expected \(3, 3\)") as raised:
        load(folder, State(wider, torch.optim.AdamW(wider.values())))
    assert len(raised.value.details) == 4


def test_a_missing_moment_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoints, "FILE_BYTES", 1)
    folder = save(ENGINE, tmp_path, 3, state_of(steps=3), SETTINGS, keep=1)
    (folder / "shard-00001-model-00005-of-00005.safetensors").unlink()
    write_manifest(folder, 3)
    with pytest.raises(CheckpointError, match=r"optimizer\.model\.encoder\.norm\.weight\.exp_avg_sq is missing"):
        load(folder, state_of(steps=0))


def test_the_newest_and_the_regular_checkpoints_are_kept(tmp_path: Path) -> None:
    def kept(step: int, *, interim: bool) -> list[int]:
        save(ENGINE, tmp_path, step, state_of(steps=1), SETTINGS, keep=2, interim=interim)
        return list(complete_checkpoints(tmp_path))

    assert kept(3, interim=True) == [3]
    assert kept(5, interim=True) == [5]
    assert kept(10, interim=False) == [10]
    assert kept(13, interim=True) == [10, 13]
    assert kept(20, interim=False) == [10, 20]
    assert kept(30, interim=False) == [20, 30]
    assert kept(31, interim=True) == [20, 30, 31]
    assert list(regular_checkpoints(tmp_path)) == [20, 30]


def test_older_checkpoints_are_removed_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for step in (10, 20, 30):
        save(ENGINE, tmp_path, step, state_of(steps=1), SETTINGS, keep=3)
    found = []
    monkeypatch.setattr(checkpoints, "check_space", lambda *_: found.extend(complete_checkpoints(tmp_path)))
    save(ENGINE, tmp_path, 40, state_of(steps=1), SETTINGS, keep=1)
    assert found == [30]
    assert list(complete_checkpoints(tmp_path)) == [40]


def test_a_checkpoint_that_does_not_fit_the_disk_is_refused_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(ENGINE, tmp_path, 10, state_of(steps=1), SETTINGS, keep=1)
    monkeypatch.setattr(resources, "free_bytes", lambda _: 143)
    with pytest.raises(OutputError, match="the disk has 143 bytes free, the output needs 144"):
        save(ENGINE, tmp_path, 20, state_of(steps=1), SETTINGS, keep=1)
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000010"]
