from collections import Counter
from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from t5g2convert.adaptation.ul2.shares import Shares

WEIGHTS = st.lists(st.fractions(Fraction(1, 1000), 1000), min_size=1, max_size=9)


def shares_of(data: st.DataObject) -> Shares:
    weights = data.draw(WEIGHTS)
    phases = data.draw(st.lists(st.integers(0, 2**64 - 1), min_size=len(weights), max_size=len(weights)))
    return Shares(weights, phases)


@given(st.data())
def test_after_any_number_of_draws_each_corpus_has_its_share(data: st.DataObject) -> None:
    shares = shares_of(data)
    found: Counter[int] = Counter()
    for number in range(200):
        corpus, before = shares.draw(number)
        # As many of its draws came before as were counted, so each text of a corpus is drawn once and in order.
        assert before == found[corpus]
        found[corpus] += 1
        for other, share in enumerate(shares.shares):
            assert abs(found[other] - (number + 1) * share) < max(1, len(shares.shares) - 1)


@given(st.data(), st.integers(0, 2**64 - 200))
def test_draws_far_from_the_start_are_computed_alone(data: st.DataObject, first: int) -> None:
    shares = shares_of(data)
    drawn = [shares.draw(number) for number in range(first, first + 50)]
    for corpus, share in enumerate(shares.shares):
        numbers = [before for which, before in drawn if which == corpus]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) if numbers else True
        assert all(abs(before - first * share) < 50 + len(shares.shares) for before in numbers)


def test_one_corpus_has_all_draws() -> None:
    shares = Shares([Fraction(3)], [2**64 - 1])
    assert [shares.draw(number) for number in (0, 1, 10**18)] == [(0, 0), (0, 1), (0, 10**18)]


def test_phases_move_the_draws() -> None:
    weights = [Fraction(1), Fraction(3)]
    orders = {tuple(Shares(weights, [phase << 62, 0]).draw(number)[0] for number in range(8)) for phase in range(4)}
    assert len(orders) == 4
    assert all(order.count(0) == 2 for order in orders)
