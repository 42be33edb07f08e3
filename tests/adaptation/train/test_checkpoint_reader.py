import json
import os
import pickle
import re
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp

from t5g2convert.adaptation.train import pieces as reader
from t5g2convert.adaptation.train.checkpoint_reader import Trained
from t5g2convert.errors import CheckpointError
from tests.adaptation.runs import SETTINGS, tell, write_by_two, write_checkpoint

TENSORS = {
    "model.encoder.embed_tokens.weight": torch.arange(70.0).view(7, 10),
    "model.decoder.norm.weight": torch.randn(5, generator=torch.Generator().manual_seed(0)),
    "a.turned": torch.arange(12.0).view(3, 4).t(),
    "a.slice": torch.arange(100.0)[10:20],
    "a.cube": torch.arange(60.0).view(3, 4, 5),
    "a.one": torch.tensor([2.5]),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "step-00000100", TENSORS, 100)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_by_two(tmp_path_factory.mktemp("run") / "step-00000100", TENSORS, 100)


def by_torch(folder: Path) -> dict[str, torch.Tensor]:
    """The same tensors as torch reads them."""
    state = {"model": {name: torch.empty(tensor.shape) for name, tensor in TENSORS.items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, checkpoint_id=folder, no_dist=True)
    return state["model"]


def test_a_checkpoint_is_what_was_saved(folder: Path) -> None:
    trained = Trained(folder)
    record = trained.record
    assert (record.step, record.settings_sha256, record.objective_sha256) == (
        100,
        SETTINGS.sha256,
        SETTINGS.objective_sha256,
    )
    assert trained.names == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        assert torch.equal(trained.read(name), tensor), name


def test_two_processes_save_what_one_reads(by_two: Path) -> None:
    assert len(list(by_two.glob("*.distcp"))) == 2
    trained, expected = Trained(by_two), by_torch(by_two)
    assert len(trained._tensors["model.encoder.embed_tokens.weight"].pieces) == 2
    for name, tensor in TENSORS.items():
        assert torch.equal(trained.read(name), tensor), name
        assert torch.equal(trained.read(name), expected[name]), name


@pytest.mark.parametrize("elements", [1, 10, 25, 1 << 20])
def test_a_tensor_comes_in_rows(elements: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "BLOCK_ELEMENTS", elements)
    pieces = list(Trained(folder).pieces("model.encoder.embed_tokens.weight"))
    assert [len(piece) for piece in pieces] == {1: [1] * 7, 10: [1] * 7, 25: [2, 2, 2, 1]}.get(elements, [7])
    assert np.array_equal(np.concatenate(pieces), TENSORS["model.encoder.embed_tokens.weight"].numpy())
    assert torch.equal(Trained(folder).read("a.turned"), TENSORS["a.turned"])


class Harm:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (self.path,)


def test_nothing_of_the_metadata_is_executed(folder: Path, tmp_path: Path) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(Harm(tmp_path / "harm")))
    tell(folder, 100)
    with pytest.raises(CheckpointError, match=r"names \w+\.mkdir, which describes no tensor"):
        Trained(folder)
    assert not (tmp_path / "harm").exists()
    pickle.loads((folder / ".metadata").read_bytes())
    assert (tmp_path / "harm").exists(), "the attack is one"


def test_nothing_of_a_piece_is_executed(folder: Path, tmp_path: Path) -> None:
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    (index,) = (each for each in metadata.storage_data if each.fqn == "model.a.one")
    with (folder / "__0_9.distcp").open("wb") as file:
        torch.save(Harm(tmp_path / "harm"), file)
        size = file.tell()
    metadata.storage_data[index].relative_path = "__0_9.distcp"
    metadata.storage_data[index].offset, metadata.storage_data[index].length = 0, size
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    tell(folder, 100)
    with pytest.raises(CheckpointError, match=r"a piece of a\.one cannot be read"):
        Trained(folder).read("a.one")
    assert not (tmp_path / "harm").exists()


def _link(folder: Path) -> None:
    (folder / "__0_0.distcp").rename(folder.parent / "elsewhere")
    (folder / "__0_0.distcp").symlink_to(folder.parent / "elsewhere")


def _strange(folder: Path) -> None:
    (folder / "weights.pt").write_bytes(b"")


def _outside(folder: Path) -> None:
    text = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(text.replace(b"__0_0.distcp", b"../secret.pt"))
    tell(folder, 100)


def _cut_metadata(folder: Path) -> None:
    text = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(text[: len(text) // 2])
    tell(folder, 100)


def _changed_metadata(folder: Path) -> None:
    (folder / ".metadata").write_bytes((folder / ".metadata").read_bytes() + b".")


def _unlisted(folder: Path) -> None:
    path = folder / "checkpoint.json"
    document = json.loads(path.read_text())
    del document["files"][".metadata"]
    path.write_text(json.dumps(document))


def _listed_elsewhere(folder: Path) -> None:
    path = folder / "checkpoint.json"
    document = json.loads(path.read_text())
    document["files"]["../../../secret"] = "0" * 64
    path.write_text(json.dumps(document))


def _no_metadata(folder: Path) -> None:
    (folder / ".metadata").unlink()


def _no_word(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()


def _another_format(folder: Path) -> None:
    document = json.loads((folder / "checkpoint.json").read_text())
    (folder / "checkpoint.json").write_text(json.dumps({**document, "format": 2}))


@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (_link, "__0_0.distcp: is a link"),
        (_strange, "weights.pt: is not a file of a checkpoint"),
        (_outside, r"lies in '\.\./secret\.pt', expected a file of the checkpoint"),
        (_cut_metadata, "is not the metadata of a distributed checkpoint"),
        (_changed_metadata, r"is damaged: \.metadata is not what was written: its sha256 differs"),
        (_unlisted, r"files: \.metadata is missing"),
        (_listed_elsewhere, r"checkpoint\.json: files: String should match pattern"),
        (_no_metadata, r"is damaged: \.metadata cannot be read: No such file"),
        (_no_word, "checkpoint.json: is missing"),
        (_another_format, "format: Input should be 1"),
    ],
)
def test_a_folder_that_is_no_sound_checkpoint_is_refused(harm: Callable[[Path], None], told: str, folder: Path) -> None:
    harm(folder)
    with pytest.raises(CheckpointError, match=told):
        Trained(folder)


def test_values_that_are_cut_off_are_refused(folder: Path) -> None:
    data = (folder / "__0_0.distcp").read_bytes()
    (folder / "__0_0.distcp").write_bytes(data[: len(data) // 2])
    trained = Trained(folder)
    last = max(trained.names, key=lambda name: trained._tensors[name].pieces[0].start)
    with pytest.raises(CheckpointError, match=f"a piece of {re.escape(last)} cannot be read"):
        trained.read(last)


def test_a_piece_that_is_missing_is_refused(by_two: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step"
    shutil.copytree(by_two, folder)
    with (folder / ".metadata").open("rb") as file:
        metadata = pickle.load(file)
    metadata.state_dict_metadata["model.a.cube"].chunks.pop()
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    tell(folder, 100)
    with pytest.raises(CheckpointError, match=r"the pieces of model\.a\.cube do not make it up"):
        Trained(folder)


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "step", {"a": torch.ones(3, dtype=torch.bfloat16)}, 1)
    with pytest.raises(CheckpointError, match=r"a is torch\.bfloat16, expected torch\.float32"):
        Trained(folder)
