"""What torch loads of a checkpoint, into parameters and optimizer, and what of it is never executed."""

import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

from t5g2convert.adaptation.train.checkpoints import State, load
from t5g2convert.errors import CheckpointError

NAMES = ("model.encoder.norm.weight", "model.decoder.norm.weight")


class Harm:
    """Makes a folder when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


@pytest.fixture(autouse=True)
def alone() -> Iterator[None]:
    """Torch warns of loading and saving without a process group."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def state_of(*, steps: int) -> State:
    """Two tensors, the first of them trained."""
    torch.manual_seed(steps)
    parameters = {name: nn.Parameter(torch.randn(3, 2)) for name in NAMES}
    optimizer = torch.optim.AdamW(parameters.values(), lr=0.1)
    for _ in range(steps):
        parameters[NAMES[0]].grad = torch.randn(3, 2)
        optimizer.step()
    return State(parameters, optimizer)


def saved(folder: Path, state: State, **more: Any) -> Path:
    tree = {
        "model": {name: parameter.detach() for name, parameter in state.parameters.items()},
        "optimizer": {NAMES[0]: {**state.optimizer.state[state.parameters[NAMES[0]]], **more}},
    }
    dcp.save(tree, checkpoint_id=folder, no_dist=True)
    (folder / "checkpoint.json").touch()
    return folder


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return saved(tmp_path / "step-00000003", state_of(steps=3))


def test_values_and_moments_come_back(folder: Path) -> None:
    expected, found = state_of(steps=3), state_of(steps=0)
    load(folder, found)
    for name in NAMES:
        assert torch.equal(found.parameters[name], expected.parameters[name])
    moments = expected.optimizer.state[expected.parameters[NAMES[0]]]
    assert moments.keys() == {"step", "exp_avg", "exp_avg_sq"}
    for name, moment in moments.items():
        assert torch.equal(found.optimizer.state[found.parameters[NAMES[0]]][name], moment)
    assert found.parameters[NAMES[1]] not in found.optimizer.state


def test_nothing_of_the_metadata_is_executed(folder: Path, tmp_path: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    with pytest.raises(CheckpointError, match=r"names \w+\.mkdir, which describes no tensor"):
        load(folder, state_of(steps=0))
    assert not (tmp_path / "harm").exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert (tmp_path / "harm").exists(), "the attack is one"


def test_an_object_in_place_of_a_moment_is_not_made(tmp_path: Path) -> None:
    folder = saved(tmp_path / "step", state_of(steps=3), exp_avg=Harm(tmp_path / "harm"))
    with pytest.raises(CheckpointError, match=r"optimizer\.model\.encoder\.norm\.weight\.exp_avg is not a tensor"):
        load(folder, state_of(steps=0))
    assert not (tmp_path / "harm").exists()


def _elsewhere(folder: Path) -> None:
    text = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(text.replace(b"__0_0.distcp", b"../secret.pt"))


def _link(folder: Path) -> None:
    shutil.move(folder / "__0_0.distcp", folder.parent / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(folder.parent / "elsewhere")


def _strange(folder: Path) -> None:
    (folder / "weights.pt").touch()


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (_elsewhere, r"lies in '\.\./secret\.pt', expected a file of the checkpoint"),
        (_link, "__0_0.distcp: is a link"),
        (_strange, "weights.pt: is not a file of a checkpoint"),
    ],
)
def test_a_folder_that_is_no_sound_checkpoint_is_refused(harm: Callable[[Path], None], told: str, folder: Path) -> None:
    harm(folder)
    with pytest.raises(CheckpointError, match=told):
        load(folder, state_of(steps=0))


def test_other_tensors_are_refused(folder: Path) -> None:
    state = state_of(steps=0)
    with pytest.raises(CheckpointError, match=r"is of another model: model\.model\.dec.* is not trained"):
        load(folder, State({NAMES[0]: state.parameters[NAMES[0]]}, state.optimizer))
