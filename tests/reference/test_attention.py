import cmath
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from t5g2convert.checkpoint.families.rope_config import Rope
from t5g2convert.reference import attention
from t5g2convert.reference.attention import Keys, attend, attend_fused, rotate, rotation

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


def test_the_first_position_is_not_rotated() -> None:
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


SCALE = 0.8
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def seeded(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def queries(tokens: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return queries: two rows, four heads, width 10."""
    return seeded(2, 4, tokens, 10, seed=1, dtype=dtype)


def keys(count: int, seen: Tensor | None, *, seed: int = 2, dtype: torch.dtype = torch.float32) -> Keys:
    """Return keys and values: two rows, two key-value heads, width 10."""
    k, v = (seeded(2, 2, count, 10, seed=seed + part, dtype=dtype) for part in (0, 100))
    return Keys(k, v, seen)


def triangle(tokens: int) -> Tensor:
    return torch.ones(tokens, tokens, dtype=torch.bool).tril().expand(2, 1, -1, -1)


def plain(q: Tensor, groups: list[Keys], softcap: float | None = None) -> Tensor:
    """Compute one softmax over the keys of all groups, in float64, with repeated heads."""
    k, v = (torch.cat([group[part] for group in groups], 2).double().repeat_interleave(2, 1) for part in (0, 1))
    scores = q.double() @ k.transpose(2, 3) * SCALE
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    seen = torch.cat([group.seen_BTS for group in groups], -1)
    return torch.softmax(scores.masked_fill(~seen, -torch.inf), -1) @ v


def largest(one: Tensor, other: Tensor) -> float:
    assert one.shape == other.shape
    return float((one.double() - other.double()).abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [1, 8, 13])
def test_a_hidden_group_does_not_change_the_other_at_any_length(hidden: int, dtype: torch.dtype) -> None:
    for tokens in range(1, 41):
        q, own = queries(tokens, dtype), keys(tokens, triangle(tokens), dtype=dtype)
        memory = keys(hidden, torch.zeros(2, 1, tokens, hidden, dtype=torch.bool), seed=5, dtype=dtype)
        alone = attend(q, [own], scale=SCALE, softcap=None)
        both = attend(q, [own, memory], scale=SCALE, softcap=None)
        assert torch.equal(both, alone), f"{tokens} tokens"
        assert alone.std() > 0.1


@pytest.mark.parametrize("tokens", [1, 6, 23])
def test_two_groups_that_every_query_sees_are_one_softmax(tokens: int) -> None:
    q, own = queries(tokens), keys(tokens, triangle(tokens))
    seen = torch.ones(2, 1, tokens, 9, dtype=torch.bool)
    seen[1, :, :, 6:] = False
    memory = keys(9, seen, seed=5)
    found = attend(q, [own, memory], scale=SCALE, softcap=None)
    assert largest(found, plain(q, [own, memory])) < 1e-6
    assert largest(found, plain(q, [own])) > 0.1


@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("tokens", [1, 6, 23])
def test_two_groups_are_one_softmax_where_some_queries_see_nothing_of_the_second(
    tokens: int, softcap: float | None
) -> None:
    q, own = queries(tokens), keys(tokens, triangle(tokens))
    seen = torch.ones(2, 1, tokens, 9, dtype=torch.bool)
    seen[0] = False
    seen[1, :, ::2, 4:] = False
    memory = keys(9, seen, seed=5)
    found = attend(q, [own, memory], scale=SCALE, softcap=softcap)
    assert largest(found, plain(q, [own, memory], softcap)) < 1e-6
    alone = attend(q, [own], scale=SCALE, softcap=softcap)
    assert torch.equal(found[0], alone[0])
    assert largest(found[1], alone[1]) > 0.1


def test_a_query_that_sees_nothing_of_the_first_group_sees_the_second() -> None:
    seen = triangle(6).clone()
    seen[..., 2, :] = False
    hidden = torch.ones(2, 1, 6, 9, dtype=torch.bool)
    hidden[:, :, 4] = False
    groups = [keys(6, seen), keys(9, hidden, seed=5)]
    found = attend(queries(6), groups, scale=SCALE, softcap=None)
    assert largest(found, plain(queries(6), groups)) < 1e-6


def test_a_query_that_sees_nothing_at_all_gets_numbers() -> None:
    nothing = torch.zeros(2, 1, 3, 5, dtype=torch.bool)
    for dtype in DTYPES:
        groups = [keys(5, nothing, dtype=dtype), keys(5, nothing, seed=5, dtype=dtype)]
        assert attend(queries(3, dtype), groups, scale=SCALE, softcap=None).isfinite().all()


@pytest.mark.parametrize("factor", [1e-3, 30.0])
def test_shares_hold_for_scores_of_any_size(factor: float) -> None:
    q, own = factor * queries(7), keys(7, triangle(7))
    seen = torch.ones(2, 1, 7, 9, dtype=torch.bool)
    seen[0, :, 3] = False
    groups = [own, keys(9, seen, seed=5)]
    found = attend(q, groups, scale=SCALE, softcap=None)
    assert found.isfinite().all()
    assert largest(found, plain(q, groups)) < 1e-4


@pytest.mark.parametrize("hidden", [False, True])
@pytest.mark.parametrize("rows", [1, 2, 3])
def test_blocks_of_queries_change_nothing(rows: int, hidden: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = torch.ones(2, 1, 7, 9, dtype=torch.bool)
    seen[1] = not hidden
    q, groups = queries(7), [keys(7, triangle(7)), keys(9, seen, seed=5)]
    whole = attend(q, groups, scale=SCALE, softcap=None)
    taken = []
    scores = attention._scores
    monkeypatch.setattr(attention, "_scores", lambda q, *rest: taken.append(q.shape[2]) or scores(q, *rest))
    monkeypatch.setattr(attention, "BLOCK_SCORES", rows * 2 * 4 * 16)
    found = attend(q, groups, scale=SCALE, softcap=None)
    assert max(taken) < 7
    assert sum(taken) == (14 if hidden else 7)
    assert largest(found, whole) < 1e-6


def test_a_hidden_group_leaves_the_blocks_of_queries_where_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of another length may round differently: 2048 queries of width 256 did, by 2e-6 in bfloat16."""
    taken: list[tuple[int, int]] = []
    scores = attention._scores
    monkeypatch.setattr(
        attention,
        "_scores",
        lambda q, group, *rest: taken.append((q.shape[2], group.k_BKSD.shape[2])) or scores(q, group, *rest),
    )
    monkeypatch.setattr(attention, "BLOCK_SCORES", 5 * 2 * 4 * 23)
    q, own = queries(23), keys(23, triangle(23))
    hidden = keys(8, torch.zeros(2, 1, 23, 8, dtype=torch.bool), seed=5)
    alone = attend(q, [own], scale=SCALE, softcap=None)
    blocks = taken.copy()
    taken.clear()
    assert torch.equal(attend(q, [own, hidden], scale=SCALE, softcap=None), alone)
    assert blocks == [(5, 23)] * 4 + [(3, 23)]
    assert [block for block in taken if block[1] == 23] == blocks


def test_blocks_are_a_query_long_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    q, own = queries(5), keys(5, triangle(5))
    whole = attend(q, [own], scale=SCALE, softcap=None)
    monkeypatch.setattr(attention, "BLOCK_SCORES", 1)
    assert largest(attend(q, [own], scale=SCALE, softcap=None), whole) < 1e-6


def test_keys_without_a_mask_are_all_seen() -> None:
    q, everything = queries(5), torch.ones(2, 1, 5, 8, dtype=torch.bool)
    found = attend(q, [keys(8, None)], scale=SCALE, softcap=None)
    assert torch.equal(found, attend(q, [keys(8, everything)], scale=SCALE, softcap=None))
    assert largest(found, plain(q, [keys(8, everything)])) < 1e-6


def test_a_second_group_without_a_mask_is_all_seen() -> None:
    q, own, everything = queries(5), keys(5, triangle(5)), torch.ones(2, 1, 5, 9, dtype=torch.bool)
    found = attend(q, [own, keys(9, None, seed=5)], scale=SCALE, softcap=None)
    assert torch.equal(found, attend(q, [own, keys(9, everything, seed=5)], scale=SCALE, softcap=None))


def test_a_shared_mask_and_a_mask_per_row_can_be_combined() -> None:
    q, memory = queries(5), keys(9, torch.ones(2, 1, 5, 9, dtype=torch.bool), seed=5)
    found = attend(q, [keys(5, triangle(5)[:1]), memory], scale=SCALE, softcap=None)
    assert torch.equal(found, attend(q, [keys(5, triangle(5)), memory], scale=SCALE, softcap=None))


def test_a_softcap_bounds_the_scores_before_the_mask() -> None:
    q, own = 5 * queries(8), keys(8, triangle(8))
    found = {softcap: attend(q, [own], scale=SCALE, softcap=softcap) for softcap in (1e-4, 0.5, 3.0, 1e6)}
    for softcap, output in found.items():
        assert largest(output, plain(q, [own], softcap)) < 1e-5
    # The tightest cap makes all visible keys equal; the loosest has no effect.
    means = own.v_BKSD.cumsum(2) / torch.arange(1, 9)[:, None]
    assert largest(found[1e-4], means.repeat_interleave(2, 1)) < 1e-2
    assert largest(found[1e6], attend(q, [own], scale=SCALE, softcap=None)) < 1e-3
    assert all(largest(one, other) > 0.1 for one, other in pairwise(found.values()))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_the_fused_kernel_gives_the_same(heads: int) -> None:
    q, own = queries(11), keys(11, None)
    k, v = (part[:, :1].expand(-1, heads, -1, -1) * torch.arange(1, heads + 1)[:, None, None] for part in own[:2])
    expected = attend(q, [Keys(k, v, triangle(11))], scale=SCALE, softcap=None)
    assert largest(attend_fused(q, k, v, triangle(11), scale=SCALE), expected) < 1e-5
