import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.conversion.write.aligned_projector import align, carry
from t5g2convert.parity.checks.aligned_projector import (
    ExpectedProjector,
    RowReader,
    _spacing,
    aligned_projector,
    projector_faults,
)
from t5g2convert.reference.weights import Weights
from tests.models.tables import TORCH, ill_conditioned, random, stored, to_bytes

NAME = "projector.weight"
INTEGERS = {"BF16": torch.int16, "F16": torch.int16, "F32": torch.int32}


def reader(table: Tensor) -> RowReader:
    return lambda start, stop: table[start:stop]


@dataclass(frozen=True)
class Case:
    """Two tables of one vocabulary, a donor's projector [features, donor width], and a ridge."""

    donor: Tensor
    target: Tensor
    projector: Tensor
    ridge: float = 0.0

    def expected(self, ridge: float | None = None) -> ExpectedProjector:
        tables = reader(self.donor), reader(self.target)
        ridge = self.ridge if ridge is None else ridge
        return aligned_projector(self.projector, *tables, rows=len(self.donor), ridge=ridge)

    def converted(self, folder: Path, dtype: str) -> tuple[Tensor, Tensor, float]:
        """Return the stored projector, the projector before rounding, and the reported residual."""
        with stored(folder, donor=self.donor, target=self.target) as (first, second):
            found = align(first, second, rows=len(self.donor), ridge=self.ridge)
        source = next(key for key, value in TORCH.items() if value == self.projector.dtype)
        data = carry(NAME, to_bytes(self.projector), source, found, dtype)
        shape = len(self.projector), self.target.shape[1]
        exact = self.projector.double() @ torch.from_numpy(found.map) * math.sqrt(shape[1] / self.donor.shape[1])
        return torch.frombuffer(bytearray(data), dtype=TORCH[dtype]).view(shape), exact, found.residual

    def faults(self, tensor: Tensor) -> list[str]:
        return list(projector_faults(NAME, tensor, self.expected()))


def make_case(
    *,
    rows: int = 3000,
    donor_width: int = 96,
    width: int = 40,
    features: int = 30,
    dtype: torch.dtype = torch.bfloat16,
    condition: float = 1.0,
    mean: float = 0.0,
    noise: float = 0.3,
    ridge: float = 0.0,
) -> Case:
    donor = (ill_conditioned(rows, donor_width, condition, seed=0)[0] + mean).to(dtype)
    truth = random(donor_width, width, seed=3, dtype=torch.float64)
    target = donor.double() @ truth
    target += noise * target.std() * random(rows, width, seed=4, dtype=torch.float64)
    return Case(donor, target.to(dtype), random(features, donor_width, seed=5, dtype=dtype), ridge)


CASES: dict[str, Callable[[], Case]] = {
    "bfloat16": make_case,
    "float16": lambda: make_case(dtype=torch.float16),
    "float32": lambda: make_case(dtype=torch.float32),
    "a perfect fit": lambda: make_case(dtype=torch.float32, noise=0.0),
    "wider than the donor": lambda: make_case(donor_width=40, width=96),
    "ill-conditioned": lambda: make_case(dtype=torch.float32, condition=1e4),
    "far from the origin": lambda: make_case(dtype=torch.float32, mean=3.0),
    "a ridge": lambda: make_case(ridge=0.03),
    "fewer rows than columns, and a ridge": lambda: make_case(rows=80, ridge=1e-4),
    "a block and a row": lambda: make_case(rows=1025),
    "as wide as the donor, and square": lambda: make_case(donor_width=40, width=40, features=40),
}


@pytest.fixture(params=list(CASES))
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


@pytest.mark.parametrize("dtype", list(TORCH))
def test_the_stored_projector_is_correct(case: Case, dtype: str, tmp_path: Path) -> None:
    assert case.faults(case.converted(tmp_path, dtype)[0]) == []


def test_both_computations_agree_well_within_the_uncertainty(case: Case, tmp_path: Path) -> None:
    _, exact, residual = case.converted(tmp_path, "F32")
    expected = case.expected()
    assert ((exact - expected.projector_VH).abs() <= expected.uncertainty_VH / 5).all()
    assert expected.uncertainty_VH.norm() < 1e-5 * expected.projector_VH.norm()
    low, high = expected.residual
    assert low * (1 - 1e-6) <= residual <= high * (1 + 1e-6)
    assert high - low < 1e-4


