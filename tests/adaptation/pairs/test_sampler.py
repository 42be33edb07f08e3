from collections import Counter
from fractions import Fraction

import pytest

from t5g2convert.adaptation.pairs.sampler import FixedOrder, PairSampler, chosen

ONE = (Fraction(1),)


@pytest.mark.parametrize("held", [0, 7])
def test_every_pair_is_read_once_an_epoch_and_held_out_ones_never(held: int) -> None:
    sampler = PairSampler([40], ONE, [held], seed=3)
    assert sampler.trained == {0: 40 - held}
    out = sampler.held_out(0)
    assert len(set(out)) == held
    orders = []
    for epoch in range(3):
        size = 40 - held
        read = [sampler.pair(epoch * size + i) for i in range(size)]
        assert {corpus for corpus, _ in read} == {0}
        numbers = [number for _, number in read]
        assert sorted(numbers) == sorted(set(range(40)) - set(out))
        orders.append(tuple(numbers))
    assert len(set(orders)) == 3


def test_the_seed_decides_which_pairs_are_held_out_and_the_order() -> None:
    one, other = (PairSampler([100], ONE, [10], seed=seed) for seed in (0, 1))
    assert one.held_out(0) != other.held_out(0)
    assert [one.pair(i) for i in range(90)] != [other.pair(i) for i in range(90)]


def test_the_pairs_held_out_are_the_same_if_fewer_are() -> None:
    few, many = (PairSampler([100], ONE, [held], seed=0) for held in (5, 10))
    assert many.held_out(0)[:5] == few.held_out(0)


def test_corpora_are_drawn_by_their_weights_and_each_has_its_own_epochs() -> None:
    sampler = PairSampler([10, 0, 30], [Fraction(1, 4), Fraction(1, 2), Fraction(1, 4)], [0, 0, 6], seed=5)
    assert sampler.shares == {0: Fraction(1, 2), 2: Fraction(1, 2)}
    read = [sampler.pair(i) for i in range(48)]
    assert Counter(corpus for corpus, _ in read) == {0: 24, 2: 24}
    second = Counter(number for corpus, number in read if corpus == 2)
    assert second == dict.fromkeys(set(range(30)) - set(sampler.held_out(2)), 1)
    assert max(Counter(number for corpus, number in read if corpus == 0).values()) == 3


def test_a_choice_has_each_pair_once_and_at_most_all() -> None:
    assert sorted(chosen(9, 20, seed=1)) == list(range(9))
    assert len(set(chosen(1000, 20, seed=1))) == 20
    order = FixedOrder([4, 2], corpus=1)
    assert [order.pair(i) for i in range(2)] == [(1, 4), (1, 2)]
