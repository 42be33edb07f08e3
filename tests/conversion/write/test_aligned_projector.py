import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from t5g2convert.conversion.write import aligned_projector
from t5g2convert.conversion.write.aligned_projector import Alignment, align, carry, paired_blocks
from t5g2convert.errors import CheckpointError, UsageError
from tests.models.tables import TORCH, ill_conditioned, random, stored, to_bytes


def nobody(_: int) -> None:
    pass


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("rows", [1, 6, 7, 8, 21, 23])
def test_blocks_are_the_rows_of_both_tables_in_order(
    dtype: str, rows: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aligned_projector, "ROWS_AT_ONCE", 7)
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
def test_nan_or_infinity_in_a_table_names_the_tensor_and_the_row(
    place: str, value: float, what: str, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aligned_projector, "ROWS_AT_ONCE", 4)
    both = {"donor": torch.ones(10, 5, dtype=TORCH[dtype]), "target": torch.ones(10, 3, dtype=TORCH[dtype])}
    both[place][9, 2] = value
    with stored(tmp_path, **both) as (donor, target):
        # The rows before it are fine.
        assert len(list(paired_blocks(donor, target, 9, nobody))) == 3
        with pytest.raises(
            CheckpointError, match=rf"^{place}, tensor {place}\.weight: holds {what} in row 9, expected"
        ):
            list(paired_blocks(donor, target, 10, nobody))


def test_a_truncated_file_is_an_error(tmp_path: Path) -> None:
    with stored(tmp_path, donor=torch.ones(8, 5), target=torch.ones(8, 3)) as (donor, target):
        (tmp_path / "target").write_bytes((tmp_path / "target").read_bytes()[:60])
        with pytest.raises(CheckpointError, match="target: ends at byte 60 "):
            list(paired_blocks(donor, target, 8, nobody))


def test_progress_counts_every_byte(tmp_path: Path) -> None:
    counted: list[int] = []
    with stored(tmp_path, donor=torch.ones(9, 5, dtype=torch.bfloat16), target=torch.ones(9, 3)) as (donor, target):
        list(paired_blocks(donor, target, 9, counted.append))
    assert counted == [90, 108]


Align = Callable[..., Alignment]


@pytest.fixture
def aligned(tmp_path: Path) -> Align:
    """Align one tensor with another, by default over all rows."""

    def run(donor: Tensor, target: Tensor, **options: Any) -> Alignment:
        with stored(tmp_path, donor=donor, target=target) as (first, second):
            return align(first, second, **{"rows": len(donor), **options})

    return run


def integers(*shape: int, seed: int) -> Tensor:
    """Return small integers: every dtype holds them exactly, and float32 their products and sums."""
    return torch.randint(-4, 5, shape, generator=torch.Generator().manual_seed(seed)).float()


def true_residual(donor: Tensor, target: Tensor, map_: Any) -> float:
    off = donor.double() @ torch.from_numpy(map_) - target.double()
    return float(off.norm() / target.double().norm())


@pytest.mark.parametrize("dtype", list(TORCH))
def test_a_target_that_is_a_map_of_the_donor_gets_exactly_that_map_and_scale(aligned: Align, dtype: str) -> None:
    table, truth, projector = integers(5000, 64, seed=0), integers(64, 16, seed=1), integers(9, 64, seed=2)
    alignment = aligned(table.to(TORCH[dtype]), table @ truth)
    assert np.abs(alignment.map - truth.numpy()).max() < 1e-12
    assert alignment.residual < 1e-13
    assert (alignment.rows, alignment.ridge) == (5000, 0.0)
    # sqrt(16 / 64) is a half, so that the exact result is a float32.
    exact = projector @ truth / 2
    result = carry("x", to_bytes(projector.to(TORCH[dtype])), dtype, alignment, "F32")
    found = torch.frombuffer(bytearray(result), dtype=torch.float32).view(9, 16)
    assert exact.all()  # the computed value for a zero is not exactly zero
    assert torch.equal(found, exact)


