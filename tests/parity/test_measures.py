import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from t5g2convert.parity.measures import BLOCK_TOKENS, Difference, Distributions
from t5g2convert.parity.reports.report import Drift

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VOCAB = 53


def of(*pieces: tuple[list[float], list[float]], dtype: torch.dtype = torch.float32) -> Difference:
    difference = Difference()
    for expected, found in pieces:
        difference.add(torch.tensor(expected, dtype=dtype), torch.tensor(found, dtype=dtype))
    return difference


# Difference


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_tensors_have_zero_difference(dtype: torch.dtype) -> None:
    states = torch.randn(7, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    difference = Difference()
    difference.add(states, states.clone())
    assert (difference.max_abs, difference.relative, difference.compared) == (0.0, 0.0, 35)
    assert difference.within(0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_largest_distance_of_all_pieces_counts(dtype: torch.dtype) -> None:
    difference = of(([1, 2], [1, 2]), ([4, -8], [4, -7]), ([0.5], [0.75]), dtype=dtype)
    assert (difference.max_abs, difference.peak, difference.compared) == (1.0, 8.0, 5)
    assert difference.relative == 0.125


def test_one_step_of_bfloat16_is_measured() -> None:
    one = torch.tensor([1.0], dtype=torch.bfloat16)
    difference = Difference()
    difference.add(one, (one.view(torch.int16) + 1).view(torch.bfloat16))
    assert difference.max_abs == 2**-7
    assert not difference.within(0)


def test_the_tolerance_is_relative_to_the_largest_expected_value() -> None:
    difference = of(([4, -8], [4, -7]))
    assert difference.within(0.125)
    assert not difference.within(0.1249)
    assert not difference.within(0)


def test_a_large_found_value_does_not_raise_the_tolerance() -> None:
    difference = of(([1.0], [1000.0]))
    assert difference.relative == 999
    assert not difference.within(0.999)


def test_expected_zeros_have_no_tolerance() -> None:
    difference = of(([0.0, 0.0], [0.0, 1e-30]))
    assert difference.relative == difference.max_abs == pytest.approx(1e-30)
    assert not difference.within(0.999)
    assert of(([0.0, -0.0], [-0.0, 0.0])).within(0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "pieces",
    [
        lambda bad: [([1.0, bad], [1.0, 2.0])],
        lambda bad: [([1.0, 2.0], [1.0, bad])],
        lambda bad: [([1.0, bad], [1.0, bad])],
        lambda bad: [([bad], [bad])],
        lambda bad: [([bad], [1.0]), ([5.0], [5.0])],
        lambda bad: [([5.0], [5.0]), ([1.0], [bad])],
    ],
    ids=["expected", "found", "both", "alone", "first", "last"],
)
def test_values_that_are_not_finite_are_never_within_tolerance(value: float, pieces: object) -> None:
    assert callable(pieces)
    difference = of(*pieces(value))
    assert difference.max_abs == difference.relative == math.inf
    assert not any(difference.within(tolerance) for tolerance in (0, 0.5, 0.999, 1e300, math.inf))
    assert difference.drift("x") == Drift("x", math.inf, math.inf)


def test_a_distance_too_large_for_float32_is_not_within_tolerance() -> None:
    assert not of(([3e38], [-3e38])).within(0.999)


def test_an_empty_comparison_is_not_within_tolerance() -> None:
    assert not Difference().within(0.999)
    difference = of(([], []))
    assert (difference.compared, difference.max_abs) == (0, 0.0)
    assert not difference.within(0.999)


def test_different_shapes_are_not_compared() -> None:
    with pytest.raises(ValueError, match=r"\(2, 1\) and \(2,\)"):
        Difference().add(torch.zeros(2, 1), torch.zeros(2))


@given(st.lists(st.tuples(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6)), min_size=1, max_size=30), st.data())
def test_pieces_of_any_size_give_the_same_as_the_whole(values: list[tuple[float, float]], data: st.DataObject) -> None:
    pairs = torch.tensor(values, dtype=torch.float32)
    cut = data.draw(st.integers(0, len(values)))
    whole, pieces = Difference(), Difference()
    whole.add(pairs[:, 0], pairs[:, 1])
    for part in (pairs[:cut], pairs[cut:]):
        pieces.add(part[:, 0], part[:, 1])
    assert vars(pieces) == vars(whole)
    assert whole.max_abs == float((pairs[:, 0] - pairs[:, 1]).abs().max())
    assert whole.peak == float(pairs[:, 0].abs().max())


def test_figures_have_every_measure() -> None:
    difference = of(([4, -8], [4, -7]))
    drifts = (difference.drift("layers.0"),)
    figures = difference.figures(departs="layers.0", drifts=drifts, kl=0.5, agreement=0.25)
    assert (figures.max_abs, figures.relative, figures.compared) == (1.0, 0.125, 2)
    assert (figures.kl, figures.agreement, figures.departs, figures.drifts) == (0.5, 0.25, "layers.0", drifts)


# Distributions


def random_logits(tokens: int, seed: int, spread: float = 3.0, vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(tokens, vocab, generator=generator) * spread for _ in range(2))
    return a, b, torch.randint(vocab, (tokens,), generator=generator)


def gathered(a: Tensor, b: Tensor, labels: Tensor | None, cuts: list[int]) -> Distributions:
    edges = [0, *sorted(cuts), a.shape[1]]
    tokens = Distributions(a.shape[0], labels)
    for start, stop in pairwise(edges):
        tokens.add(start, a[:, start:stop], b[:, start:stop])
    return tokens


def plain_kl(a: Tensor, b: Tensor) -> Tensor:
    log_p, log_q = functional.log_softmax(a.double(), -1), functional.log_softmax(b.double(), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def assert_plain(tokens: Distributions, a: Tensor, b: Tensor, labels: Tensor) -> None:
    expected = plain_kl(a, b)
    torch.testing.assert_close(tokens.kl_of_each, expected, rtol=1e-10, atol=1e-12)
    assert tokens.kl == pytest.approx(float(expected.mean()), rel=1e-10)
    assert tokens.agreement == float((a.argmax(-1) == b.argmax(-1)).double().mean())
    for found, logits in zip(tokens.perplexities, (a, b), strict=True):
        assert found == pytest.approx(float(functional.cross_entropy(logits.double(), labels).exp()), rel=1e-10)


@given(
    seed=st.integers(0, 2**16),
    tokens=st.sampled_from([1, 2, 9]),
    cuts=st.lists(st.integers(1, VOCAB - 1), unique=True, max_size=9),
    spread=st.sampled_from([0.01, 1.0, 30.0]),
)
def test_slices_of_any_size_equal_torch_on_the_whole(seed: int, tokens: int, cuts: list[int], spread: float) -> None:
    a, b, labels = random_logits(tokens, seed, spread)
    assert_plain(gathered(a, b, labels, cuts), a, b, labels)


@pytest.mark.parametrize("tokens", [1, BLOCK_TOKENS - 1, BLOCK_TOKENS, BLOCK_TOKENS + 1, 2 * BLOCK_TOKENS + 3])
def test_blocks_of_tokens_are_put_together(tokens: int) -> None:
    a, b, labels = random_logits(tokens, tokens)
    assert_plain(gathered(a, b, labels, [7, 8, 31]), a, b, labels)
    half = torch.arange(tokens) % 2 == 0
    b[half] = a[half]
    found = gathered(a, b, labels, [7, 8, 31])
    assert torch.count_nonzero(found.kl_of_each[half]) == 0
    assert bool((found.kl_of_each[~half] > 0.1).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_of_every_dtype_are_widened_first(dtype: torch.dtype) -> None:
    a, b, labels = random_logits(5, 1)
    a, b = a.to(dtype), b.to(dtype)
    assert_plain(gathered(a, b, labels, [20]), a, b, labels)


@pytest.mark.parametrize("spread", [1e-6, 1.0, 1e4, 1e30])
def test_identical_logits_have_exactly_zero_kl(spread: float) -> None:
    a, _, labels = random_logits(300, 2, spread)
    tokens = gathered(a, a.clone(), None, [3, 17, 40])
    assert (tokens.kl, tokens.agreement) == (0.0, 1.0)
    assert torch.count_nonzero(tokens.kl_of_each) == 0
    if spread < 100:
        one, other = gathered(a, a.clone(), labels, [3, 17, 40]).perplexities
        assert one == other > 1


def test_kl_is_of_the_first_against_the_second() -> None:
    a, b, _ = random_logits(4, 3)
    there, back = gathered(a, b, None, [9]).kl, gathered(b, a, None, [9]).kl
    assert there == pytest.approx(float(plain_kl(a, b).mean()))
    assert back == pytest.approx(float(plain_kl(b, a).mean()))
    assert there != pytest.approx(back, rel=1e-3)


def test_huge_logits_do_not_overflow() -> None:
    a = torch.tensor([[0.0, 1e30, 2e30], [-1e30, -2e30, -3e30], [88000.0, 88001.0, 0.0]])
    b = a.flip(-1)
    for cuts in ([], [1], [2], [1, 2]):
        found = gathered(a, b, None, cuts)
        assert bool(torch.isfinite(found.kl_of_each).all())
        torch.testing.assert_close(found.kl_of_each, plain_kl(a, b), rtol=1e-10, atol=0)
        assert found.agreement == 1 / 3


def test_a_perplexity_beyond_every_float_is_infinite() -> None:
    a = torch.tensor([[0.0, 5000.0]])
    found = gathered(a, torch.zeros(1, 2), torch.tensor([0]), [1])
    one, other = found.perplexities
    assert one == math.inf
    assert other == pytest.approx(2.0)


@pytest.mark.parametrize("cuts", [[], [1], [2], [3], [1, 2, 3]])
def test_the_first_of_equally_probable_tokens_wins_in_any_slice(cuts: list[int]) -> None:
    a = torch.tensor([[0.0, 5.0, 1.0, 5.0]])
    assert gathered(a, torch.tensor([[0.0, 6.0, 1.0, 5.0]]), None, cuts).agreement == 1
    assert gathered(a, torch.tensor([[0.0, 5.0, 1.0, 6.0]]), None, cuts).agreement == 0


@pytest.mark.parametrize("side", [0, 1])
def test_nan_logits_give_no_kl(side: int) -> None:
    pair = list(random_logits(3, 4)[:2])
    pair[side][1, 20] = math.nan
    assert math.isnan(gathered(pair[0], pair[1], None, [10]).kl)
