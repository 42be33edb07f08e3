import json
import math
import shutil
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader

from t5g2convert.adaptation.train import checkpoint_reader
from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from t5g2convert.errors import CheckpointError
from tests.adaptation.runs import SETTINGS, SHARD, write_by_two, write_checkpoint, write_manifest

TENSORS = {
    "model.encoder.embed_tokens.weight": torch.arange(70.0).view(7, 10),
    "model.decoder.norm.weight": torch.randn(5, generator=torch.Generator().manual_seed(0)),
    "a.turned": torch.arange(12.0).view(3, 4).t(),
    "a.slice": torch.arange(100.0)[10:20],
    "a.cube": torch.arange(60.0).view(3, 4, 5),
    "a.one": torch.tensor([2.5]),
}
EMBEDDING = "model.model.encoder.embed_tokens.weight"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "step-00000100", TENSORS, 100)


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_by_two(tmp_path_factory.mktemp("run") / "step-00000100", TENSORS, 100)


def by_torch(folder: Path) -> dict[str, torch.Tensor]:
    """Load the same tensors with torch."""
    state = {"model": {name: torch.empty(tensor.shape) for name, tensor in TENSORS.items()}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.load(state, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    return state["model"]


def test_a_checkpoint_holds_what_was_saved(folder: Path) -> None:
    trained = CheckpointReader(folder)
    manifest = trained.manifest
    assert (manifest.step, manifest.settings_sha256, manifest.objective_sha256) == (
        100,
        SETTINGS.sha256,
        SETTINGS.objective_sha256,
    )
    assert trained.names == {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name, tensor in TENSORS.items():
        assert torch.equal(trained.read(name), tensor), name


@pytest.mark.slow
def test_one_process_reads_what_two_saved(by_two: Path) -> None:
    assert len(list(by_two.glob("shard-*"))) == 2
    trained, expected = CheckpointReader(by_two), by_torch(by_two)
    assert [(shard.first, shard.rows) for shard in trained._shards[EMBEDDING]] == [(0, 4), (4, 3)]
    for name, tensor in TENSORS.items():
        assert torch.equal(trained.read(name), tensor), name
        assert torch.equal(trained.read(name), expected[name]), name


@pytest.mark.parametrize("elements", [1, 10, 25, 1 << 20])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_tensor_is_read_in_rows(
    elements: int, processes: int, folder: Path, by_two: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint_reader, "BLOCK_ELEMENTS", elements)
    reader = CheckpointReader(folder if processes == 1 else by_two)
    pieces = list(reader.pieces("model.encoder.embed_tokens.weight"))
    assert [len(piece) for piece in pieces] == {1: [1] * 7, 10: [1] * 7, 25: [2, 2, 2, 1]}.get(elements, [7])
    assert np.array_equal(np.concatenate(pieces), TENSORS["model.encoder.embed_tokens.weight"].numpy())
    assert torch.equal(reader.read("a.turned"), TENSORS["a.turned"])


def rewrite(path: Path, change: Callable[[dict[str, Any], dict[str, Any]], object]) -> None:
    """Change a file's header and its shard offsets, and make checkpoint.json fit."""
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    offsets = json.loads(header["__metadata__"]["DCP_SHARDING_INFO"])
    change(header, offsets)
    header["__metadata__"]["DCP_SHARDING_INFO"] = json.dumps(offsets)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
    write_manifest(path.parent, 100)


def _link(folder: Path) -> None:
    (folder / SHARD).rename(folder.parent / "elsewhere")
    (folder / SHARD).symlink_to(folder.parent / "elsewhere")


def _strange(folder: Path) -> None:
    (folder / "weights.pt").write_bytes(b"")


def _cut(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:-100])


def _cut_header(folder: Path) -> None:
    (folder / SHARD).write_bytes((folder / SHARD).read_bytes()[:100])


def _listed_elsewhere(folder: Path) -> None:
    path = folder / "checkpoint.json"
    document = json.loads(path.read_text())
    document["files"]["../../../secret"] = "0" * 64
    path.write_text(json.dumps(document))


def _unlisted(folder: Path) -> None:
    path = folder / "checkpoint.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "files": {}}))


def _missing(folder: Path) -> None:
    (folder / SHARD).unlink()


def _no_manifest(folder: Path) -> None:
    (folder / "checkpoint.json").unlink()


def _format(number: int) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        document = json.loads((folder / "checkpoint.json").read_text())
        (folder / "checkpoint.json").write_text(json.dumps({**document, "format": number}))

    return edit


def _header(change: Callable[[dict[str, Any], dict[str, Any]], object]) -> Callable[[Path], None]:
    return lambda folder: rewrite(folder / SHARD, change)


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (_link, f"{SHARD}: is a link or not a regular file"),
        (_strange, "weights.pt: is not a file of this checkpoint"),
        (_cut, rf"{SHARD}: expected \d+ bytes, found \d+"),
        (_cut_header, rf"{SHARD}: expected \d+ bytes for the header, found 100"),
        (_listed_elsewhere, r"checkpoint\.json: files: String should match pattern"),
        (_unlisted, r"checkpoint\.json: files: "),
        (_missing, f"{SHARD}: cannot be read: No such file"),
        (_no_manifest, "checkpoint.json: is missing"),
        (_format(3), "format: Input should be 2"),
        (_format(1), r"checkpoint\.json: has format 1 \(t5g2convert 0\.1\.0\), expected format 2"),
        (_header(lambda header, offsets: offsets.pop("model.a.one")), "does not list the tensors of the file"),
        (_header(lambda header, offsets: offsets.update({"model.a.one": {}})), r"a\.one has no valid saved_offsets"),
        (
            _header(lambda header, offsets: offsets["model.a.one"].update(saved_offsets=[2])),
            r"rows of model\.a\.one are missing or stored twice: expected row 0 next, found row 2",
        ),
        (
            _header(lambda header, offsets: offsets["model.a.cube"].update(saved_offsets=[0, 1, 0])),
            r"model\.a\.cube starts at \[0, 1, 0\], expected whole rows",
        ),
        (
            _header(lambda header, offsets: offsets["model.a.one"].update(saved_offsets=[-1])),
            r"model\.a\.one starts at \[-1\]",
        ),
        (
            _header(
                lambda header, offsets: (
                    header.update(strange=header.pop("model.a.one")),
                    offsets.update(strange=offsets.pop("model.a.one")),
                )
            ),
            "strange is not a tensor of a model or an optimizer",
        ),
    ],
)
def test_a_folder_that_is_not_a_valid_checkpoint_is_refused(
    harm: Callable[[Path], None], message: str, folder: Path
) -> None:
    harm(folder)
    with pytest.raises(CheckpointError, match=message):
        CheckpointReader(folder)


