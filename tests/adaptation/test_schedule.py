from collections import Counter

import pytest

from t5g2convert.adaptation.mixture import read_mixture
from t5g2convert.adaptation.schedule import Schedule
from t5g2convert.errors import DataError

MIXTURE = read_mixture()
RAW_LENGTHS = (5, 7, 6, 8, 4)  # of a block: 5 + 7 + 6 + 8 + 4 * 4 = 42 tokens


def test_every_block_holds_the_mixture() -> None:
    schedule = Schedule(MIXTURE, RAW_LENGTHS, 4200, seed=0)
    for block in range(500):
        tasks = [schedule.task(block * 8 + slot) for slot in range(8)]
        assert Counter(tasks) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 4}


@pytest.mark.parametrize("tokens", [42, 83, 84, 42 * 3, 42 * 5 + 41, 42 * 97, 42 * 100 + 1])
def test_an_epoch_reads_every_token_of_every_chunk_once(tokens: int) -> None:
    schedule = Schedule(MIXTURE, RAW_LENGTHS, tokens, seed=3)
    samples = tokens // 42 * 8
    for epoch in range(3):
        numbers = range(epoch * samples, (epoch + 1) * samples)
        assert {schedule.epoch(i) for i in numbers} == {epoch}
        stretches = sorted(schedule.stretch(i) for i in numbers)
        assert [start for start, _ in stretches] == [0, *(stop for _, stop in stretches[:-1])]
        assert stretches[-1][1] == tokens // 42 * 42
        assert all(
            stop - start == RAW_LENGTHS[schedule.task(i)] for i in numbers for start, stop in [schedule.stretch(i)]
        )


def test_a_corpus_smaller_than_a_chunk_is_refused() -> None:
    with pytest.raises(DataError, match=r"has 41 tokens; a block of 8 samples takes 42"):
        Schedule(MIXTURE, RAW_LENGTHS, 41, seed=0)
