from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from t5g2convert.checkpoint.header import read_header
from t5g2convert.parity.checks.provenance_bytes import StoredNumbers, repeats


def stored(path: Path, values: torch.Tensor) -> StoredNumbers:
    save_file({"a": torch.zeros(3), "b": values}, path)
    entry = read_header(path).tensors["b"]
    return StoredNumbers(path, entry.start, entry.end, entry.dtype)


def read(path: Path, start: int, size: int) -> bytes:
    return path.read_bytes()[start : start + size]


VALUES = torch.arange(-40.0, 41.0).view(9, 9)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("piece", [8, 20, 1 << 20])
@pytest.mark.parametrize("one", DTYPES, ids=str)
@pytest.mark.parametrize("other", DTYPES, ids=str)
def test_numbers_are_compared_across_dtypes(one: torch.dtype, other: torch.dtype, piece: int, tmp_path: Path) -> None:
    first, second = stored(tmp_path / "one", VALUES.to(one)), stored(tmp_path / "other", VALUES.to(other))
    assert repeats(first, second, read, piece)
    for at in (0, 40, 80):
        changed = VALUES.clone()
        changed.view(-1)[at] += 1
        assert not repeats(first, stored(tmp_path / "changed", changed.to(other)), read, piece)


def test_a_rounded_copy_is_not_a_copy(tmp_path: Path) -> None:
    values = VALUES + 2**-12
    assert not repeats(
        stored(tmp_path / "one", values), stored(tmp_path / "other", values.to(torch.bfloat16)), read, 1 << 20
    )


def test_tensors_of_other_sizes_are_not_copies(tmp_path: Path) -> None:
    one, other = stored(tmp_path / "one", VALUES), stored(tmp_path / "other", VALUES[:8].clone())
    assert not repeats(one, other, read, 1 << 20)