def test_a_file_that_is_cut_after_it_was_opened_is_refused(folder: Path) -> None:
    reader = CheckpointReader(folder)
    last = max(reader.names, key=lambda name: reader._shards[f"model.{name}"][0].entry.start)
    data = (folder / SHARD).read_bytes()
    (folder / SHARD).write_bytes(data[: reader._shards[f"model.{last}"][0].entry.end - 4])
    with pytest.raises(CheckpointError, match="was truncated while it was read"):
        reader.read(last)


@pytest.mark.parametrize("rank", [1, 2])
def test_missing_or_repeated_rows_of_a_process_are_refused(rank: int, by_two: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(by_two, tmp_path / "step"))
    own, other = (folder / f"shard-{each:05d}-model-00001-of-00001.safetensors" for each in (rank, 3 - rank))
    shutil.copyfile(other, own)
    write_manifest(folder, 100)
    with pytest.raises(CheckpointError, match=r"rows of model\.\S+ are missing or stored twice"):
        CheckpointReader(folder)
    own.unlink()
    write_manifest(folder, 100)
    if rank == 1:
        with pytest.raises(CheckpointError, match=r"expected row 0 next, found row \d"):
            CheckpointReader(folder)
    else:
        # The other files do not show it, but the shapes no longer fit the model.
        names = CheckpointReader(folder).names
        assert math.prod(names["model.encoder.embed_tokens.weight"]) == 40


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "step", {"a": torch.ones(3, dtype=torch.bfloat16)}, 1)
    with pytest.raises(CheckpointError, match=r"model\.a is BF16, expected F32"):
        CheckpointReader(folder)
