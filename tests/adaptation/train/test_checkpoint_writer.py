import hashlib
import io
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.state_dict_saver import save

from t5g2convert.adaptation.train.checkpoint_writer import CheckpointWriter, HashedFile

SHAPES = [(), (0,), (1,), (3, 2), (0, 4), (7, 1, 3), (70_000,), (1 << 16, 5)]
"""Scalars, empty tensors, and files smaller and larger than the buffer of a file."""


def written(folder: Path, tensors: dict[str, torch.Tensor], files: dict[str, int]) -> dict[str, str]:
    """Write tensors, and return what is committed."""
    committed: dict[str, str] = {}
    folder.mkdir()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        save(dict(tensors), storage_writer=CheckpointWriter(folder, files, committed.update), no_dist=True)
    return committed


@pytest.mark.parametrize("files", [1, 3, len(SHAPES)])
@pytest.mark.parametrize("rows", ["all", "some"])
def test_the_digests_are_those_of_the_files_on_disk(files: int, rows: str, tmp_path: Path) -> None:
    tensors = {f"model.{number}": torch.randn(shape) for number, shape in enumerate(SHAPES)}
    if rows == "some":  # of a larger storage
        tensors = {name: tensor[len(tensor) // 2 :] if tensor.ndim else tensor for name, tensor in tensors.items()}
    numbers = {name: 1 + number % files for number, name in enumerate(tensors)}
    committed = written(tmp_path / "c", tensors, numbers)
    on_disk = {path.name: path for path in sorted((tmp_path / "c").iterdir())}
    assert len(on_disk) == files
    assert committed == {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in on_disk.items()}
    assert list(committed) == sorted(committed)
    found = {name: tensor for path in on_disk.values() for name, tensor in load_file(path).items()}
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("size", [0, 1, io.DEFAULT_BUFFER_SIZE, 3 * io.DEFAULT_BUFFER_SIZE + 1])
def test_bytes_in_pieces_give_the_digest_of_the_file(size: int, tmp_path: Path) -> None:
    data = bytes(number % 251 for number in range(size))
    with HashedFile(tmp_path / "file") as file:
        for start in range(0, size, 1000):
            file.write(data[start : start + 1000])
        file.writelines([b"end", b"ing"])
    assert (tmp_path / "file").read_bytes() == data + b"ending"
    assert file.sha256.hexdigest() == hashlib.sha256(data + b"ending").hexdigest()


@pytest.mark.parametrize("change", [lambda file: file.seek(0), lambda file: file.truncate(1)])
def test_a_byte_is_never_written_a_second_time(change: Any, tmp_path: Path) -> None:
    with HashedFile(tmp_path / "file") as file:
        file.write(b"header")
        with pytest.raises(OSError, match="a file that is hashed while it is written cannot be"):
            change(file)
    assert file.sha256.hexdigest() == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        HashedFile(tmp_path / "file")
    assert (tmp_path / "file").read_bytes() == b"mine"