@pytest.mark.parametrize("target", list(TORCH))
@pytest.mark.parametrize(("width", "donor_width"), [(40, 90), (90, 40), (64, 64)])
def test_the_projector_is_mapped_scaled_and_rounded_once(
    aligned: Align, target: str, width: int, donor_width: int
) -> None:
    table, truth = random(3000, donor_width, seed=0), random(donor_width, width, seed=1, dtype=torch.float64)
    projector = random(33, donor_width, seed=2, dtype=torch.bfloat16)
    alignment = aligned(table, (table.double() @ truth).float())
    # What is left is the rounding of the target's table, averaged over its rows.
    assert np.abs(alignment.map - truth.numpy()).max() < 1e-7
    values = projector.double() @ torch.from_numpy(alignment.map) * math.sqrt(width) / math.sqrt(donor_width)
    result = carry("x", to_bytes(projector), "BF16", alignment, target)
    found = torch.frombuffer(bytearray(result), dtype=TORCH[target]).view(33, width).double()
    unit = torch.finfo(TORCH[target]).eps / 2
    assert ((found - values).abs() <= values.abs() * unit * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("rows", [300, 699, 700, 701, 1400, 1777])
def test_the_map_is_least_squares_over_the_first_rows(
    aligned: Align, dtype: str, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aligned_projector, "ROWS_AT_ONCE", 700)
    donor, target = random(1777, 48, seed=0, dtype=TORCH[dtype]), random(1900, 20, seed=1, dtype=TORCH[dtype])
    alignment = aligned(donor, target, rows=rows)
    expected, *_ = np.linalg.lstsq(donor[:rows].double().numpy(), target[:rows].double().numpy())
    assert np.abs(alignment.map - expected).max() < 1e-13
    assert alignment.residual == pytest.approx(true_residual(donor[:rows], target[:rows], expected), rel=1e-9)


@pytest.mark.parametrize("ridge", [1e-6, 1e-2, 1.0, 100.0])
def test_a_ridge_is_least_squares_with_rows_that_pull_to_zero(aligned: Align, ridge: float) -> None:
    donor, target = random(500, 30, seed=0) * torch.logspace(0, 2, 30), random(500, 12, seed=1)
    alignment = aligned(donor, target, ridge=ridge)
    table = donor.double().numpy()
    pull = math.sqrt(ridge * np.square(table).sum() / 30)
    expected, *_ = np.linalg.lstsq(
        np.vstack([table, pull * np.eye(30)]), np.vstack([target.double().numpy(), np.zeros((30, 12))])
    )
    assert np.abs(alignment.map - expected).max() < 1e-11 * np.abs(expected).max()
    assert alignment.residual == pytest.approx(true_residual(donor, target, alignment.map), rel=1e-9)
    assert alignment.ridge == ridge


def test_a_ridge_has_no_unit(aligned: Align) -> None:
    donor, target = random(500, 30, seed=0), random(500, 12, seed=1)
    one = aligned(donor, target, ridge=0.1).map
    assert np.abs(one - aligned(donor * 8, target * 8, ridge=0.1).map).max() < 1e-14
    assert np.abs(one - aligned(donor.repeat(3, 1), target.repeat(3, 1), ridge=0.1).map).max() < 1e-14
    assert np.abs(one - aligned(donor, target, ridge=0.2).map).max() > 1e-3


@pytest.mark.parametrize("noise", [0.0, 1e-9, 1e-5, 0.3])
@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4])
def test_the_residual_is_that_of_the_map_however_small(aligned: Align, noise: float, condition: float) -> None:
    # The target is in the donor's weakest direction, where large terms of the sums cancel.
    donor, weakest = ill_conditioned(5000, 60, condition, seed=0)
    target = donor.double() @ weakest * condition @ random(1, 20, seed=2, dtype=torch.float64)
    target = (target + noise * random(5000, 20, seed=3, dtype=torch.float64)).float()
    alignment = aligned(donor, target)
    assert alignment.residual == pytest.approx(true_residual(donor, target, alignment.map), rel=1e-5)
    assert alignment.residual < 1.5 * max(noise, 1e-7)


