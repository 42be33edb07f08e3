"""Spare rows that look alike are fill; rows unlike most others may be trained."""

import math
import struct
from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from t5g2convert.conversion.plan.spare_rows import _decoded, rows_that_stand_out

Rows = NDArray[np.float64]
ROWS, WIDTH = 64, 96


def stored(rows: Rows, dtype: str = "BF16") -> bytes:
    values = rows.astype("<f4")
    if dtype == "BF16":
        return (values.view("<u4") >> 16).astype("<u2").tobytes()
    return values.astype("<f2").tobytes() if dtype == "F16" else values.tobytes()


def normal(seed: int = 0) -> Rows:
    return np.random.default_rng(seed).normal(0, 0.25, (ROWS, WIDTH))


def one_mean(seed: int = 0) -> Rows:
    """What transformers' resize makes of new rows: the mean of the others, and hardly any noise."""
    generator = np.random.default_rng(seed)
    return generator.normal(0, 0.1, WIDTH) + generator.normal(0, 1e-4, (ROWS, WIDTH))


FILLS: dict[str, Callable[[], Rows]] = {
    "normal": normal,
    "uniform": lambda: np.random.default_rng(1).uniform(-1, 1, (ROWS, WIDTH)),
    "laplace": lambda: np.random.default_rng(1).laplace(0, 0.2, (ROWS, WIDTH)),
    "one-mean": one_mean,
    "zeros": lambda: np.zeros((ROWS, WIDTH)),
    "one-row": lambda: np.repeat(normal()[:1], ROWS, 0),
    "tiny": lambda: normal() * 1e-20,
}


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("fill", FILLS)
def test_fill_looks_alike_whatever_it_is(fill: str, dtype: str) -> None:
    assert rows_that_stand_out(stored(FILLS[fill](), dtype), dtype, WIDTH) == []


@pytest.mark.parametrize("seed", range(20))
def test_random_rows_look_alike_whatever_the_seed(seed: int) -> None:
    assert rows_that_stand_out(stored(normal(seed)), "BF16", WIDTH) == []


def trained(rows: Rows, *numbers: int) -> Rows:
    """Rows of another length than random fill of 0.25, in a direction of their own."""
    rows[list(numbers)] = np.random.default_rng(9).normal(0.05, 0.04, (len(numbers), WIDTH))
    return rows


@pytest.mark.parametrize("fill", ["normal", "one-mean", "zeros", "one-row"])
@pytest.mark.parametrize("numbers", [(1,), (0, 63), tuple(range(5, 25))])
def test_trained_rows_stand_out(fill: str, numbers: tuple[int, ...]) -> None:
    assert rows_that_stand_out(stored(trained(FILLS[fill](), *numbers)), "BF16", WIDTH) == list(numbers)


def test_where_most_rows_are_trained_the_others_stand_out() -> None:
    found = rows_that_stand_out(stored(trained(normal(), *range(40))), "BF16", WIDTH)
    assert found == list(range(40, 64))


def test_a_constant_row_of_the_same_length_stands_out() -> None:
    rows = normal()
    rows[7] = 0.25
    assert rows_that_stand_out(stored(rows), "BF16", WIDTH) == [7]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_row_without_numbers_stands_out(value: float) -> None:
    rows = normal()
    rows[3, 5] = value
    assert rows_that_stand_out(stored(rows), "BF16", WIDTH) == [3]
    assert rows_that_stand_out(stored(np.full((4, WIDTH), value), "F32"), "F32", WIDTH) == [0, 1, 2, 3]


def test_rows_that_were_all_trained_alike_are_not_found() -> None:
    assert rows_that_stand_out(stored(trained(normal(), *range(ROWS))), "BF16", WIDTH) == []


def test_numbers_are_read_as_they_are_stored() -> None:
    row = [1.0, -2.0, 0.5, 3.0]
    data = {"F32": struct.pack("<4f", *row), "F16": struct.pack("<4e", *row),
            "BF16": b"".join(struct.pack("<f", value)[2:] for value in row)}  # fmt: skip
    assert {dtype: list(_decoded(text, dtype)) for dtype, text in data.items()} == dict.fromkeys(data, row)
