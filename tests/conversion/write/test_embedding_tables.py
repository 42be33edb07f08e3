from pathlib import Path

import pytest
import torch

from t5g2convert.conversion.write import embedding_tables
from t5g2convert.conversion.write.embedding_tables import paired_blocks
from t5g2convert.errors import CheckpointError
from tests.tables import TORCH, random, stored


def nobody(_: int) -> None:
    pass


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("rows", [1, 6, 7, 8, 21, 23])
def test_blocks_are_the_rows_of_both_tables_in_order(
    dtype: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_tables, "ROWS_AT_ONCE", 7)
    donor, target = random(23, 5, seed=0, dtype=TORCH[dtype]), random(40, 3, seed=1)
    with stored(tmp_path, donor=donor, target=target) as (first, second):
        blocks = [(a.copy(), b.copy()) for a, b in paired_blocks(first, second, rows, nobody)]
    assert [len(a) for a, _ in blocks] == [min(7, rows - start) for start in range(0, rows, 7)]
    for place, table in enumerate((donor, target)):
        found = torch.cat([torch.from_numpy(block[place]) for block in blocks])
        assert found.dtype == torch.float64
        assert torch.equal(found, table[:rows].double())


@pytest.mark.parametrize("dtype", list(TORCH))
def test_every_number_keeps_its_value(dtype: str, tmp_path: Path) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    values = every.view(torch.float16 if dtype == "F16" else torch.bfloat16).to(TORCH[dtype])
    values = values[torch.isfinite(values)]
    table = values[: len(values) // 4 * 4].view(-1, 4)
    with stored(tmp_path, table=table) as (only,):
        found = torch.cat([torch.from_numpy(a.copy()) for a, _ in paired_blocks(only, only, len(table), nobody)])
    assert len(table) > 15_000
    assert torch.equal(found, table.double())


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize(("value", "what"), [(float("nan"), "NaN"), (float("-inf"), "infinity")])
@pytest.mark.parametrize("place", ["donor", "target"])
def test_no_number_in_a_table_names_the_tensor_and_the_row(
    place: str, value: float, what: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(embedding_tables, "ROWS_AT_ONCE", 4)
    both = {"donor": torch.ones(10, 5, dtype=TORCH[dtype]), "target": torch.ones(10, 3, dtype=TORCH[dtype])}
    both[place][9, 2] = value
    with stored(tmp_path, **both) as (donor, target):
        # The rows before it are fine.
        assert len(list(paired_blocks(donor, target, 9, nobody))) == 3
        with pytest.raises(
            CheckpointError, match=rf"^{place}, tensor {place}\.weight: holds {what} in row 9, expected"
        ):
            list(paired_blocks(donor, target, 10, nobody))


def test_a_file_that_became_shorter_is_told(tmp_path: Path) -> None:
    with stored(tmp_path, donor=torch.ones(8, 5), target=torch.ones(8, 3)) as (donor, target):
        (tmp_path / "target").write_bytes((tmp_path / "target").read_bytes()[:60])
        with pytest.raises(CheckpointError, match="target: ends at byte 60 "):
            list(paired_blocks(donor, target, 8, nobody))


def test_progress_is_told_every_byte(tmp_path: Path) -> None:
    told: list[int] = []
    with stored(tmp_path, donor=torch.ones(9, 5, dtype=torch.bfloat16), target=torch.ones(9, 3)) as (donor, target):
        list(paired_blocks(donor, target, 9, told.append))
    assert told == [90, 108]