def test_tables_are_read_twice_only_for_a_tiny_residual(aligned: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    original = aligned_projector.read_exactly

    def counting(fd: int, data: memoryview, offset: int, file: str) -> None:
        read.append(len(data))
        original(fd, data, offset, file)

    monkeypatch.setattr(aligned_projector, "read_exactly", counting)
    donor, truth = random(5000, 32, seed=0), random(32, 8, seed=1)
    for target, passes in ((random(5000, 8, seed=2), 1), (donor @ truth, 2)):
        counted: list[int] = []
        read.clear()
        aligned(donor, target, progress=counted.append)
        assert read == counted
        assert sum(read) == passes * 5000 * (32 + 8) * 4
        assert len(read) == passes * 2 * 3  # two tables, 5000 rows, 2048 at once


def dependent(donor: Tensor) -> Tensor:
    donor[:, 3] = donor[:, 1] + donor[:, 2]
    return donor


def nearly_dependent(donor: Tensor) -> Tensor:
    donor[:, 3] = donor[:, 1] + donor[:, 2] + 1e-5 * donor[:, 3]
    return donor


def equal_columns(donor: Tensor) -> Tensor:
    donor[:, 3] = donor[:, 1]
    return donor


def empty_column(donor: Tensor) -> Tensor:
    donor[:, 3] = 0
    return donor


@pytest.mark.parametrize(
    "spoil",
    [dependent, nearly_dependent, equal_columns, empty_column, lambda donor: donor[:29], torch.zeros_like],
    ids=["dependent", "nearly dependent", "equal columns", "an empty column", "fewer rows than columns", "zeros"],
)
def test_degenerate_rows_are_refused_in_one_line(aligned: Align, spoil: Callable[[Tensor], Tensor]) -> None:
    donor = spoil(random(500, 30, seed=0))
    target = random(500, 12, seed=1)
    with pytest.raises(CheckpointError) as caught:
        aligned(donor, target)
    assert caught.value.message.startswith(f"{len(donor)} rows do not determine the map: condition number ")
    assert caught.value.where == "donor, tensor donor.weight"
    assert caught.value.hint == "try --ridge 1e-6"
    assert "\n" not in str(caught.value)
    if donor.any():
        assert np.isfinite(aligned(donor, target, ridge=1e-6).map).all()


def test_a_ridge_that_is_too_small_is_an_error(aligned: Align) -> None:
    donor, target = dependent(random(500, 30, seed=0)), random(500, 12, seed=1)
    with pytest.raises(CheckpointError, match=r"try a larger --ridge, for example 1e-18"):
        aligned(donor, target, ridge=1e-20)


def test_a_column_of_zeros_gets_a_row_of_zeros_under_any_ridge(aligned: Align) -> None:
    donor, target = empty_column(random(500, 30, seed=0)), random(500, 12, seed=1)
    map_ = aligned(donor, target, ridge=1e-20).map
    others = [column for column in range(30) if column != 3]
    assert not map_[3].any()
    assert np.abs(map_[others] - aligned(donor[:, others], target).map).max() < 1e-14


def test_columns_of_very_different_size_are_accepted(aligned: Align) -> None:
    donor, target = random(500, 30, seed=0), random(500, 12, seed=1)
    sizes = 2.0 ** torch.arange(-30, 30, 2)
    found = aligned(donor * sizes, target).map * sizes[:, None].numpy()
    assert np.abs(found - aligned(donor, target).map).max() < 1e-14


def test_a_target_of_zeros_is_refused(aligned: Align) -> None:
    target = torch.zeros(500, 12)
    target[400:] = 1
    with pytest.raises(CheckpointError, match=r"target\.weight: holds only zeros in its first 400 rows"):
        aligned(random(500, 30, seed=0), target, rows=400)


@pytest.mark.parametrize(("rows", "table"), [(41, "target has 40"), (51, "donor has 50"), (0, "donor has 50")])
def test_rows_that_a_table_does_not_have_are_refused(aligned: Align, rows: int, table: str) -> None:
    name, _, has = table.partition(" ")
    with pytest.raises(CheckpointError, match=rf"tensor {name}\.weight: {has} rows, expected {rows}"):
        aligned(random(50, 3, seed=0), random(40, 3, seed=1), rows=rows)


@pytest.mark.parametrize("ridge", [-1e-9, math.nan, math.inf])
def test_a_ridge_that_is_negative_or_not_finite_is_refused(aligned: Align, ridge: float) -> None:
    with pytest.raises(UsageError, match="must be 0 or more"):
        aligned(random(50, 3, seed=0), random(50, 3, seed=1), ridge=ridge)


def test_nan_or_infinity_in_a_table_is_refused_before_solving(aligned: Align) -> None:
    donor = random(5000, 3, seed=0)
    donor[4999, 2] = math.nan
    with pytest.raises(CheckpointError, match=r"donor\.weight: holds NaN in row 4999"):
        aligned(donor, random(5000, 2, seed=1))


@pytest.mark.parametrize("dtype", list(TORCH))
def test_nan_or_infinity_in_the_donors_projector_is_refused(dtype: str) -> None:
    projector = torch.ones(4, 3, dtype=TORCH[dtype])
    projector[2, 1] = math.inf
    with pytest.raises(CheckpointError, match="tensor a: the donor's projector holds infinity in row 2"):
        carry("a", to_bytes(projector), dtype, Alignment(np.eye(3), 0.0, 1, 0.0), "F32")


@pytest.mark.parametrize(("target", "value"), [("F16", 1e5), ("BF16", 3.4e38), ("F32", 4e38)])
def test_a_projector_too_large_for_its_dtype_is_refused(target: str, value: float) -> None:
    with pytest.raises(CheckpointError, match=f"tensor a: has a value too large for {target}"):
        carry("a", to_bytes(torch.ones(2, 1)), "F32", Alignment(np.array([[value]]), 0.0, 1, 0.0), target)


def test_every_run_gives_the_same_bytes(aligned: Align) -> None:
    donor, target = random(5000, 200, seed=0, dtype=torch.bfloat16), random(5000, 70, seed=1, dtype=torch.bfloat16)
    runs = [aligned(donor, target) for _ in range(3)]
    assert len({run.map.tobytes() for run in runs}) == 1
    assert len({run.residual for run in runs}) == 1


MEASURED = """
import os, sys
from pathlib import Path
from t5g2convert.conversion.write.aligned_projector import align
from t5g2convert.conversion.write.aligned_projector import Table
rows = int(sys.argv[1])
donor, target = (Table(n, "BF16", rows, w, n, os.open(n, os.O_RDONLY), 0) for n, w in (("donor", 160), ("target", 40)))
align(donor, target, rows=rows)
status = Path("/proc/self/status").read_text()
print(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
assert "torch" not in sys.modules
"""


def test_memory_does_not_depend_on_the_number_of_rows(tmp_path: Path) -> None:
    peaks = []
    for blocks in (2, 64):
        for name, width in (("donor", 160), ("target", 40)):
            data = to_bytes(random(4096, width, seed=width, dtype=torch.bfloat16))
            (tmp_path / name).write_bytes(data * blocks)
        command = [sys.executable, "-c", MEASURED, str(4096 * blocks)]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, filter(None, sys.path)))}
        run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=environment)
        peaks.append(int(run.stdout) * 1024)
    # 105 MB of tables against 3 MB.
    assert peaks[1] < peaks[0] + 5_000_000
    assert peaks[1] < 100_000_000