def test_the_expected_projector_is_least_squares(case: Case) -> None:
    table, target = case.donor.double(), case.target.double()
    pull = math.sqrt(case.ridge * float(table.square().sum(0).mean()))
    table = torch.cat([table, pull * torch.eye(table.shape[1], dtype=torch.float64)])
    padded = torch.cat([target, torch.zeros(table.shape[1], target.shape[1], dtype=torch.float64)])
    map_ = torch.linalg.lstsq(table, padded, driver="gelsd").solution
    exact = case.projector.double() @ map_ * math.sqrt(target.shape[1]) / math.sqrt(table.shape[1])
    expected = case.expected()
    assert ((exact - expected.projector_VH).abs() <= expected.uncertainty_VH).all()
    left = float((case.donor.double() @ map_ - target).norm() / target.norm())
    assert expected.residual[0] * (1 - 1e-9) <= left <= expected.residual[1] * (1 + 1e-9)


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("steps", [1, -1, 2, -2])
def test_one_element_off_by_one_ulp_is_named(dtype: str, steps: int, tmp_path: Path) -> None:
    case = make_case()
    right = case.converted(tmp_path, dtype)[0]
    for row, column in ((0, 0), (17, 3), (29, 39)):
        wrong = right.clone()
        wrong.view(INTEGERS[dtype])[row, column] += steps
        (fault,) = case.faults(wrong)
        assert fault.startswith(f"{NAME}: 1 of 1200 elements are not the donor's projector, aligned; the first, ")
        assert f"[{row}, {column}], is {float(wrong[row, column]):.9g}, expected " in fault


def rescaled(factor: float) -> Callable[[Case, Tensor], Tensor]:
    return lambda _, right: (right.double() * factor).to(right.dtype)


def with_other_ridge(case: Case, right: Tensor) -> Tensor:
    return case.expected(ridge=case.ridge + 0.01).projector_VH.to(right.dtype)


def with_opposite_sign(case: Case, _: Tensor) -> Tensor:
    return Case(case.donor, case.target, case.projector.T.contiguous()).expected().projector_VH.bfloat16()


def from_fewer_rows(case: Case, right: Tensor) -> Tensor:
    fewer = Case(case.donor[:-1], case.target[:-1], case.projector).expected()
    return fewer.projector_VH.to(right.dtype)


def in_opposite_direction(case: Case, right: Tensor) -> Tensor:
    back = torch.linalg.lstsq(case.target.double(), case.donor.double()).solution
    return (case.projector.double() @ back.T).to(right.dtype)


def with_nan(_: Case, right: Tensor) -> Tensor:
    wrong = right.clone()
    wrong[29, 7] = math.nan
    return wrong


MISTAKES: dict[str, Callable[[Case, Tensor], Tensor]] = {
    "no scale": rescaled(math.sqrt(96 / 40)),
    "the scale upside down": rescaled(96 / 40),
    "the rounded scales of bfloat16": rescaled(1.004),
    "negated": rescaled(-1.0),
    "another ridge": with_other_ridge,
    "a row less": from_fewer_rows,
    "the map from target to donor": in_opposite_direction,
    "zeros": lambda _, right: torch.zeros_like(right),
    "NaN": with_nan,
    "infinity": rescaled(math.inf),
    "rows in another order": lambda _, right: right.roll(1, 0),
    "columns in another order": lambda _, right: right.roll(1, 1),
}


@pytest.mark.parametrize("mistake", list(MISTAKES))
@pytest.mark.parametrize("dtype", list(TORCH))
def test_every_mistake_is_detected(mistake: str, dtype: str, tmp_path: Path) -> None:
    case = make_case()
    right = case.converted(tmp_path, dtype)[0]
    wrong = MISTAKES[mistake](case, right)
    assert wrong.dtype == right.dtype
    (fault,) = case.faults(wrong)
    assert "elements are not the donor's projector, aligned" in fault


def test_a_transposed_projector_is_detected(tmp_path: Path) -> None:
    square = CASES["as wide as the donor, and square"]()
    right = square.converted(tmp_path, "BF16")[0]
    assert square.faults(right) == []
    assert "1600 elements" in square.faults(right.T)[0]
    # The donor's projector mistaken for its transpose fails too.
    assert "1600 elements" in square.faults(with_opposite_sign(square, right))[0]
    assert make_case().faults(torch.zeros(40, 30)) == [f"{NAME} has shape [40, 30], expected [30, 40]"]


