import cmath

import pytest
import torch

from t5g2convert.checkpoint.families.rope_config import Rope
from t5g2convert.reference.rope import rotate, rotation

ROPE = Rope(rope_theta=1e4)


def vectors(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("theta", "factor"), [(1e4, 1.0), (1e6, 8.0)])
def test_every_pair_of_channels_turns_as_a_complex_number(theta: float, factor: float) -> None:
    positions, x = torch.tensor([0, 1, 7, 300]), vectors(1, 1, 4, 6, seed=1)
    turned = rotate(x, rotation(Rope(rope_type="linear", rope_theta=theta, factor=factor), 6, positions, torch.float32))
    for row, position in enumerate(positions.tolist()):
        for pair in range(3):
            before = complex(x[0, 0, row, pair], x[0, 0, row, pair + 3])
            after = complex(turned[0, 0, row, pair], turned[0, 0, row, pair + 3])
            angle = position / (factor * theta ** (2 * pair / 6))
            assert abs(after - before * cmath.rect(1, angle)) < 1e-4


def test_the_first_position_stays_as_it_is() -> None:
    x = vectors(2, 3, 1, 8, seed=2)
    assert torch.equal(rotate(x, rotation(ROPE, 8, torch.tensor([0]), torch.float32)), x)


def test_only_the_distance_counts() -> None:
    q, k = vectors(1, 1, 1, 8, seed=3), vectors(1, 1, 1, 8, seed=4)

    def product(query: int, key: int) -> float:
        turns = rotation(ROPE, 8, torch.tensor([query, key]), torch.float32)
        at_query, at_key = (type(turns)(turns.cos_TD[row], turns.sin_TD[row]) for row in (0, 1))
        return float((rotate(q, at_query) * rotate(k, at_key)).sum())

    assert product(9, 4) == pytest.approx(product(105, 100), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(10, 4), abs=1e-2)


def test_a_factor_divides_the_positions() -> None:
    positions = torch.arange(50)
    plain = rotation(ROPE, 10, positions, torch.float32)
    # A power of two divides without rounding.
    scaled = rotation(
        Rope(rope_type="linear", rope_theta=ROPE.rope_theta, factor=8.0), 10, 8 * positions, torch.float32
    )
    assert torch.equal(scaled.cos_TD, plain.cos_TD)
    assert torch.equal(scaled.sin_TD, plain.sin_TD)


def test_angles_are_taken_in_float32_and_rounded_last() -> None:
    positions = torch.arange(1000, 1020)
    wide, narrow = (rotation(ROPE, 10, positions, dtype) for dtype in (torch.float32, torch.bfloat16))
    assert wide.cos_TD.shape == (20, 10)
    assert torch.equal(narrow.cos_TD, wide.cos_TD.bfloat16())
    assert torch.equal(narrow.sin_TD, wide.sin_TD.bfloat16())
