import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.models.gemma3.modeling_gemma3 import Gemma3TextScaledWordEmbedding

from t5g2convert.conversion.write.numerics import caster, first_nonfinite, rounded, scaled_row
from t5g2convert.errors import CheckpointError

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LARGEST = {dtype: torch.finfo(TORCH[dtype]).max for dtype in TORCH}


def to_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


def all_16_bit_values(dtype: torch.dtype) -> torch.Tensor:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    return every[torch.isfinite(every)]


@pytest.mark.parametrize("source", ["BF16", "F16"])
@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
def test_casting_every_16_bit_value_is_torchs_cast(source: str, target: str) -> None:
    values = all_16_bit_values(TORCH[source])
    values = values[torch.isfinite(values.to(TORCH[target]))]
    assert len(values) > 30_000
    assert bytes(caster("x", source, target)(memoryview(to_bytes(values)))) == to_bytes(values.to(TORCH[target]))


@pytest.mark.parametrize("target", ["BF16", "F16"])
def test_casting_float32_is_torchs_cast(target: str) -> None:
    bits = np.random.default_rng(0).integers(0, 2**32, 500_000, dtype=np.uint32)
    values = torch.from_numpy(bits.view(np.float32))
    values = values[torch.isfinite(values.to(TORCH[target]))]
    assert len(values) > 50_000
    assert bytes(caster("x", "F32", target)(memoryview(to_bytes(values)))) == to_bytes(values.to(TORCH[target]))


@pytest.mark.parametrize(
    ("source", "target", "value"),
    [("F32", "BF16", 3.4e38), ("F32", "F16", 65520.0), ("BF16", "F16", 1e30)],
)
def test_I9_a_number_that_becomes_infinity_by_a_cast_names_the_tensor(source: str, target: str, value: float) -> None:
    piece = memoryview(to_bytes(torch.tensor([1.0, value, float("inf")], dtype=TORCH[source])))
    with pytest.raises(CheckpointError, match=r"tensor a\.b: has a value too large"):
        caster("a.b", source, target)(piece)


@pytest.mark.parametrize("source", list(TORCH))
@pytest.mark.parametrize("target", list(TORCH))
def test_a_cast_and_a_scaled_row_keep_nan_and_infinity(source: str, target: str) -> None:
    special = torch.tensor([float("inf"), float("-inf"), 1.0, float("nan")], dtype=TORCH[source])
    for result in (
        caster("x", source, target)(memoryview(to_bytes(special))),
        scaled_row(to_bytes(special), source, target),
    ):
        found = torch.frombuffer(bytearray(result), dtype=TORCH[target])
        assert torch.isposinf(found).tolist() == [True, False, False, False]
        assert torch.isneginf(found).tolist() == [False, True, False, False]
        assert torch.isnan(found).tolist() == [False, False, False, True]


def test_a_product_that_only_rounding_makes_infinite_is_too_large() -> None:
    row = torch.tensor([2.0**127 * 1.984375] * 4, dtype=torch.float32)  # doubled it exceeds the largest bfloat16
    assert torch.isinf(row.to(torch.bfloat16) * 2).all()
    with pytest.raises(CheckpointError, match="too large"):
        scaled_row(to_bytes(row), "F32", "BF16")
    with pytest.raises(CheckpointError, match="too large"):
        scaled_row(to_bytes(torch.tensor([3.4e38])), "F32", "BF16")


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
@pytest.mark.parametrize("width", [640, 1152, 2560, 3840, 5376, 24, 7])
def test_the_scaled_row_is_what_gemma_3_computes(width: int, dtype: str) -> None:
    embedding = Gemma3TextScaledWordEmbedding(3, width, 0, embed_scale=width**0.5).to(TORCH[dtype])
    with torch.no_grad():
        embedding.weight.normal_(0.0, 1.0, generator=torch.Generator().manual_seed(width))
        expected = embedding(torch.tensor([1]))[0]
    assert scaled_row(to_bytes(embedding.weight[1].detach()), dtype, dtype) == to_bytes(expected)


@pytest.mark.parametrize(("width", "scale"), [(640, 25.25), (1152, 34.0), (2560, 50.5), (3840, 62.0), (5376, 73.5)])
def test_the_bfloat16_scales_of_the_real_sizes(width: int, scale: float) -> None:
    row = to_bytes(torch.ones(width, dtype=torch.bfloat16))
    assert scaled_row(row, "BF16", "BF16") == to_bytes(torch.full((width,), scale, dtype=torch.bfloat16))


