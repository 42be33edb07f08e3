import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from t5g2convert.conversion.write.finite import first_nonfinite

TORCH = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
LARGEST = {dtype: torch.finfo(TORCH[dtype]).max for dtype in TORCH}


def to_bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(torch.uint8).numpy().tobytes())


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
def test_every_16_bit_value_is_judged_as_by_torch(dtype: str) -> None:
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(TORCH[dtype])
    for value in every[~torch.isfinite(every)]:
        what = "NaN" if torch.isnan(value) else "infinity"
        assert first_nonfinite(to_bytes(value.reshape(1)), dtype) == (0, what)
    numbers = to_bytes(every[torch.isfinite(every)])
    assert first_nonfinite(numbers, dtype) is None


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=60))
def test_any_float32_is_judged_as_by_torch(bits: list[int]) -> None:
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
def test_the_first_of_several_is_told_wherever_it_stands(dtype: str, value: float) -> None:
    for place in (0, 1, 62, 63):
        values = torch.full((64,), LARGEST[dtype], dtype=TORCH[dtype])
        values[place] = value
        values[63] = float("nan")
        data = to_bytes(values)
        what = "NaN" if place == 63 or value != value else "infinity"
        assert first_nonfinite(data, dtype) == (place, what)


@pytest.mark.parametrize("dtype", list(TORCH))
def test_a_piece_of_nothing_holds_nothing(dtype: str) -> None:
    assert first_nonfinite(memoryview(b""), dtype) is None