def test_a_value_rounded_twice_is_detected() -> None:
    # Just above the middle of 1 and the next bfloat16; float32 has the middle itself, which goes down to 1.
    exact = torch.full((1, 1), 1 + 2.0**-8 + 2.0**-30, dtype=torch.float64)
    expected = ExpectedProjector(exact, torch.zeros_like(exact), (0.0, 0.0))
    assert list(projector_faults(NAME, torch.tensor([[1 + 2.0**-7]]).bfloat16(), expected)) == []
    assert len(list(projector_faults(NAME, exact.float().bfloat16(), expected))) == 1


@pytest.mark.parametrize("spoil", ["dependent columns", "NaN in the donor", "NaN in the target", "nearly dependent"])
def test_a_tensor_that_cannot_be_compared_is_a_fault(spoil: str) -> None:
    case = make_case(dtype=torch.float32)
    if spoil == "dependent columns":
        case.donor[:, 3] = case.donor[:, 4]
    elif spoil == "nearly dependent":
        case.donor[:, 3] = case.donor[:, 4] + 1e-6 * case.donor[:, 3]
    elif spoil == "NaN in the donor":
        case.donor[2999, 5] = math.nan
    else:
        case.target[2999, 5] = math.nan
    found = case.expected().projector_VH.float()
    (fault,) = case.faults(found)
    assert fault.startswith(f"{NAME} cannot be judged: ")


def test_degenerate_tables_give_no_projector() -> None:
    case = make_case()
    case.donor[:, 3] = 0
    expected = case.expected()
    assert expected.projector_VH.shape == expected.uncertainty_VH.shape == (30, 40)
    assert expected.projector_VH.isnan().all()
    assert all(map(math.isnan, expected.residual))


def test_a_zero_projector_stays_zero() -> None:
    case = make_case()
    case = Case(case.donor, case.target, torch.zeros_like(case.projector))
    assert case.faults(torch.zeros(30, 40)) == []
    assert "1 of 1200 elements" in case.faults(torch.eye(30, 40) * torch.eye(30)[:, :1])[0]


def test_each_row_is_read_once_and_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("t5g2convert.parity.checks.aligned_projector.ROWS_AT_ONCE", 700)
    case = make_case()
    requested: dict[str, list[tuple[int, int]]] = {"donor": [], "target": []}

    def counting(name: str, table: Tensor) -> RowReader:
        def rows(start: int, stop: int) -> Tensor:
            requested[name].append((start, stop))
            return table[start:stop]

        return rows

    readers = counting("donor", case.donor), counting("target", case.target)
    found = aligned_projector(case.projector, *readers, rows=2900, ridge=0.0)
    for ranges in requested.values():
        read = [(start, stop) for start, stop in ranges if stop > start]
        assert read == list(pairwise([*range(0, 2900, 700), 2900]))
    fewer = Case(case.donor[:2900], case.target[:2900], case.projector).expected()
    assert ((found.projector_VH - fewer.projector_VH).abs() <= fewer.uncertainty_VH).all()


def test_checkpoint_tables_are_read_as_stored(tmp_path: Path) -> None:
    case = make_case()
    tables = []
    for name, table in (("donor", case.donor), ("target", case.target)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        save_file({"embed_tokens.weight": table}, tmp_path / name / "model.safetensors")
        weights = Weights(open_checkpoint(tmp_path / name))
        tables.append(lambda start, stop, weights=weights: weights.rows("embed_tokens.weight", start, stop))
    found = aligned_projector(case.projector, *tables, rows=3000, ridge=0.0)
    assert torch.equal(found.projector_VH, case.expected().projector_VH)


@pytest.mark.parametrize("dtype", list(TORCH))
def test_the_spacing_is_the_distance_to_the_next_number(dtype: str) -> None:
    kind = TORCH[dtype]
    if dtype == "F32":
        bits = torch.randint(0, 0x7F7F_FFFF, (100_000,), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    else:
        bits = torch.arange(2**15 - 1, dtype=torch.int16)
    values, above = bits.view(kind).double(), (bits + 1).view(kind).double()
    finite = torch.isfinite(values) & torch.isfinite(above)
    assert finite.sum() > 30_000
    for sign in (1, -1):
        assert torch.equal(_spacing(sign * values[finite], kind), (above - values)[finite])