@pytest.mark.parametrize(("source", "target"), [("BF16", "F32"), ("F32", "BF16"), ("F16", "BF16"), ("F32", "F16")])
def test_a_cast_row_is_cast_before_it_is_scaled(source: str, target: str) -> None:
    row = torch.randn(48, generator=torch.Generator().manual_seed(1)).to(TORCH[source])
    scale = torch.tensor(48**0.5).to(TORCH[target])
    assert scaled_row(to_bytes(row), source, target) == to_bytes(row.to(TORCH[target]) * scale)


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40))
def test_bfloat16_rows_of_any_numbers_are_torchs(values: list[float]) -> None:
    row = torch.tensor(values, dtype=torch.float32).to(torch.bfloat16)
    row = torch.where(torch.isfinite(row), row, torch.zeros_like(row))
    scaled = row * torch.tensor(len(values) ** 0.5).to(torch.bfloat16)
    if torch.isfinite(scaled).all():
        assert scaled_row(to_bytes(row), "BF16", "BF16") == to_bytes(scaled)
    else:
        with pytest.raises(CheckpointError, match="too large"):
            scaled_row(to_bytes(row), "BF16", "BF16")


def nearest(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """Round each value to the nearest number of a 16-bit dtype, ties to even."""
    every = all_16_bit_values(dtype)
    every = every[every.double() >= 0].double().unique().numpy()
    above = np.searchsorted(every, np.abs(values)).clip(1, len(every) - 1)
    low, high = every[above - 1], every[above]
    middle = (low + high) / 2
    upper = (np.abs(values) > middle) | ((np.abs(values) == middle) & (above % 2 == 0))
    return torch.from_numpy(np.copysign(np.where(upper, high, low), values)).to(dtype)


@pytest.mark.parametrize("target", ["BF16", "F16"])
def test_computed_values_are_rounded_once(target: str) -> None:
    every = all_16_bit_values(TORCH[target]).double().unique().numpy()
    middles = (every[1:] + every[:-1]) / 2
    # The midpoint of two numbers, and values too close to it for float32.
    near = [middles, middles * (1 + 2.0**-40), middles * (1 - 2.0**-40), every]
    values = np.concatenate([*near, np.random.default_rng(0).standard_normal(100_000)])
    values = values[np.abs(values) <= every[-1]]
    assert rounded("x", values, target) == to_bytes(nearest(values, TORCH[target]))


def test_computed_values_in_float32_are_torchs_cast() -> None:
    values = np.random.default_rng(0).standard_normal(10_000) * 10.0 ** np.linspace(-50, 37, 10_000)
    assert rounded("x", values, "F32") == to_bytes(torch.from_numpy(values).float())


@pytest.mark.parametrize(
    ("target", "value"), [("BF16", 3.3962e38), ("F16", 65520.0), ("F32", 3.4029e38), ("BF16", 1e300)]
)
def test_a_computed_value_that_becomes_infinity_names_the_tensor(target: str, value: float) -> None:
    for number in (value, -value):
        with pytest.raises(CheckpointError, match=r"tensor a\.b: has a value too large for"):
            rounded("a.b", np.array([[1.0, number]]), target)


@pytest.mark.parametrize("target", ["BF16", "F16", "F32"])
def test_the_largest_number_of_a_dtype_is_not_too_large(target: str) -> None:
    largest = torch.finfo(TORCH[target]).max
    assert rounded("x", np.array([-largest]), target) == to_bytes(torch.tensor([-largest], dtype=TORCH[target]))


# NaN and infinity


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_finiteness_of_every_16_bit_value_equals_torch(dtype: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(TORCH[dtype])
    for value in every[~torch.isfinite(every)]:
        what = "NaN" if torch.isnan(value) else "infinity"
        assert first_nonfinite(memoryview(to_bytes(value.reshape(1))), dtype) == (0, what)
    numbers = memoryview(to_bytes(every[torch.isfinite(every)]))
    assert first_nonfinite(numbers, dtype) is None


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60))
def test_finiteness_of_any_float32_equals_torch(bits: list[int]) -> None:
    data = bytearray(b"".join(word.to_bytes(4, "little") for word in bits))
    values = torch.frombuffer(data, dtype=torch.float32)
    bad = (~torch.isfinite(values)).nonzero()
    found = first_nonfinite(memoryview(data), "F32")
    if not len(bad):
        assert found is None
    else:
        first = int(bad[0])
        assert found == (first, "NaN" if torch.isnan(values[first]) else "infinity")


@pytest.mark.parametrize("dtype", list(TORCH))
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")], ids=str)
def test_the_first_of_several_is_reported_at_any_position(dtype: str, value: float) -> None:
    for place in (0, 1, 62, 63):
        values = torch.full((64,), LARGEST[dtype], dtype=TORCH[dtype])
        values[place] = value
        values[63] = float("nan")
        data = memoryview(to_bytes(values))
        what = "NaN" if place == 63 or value != value else "infinity"
        assert first_nonfinite(data, dtype) == (place, what)


@pytest.mark.parametrize("dtype", list(TORCH))
def test_a_piece_of_nothing_holds_nothing(dtype: str) -> None:
    assert first_nonfinite(memoryview(b""), dtype) is None
