from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from t5g2convert.adaptation.ul2 import texts
from t5g2convert.adaptation.ul2.texts import Pieces
from t5g2convert.errors import DataError


def ends_of(lengths: list[int]) -> NDArray[Any]:
    return np.cumsum(lengths).astype(np.uint64)


@pytest.fixture(autouse=True)
def _small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(texts, "GROUP", 4)
    monkeypatch.setattr(texts, "AT_ONCE", 8)


def assert_covers(lengths: list[int], longest: int, shortest: int, seed: int, epoch: int) -> None:
    """Check that an epoch reads every token of every document that is long enough once, and crosses no border."""
    pieces = Pieces(ends_of(lengths), longest, shortest, seed)
    numbers = range(epoch * pieces.per_epoch, (epoch + 1) * pieces.per_epoch)
    found = sorted(pieces.text(0, number) for number in numbers)
    assert [pieces.piece(number) for number in range(pieces.per_epoch)] == found
    expected, start = [], 0
    for length in lengths:
        if length >= shortest:
            count = -(-length // longest)
            own = [piece for piece in found if start <= piece[0] < start + length]
            assert len(own) == count
            assert own[0][0] == start
            assert own[-1][1] == start + length
            assert [stop for _, stop in own[:-1]] == [first for first, _ in own[1:]]
            sizes = {stop - first for first, stop in own}
            assert max(sizes) <= longest
            assert min(sizes) >= min(shortest, length)
            assert max(sizes) - min(sizes) <= 1
            expected += own
        start += length
    assert found == expected
    assert pieces.read == sum(stop - first for first, stop in found)
    assert pieces.skipped == sum(length < shortest for length in lengths)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.integers(3, 25), st.integers(0, 2**64 - 1), st.data())
def test_an_epoch_reads_every_piece_of_every_document_once(
    lengths: list[int], longest: int, seed: int, data: st.DataObject
) -> None:
    shortest = data.draw(st.integers(1, (longest + 1) // 2))
    if max(lengths) < shortest:
        with pytest.raises(DataError, match=f"no document of {shortest} tokens or more"):
            Pieces(ends_of(lengths), longest, shortest, seed)
        return
    assert_covers(lengths, longest, shortest, seed, data.draw(st.integers(0, 10**9)))


def test_orders_differ_by_epoch_seed_and_corpus() -> None:
    ends = ends_of([7] * 30)
    orders = {
        tuple(Pieces(ends, 10, 2, seed, corpus=corpus).text(0, epoch * 30 + number)[0] for number in range(30))
        for seed in (1, 2)
        for corpus in (0, 1)
        for epoch in range(3)
    }
    assert len(orders) == 12


def test_a_piece_is_read_in_the_same_place_in_any_order_of_access() -> None:
    pieces = Pieces(ends_of([3, 1, 50, 12, 9, 2, 2, 40, 1, 5]), 10, 2, 3)
    forwards = [pieces.text(0, number) for number in range(60)]
    assert [pieces.text(0, number) for number in reversed(range(60))] == forwards[::-1]
    assert [pieces.length(0, number) for number in range(60)] == [stop - start for start, stop in forwards]


# Constants, not computed: they must never change, or a later version could not resume a run.
def test_orders_of_pieces_never_change() -> None:
    pieces = Pieces(ends_of([3, 1, 25, 8]), 10, 2, 0)
    assert [pieces.text(0, number) for number in range(5)] == [(29, 37), (0, 3), (4, 12), (12, 20), (20, 29)]
