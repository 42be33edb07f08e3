import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from itertools import pairwise, permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5g2convert.adaptation.ul2.corruption import Frame, corrupt
from t5g2convert.adaptation.ul2.mixture import Mixture, read_mixture
from t5g2convert.adaptation.ul2.permutation import ROUNDS, permuted
from t5g2convert.adaptation.ul2.sampler import DocumentSampler, Sampler
from t5g2convert.adaptation.ul2.sentinels import Sentinels
from t5g2convert.adaptation.ul2.texts import Chunks
from t5g2convert.errors import DataError, UsageError
from tests.adaptation.chance import excess

MIXTURE = read_mixture()
RAW_LENGTHS = (5, 7, 6, 8, 4)
CHUNK = 42  # 5 + 7 + 6 + 8 + 4 * 4
CHECKOUT = Path(__file__).parents[3]


def sampler_of(mixture: Mixture, raw_lengths: Sequence[int], tokens: int, seed: int) -> Sampler:
    """Return the order of samples of one corpus."""
    return Sampler(mixture, raw_lengths, [Chunks(mixture, raw_lengths, tokens, seed)], seed=seed)


def chunks_of(schedule: Sampler) -> Chunks:
    (texts,) = schedule.texts
    assert isinstance(texts, Chunks)
    return texts


def document_of(seed: int, i: int, count: int) -> int:
    """Return the document of image sample i in one corpus."""
    corpus, document = DocumentSampler([count], seed=seed).document(i)
    assert corpus == 0
    return document


def keys(number: int) -> list[int]:
    """Return the random words of a permutation."""
    return np.random.Philox(key=number).random_raw(ROUNDS).tolist()


def orders(schedule: Sampler, epoch: int) -> tuple[list[int], list[int]]:
    """Return the chunks that the texts of the first task come from, and the tasks of an epoch, in order."""
    first = epoch * chunks_of(schedule).chunks * 8
    numbers = range(first, first + chunks_of(schedule).chunks * 8)
    starts = [schedule.text(i).start for i in numbers if schedule.task(i) == 0]
    lowest = min(starts)
    return [(start - lowest) // chunks_of(schedule).chunk for start in starts], [schedule.task(i) for i in numbers]


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_every_block_holds_the_mixture(seed: int) -> None:
    schedule = sampler_of(MIXTURE, RAW_LENGTHS, 4200, seed)
    for block in range(500):
        tasks = [schedule.task(block * 8 + slot) for slot in range(8)]
        assert Counter(tasks) == {0: 1, 1: 1, 2: 1, 3: 1, 4: 4}


def test_every_order_of_a_block_is_equally_likely() -> None:
    schedule = sampler_of(MIXTURE.model_copy(update={"tasks": MIXTURE.tasks[:4]}), (2, 2, 2, 2), 80, seed=0)
    found = Counter(tuple(schedule.task(block * 4 + slot) for slot in range(4)) for block in range(1200))
    assert excess(found, list(permutations(range(4)))) < 1


def assert_tiles(schedule: Sampler, epoch: int) -> None:
    """Check that an epoch reads every token of every chunk once, in samples of the tasks' lengths."""
    samples = chunks_of(schedule).chunks * schedule.mixture.block
    numbers = range(epoch * samples, (epoch + 1) * samples)
    stretches = sorted(schedule.text(i)[1:] for i in numbers)
    first, last = stretches[0][0], stretches[-1][1]
    assert [start for start, _ in stretches] == [first, *(stop for _, stop in stretches[:-1])]
    assert 0 <= first < chunks_of(schedule).chunk
    assert last - first == chunks_of(schedule).tokens // chunks_of(schedule).chunk * chunks_of(schedule).chunk
    assert last <= chunks_of(schedule).tokens
    for i in numbers:
        _, start, stop = schedule.text(i)
        assert stop - start == schedule.raw_lengths[schedule.task(i)]


def test_tokens_skipped_in_one_epoch_are_read_in_another() -> None:
    schedule = sampler_of(MIXTURE, RAW_LENGTHS, 42 * 2 + 5, seed=3)
    block = schedule.mixture.block
    firsts = [min(schedule.text(2 * epoch * block + i).start for i in range(2 * block)) for epoch in range(600)]
    assert excess(Counter((first,) for first in firsts), [(first,) for first in range(6)]) < 1


@pytest.mark.parametrize("tokens", [42, 83, 84, 42 * 3, 42 * 5 + 41, 42 * 16, 42 * 17, 42 * 97, 42 * 100 + 1])
def test_an_epoch_reads_every_token_of_every_chunk_once(tokens: int) -> None:
    schedule = sampler_of(MIXTURE, RAW_LENGTHS, tokens, seed=3)
    assert (chunks_of(schedule).chunk, chunks_of(schedule).chunks) == (CHUNK, tokens // CHUNK)
    for epoch in (0, 1, 2, 1000):
        assert_tiles(schedule, epoch)


@given(st.data())
def test_any_corpus_is_read_once_per_epoch(data: st.DataObject) -> None:
    weights = data.draw(st.lists(st.integers(1, 5), min_size=5, max_size=5))
    tasks = [task.model_copy(update={"weight": weight}) for task, weight in zip(MIXTURE.tasks, weights, strict=True)]
    raw_lengths = data.draw(st.lists(st.integers(2, 60), min_size=5, max_size=5))
    chunk = sum(weight * length for weight, length in zip(weights, raw_lengths, strict=True))
    tokens = data.draw(st.integers(chunk, 40 * chunk))
    seed, epoch = data.draw(st.integers(0, 2**64 - 1)), data.draw(st.integers(0, 10**9))
    assert_tiles(sampler_of(Mixture(tasks=tuple(tasks)), raw_lengths, tokens, seed), epoch)


def documents(schedule: Sampler, numbers: range, length: int) -> int:
    """Return how many documents of this length the texts of some samples start in."""
    return len({schedule.text(i).start // length for i in numbers})


def test_the_texts_of_a_step_come_from_as_many_documents_as_independent_draws() -> None:
    schedule = sampler_of(MIXTURE, RAW_LENGTHS, CHUNK * 5000, seed=2)
    length, drawn = 10 * CHUNK, np.random.default_rng(0)
    for count in (8, 32, 256):
        steps = [documents(schedule, range(step * count, (step + 1) * count), length) for step in range(40)]
        singly = [len(set(drawn.integers(0, 500, count).tolist())) for _ in range(2000)]
        assert np.mean(steps) > 0.98 * np.mean(singly)


def test_every_position_in_a_chunk_has_its_own_order() -> None:
    schedule = sampler_of(MIXTURE, RAW_LENGTHS, CHUNK * 50, seed=4)
    by_place: dict[int, list[int]] = {}
    for i in range(50 * 8):
        start = schedule.text(i).start
        by_place.setdefault(start % CHUNK, []).append(start // CHUNK)
    assert len(by_place) == 8
    assert all(sorted(order) == list(range(50)) for order in by_place.values())
    assert len({tuple(order) for order in by_place.values()}) == 8


def test_the_positions_of_the_tasks_in_a_chunk_differ_by_epoch() -> None:
    schedule = sampler_of(MIXTURE, RAW_LENGTHS, CHUNK * 4, seed=4)
    layouts = set()
    for epoch in range(20):
        numbers = range(epoch * 32, (epoch + 1) * 32)
        layouts.add(tuple(sorted({(schedule.text(i).start % CHUNK, schedule.task(i)) for i in numbers})))
    assert len(layouts) > 15


def test_orders_differ_by_epoch_and_by_seed() -> None:
    schedule = sampler_of(MIXTURE, RAW_LENGTHS, CHUNK * 30, seed=0)
    other = sampler_of(MIXTURE, RAW_LENGTHS, CHUNK * 30, seed=1)
    found = [orders(schedule, 0), orders(schedule, 1), orders(schedule, 2), orders(other, 0), orders(other, 1)]
    for kind in range(2):
        assert len({tuple(pair[kind]) for pair in found}) == 5
    assert all(sorted(chunks) == list(range(30)) for chunks, _ in found)
    assert list(range(30)) not in [chunks for chunks, _ in found]


def sample(schedule: Sampler, i: int) -> str:
    """Return a digest of sample i of a corpus with the tokens 10, 11, 12, ..."""
    number, (_, start, stop) = schedule.task(i), schedule.text(i)
    raw = np.arange(start + 10, stop + 10, dtype=np.uint32)
    task, frame = schedule.mixture.tasks[number], Frame(2, None, 1)
    example = corrupt(raw, task, Sentinels(262_143, 100), frame, schedule.rng(i), index=number)
    return hashlib.sha256(example.encoder.tobytes() + b"|" + example.labels.tobytes() + bytes([number])).hexdigest()


LONG = (50, 70, 90, 110, 40)  # 480 tokens a block


def test_a_sample_is_the_same_in_any_order_of_access() -> None:
    schedule = sampler_of(MIXTURE, LONG, 480 * 20 + 5, seed=9)
    forwards = [sample(schedule, i) for i in range(200)]
    assert len(set(forwards[:160])) == 160  # one epoch
    assert [sample(schedule, i) for i in reversed(range(200))] == forwards[::-1]
    shuffled = np.random.default_rng(0).permutation(200).tolist()
    assert [sample(schedule, i) for i in shuffled] == [forwards[i] for i in shuffled]
    resumed = sampler_of(MIXTURE, LONG, 480 * 20 + 5, seed=9)
    assert [sample(resumed, i) for i in range(117, 200)] == forwards[117:]
    assert [sample(sampler_of(MIXTURE, LONG, 480 * 20 + 5, seed=9), i) for i in range(3, 200, 4)] == forwards[3::4]


def test_another_seed_gives_other_spans() -> None:
    schedules = [sampler_of(MIXTURE, LONG, 480 * 20, seed) for seed in (9, 10)]
    # Both tasks with several spans at these lengths; a single span is always the end of the text.
    spans = [{sample(schedule, i) for i in range(320) if schedule.task(i) < 2} for schedule in schedules]
    assert [len(found) for found in spans] == [80, 80]
    assert not spans[0] & spans[1]


def test_a_sample_is_the_same_in_another_process() -> None:
    schedule = sampler_of(MIXTURE, LONG, 480 * 7 + 5, seed=9)
    script = (
        "import json\n"
        "from tests.adaptation.ul2.test_sampler import LONG, MIXTURE, sample, sampler_of\n"
        "schedule = sampler_of(MIXTURE, LONG, 480 * 7 + 5, seed=9)\n"
        "print(json.dumps([sample(schedule, i) for i in range(63, 150, 2)]))\n"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7", "PYTHONPATH": str(CHECKOUT)}
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, env=environment)
    assert json.loads(run.stdout) == [sample(schedule, i) for i in range(63, 150, 2)]


def test_samples_do_not_share_random_words() -> None:
    schedule = sampler_of(MIXTURE, RAW_LENGTHS, 4200, seed=5)
    words = [schedule.rng(i).bit_generator.random_raw(50) for i in (0, 1, 2, 2**32, 2**64 - 1)]
    assert np.unique(np.concatenate(words)).size == 250
    assert (schedule.rng(2).bit_generator.random_raw(50) == words[2]).all()
    # Keyed by (seed, number), which anyone can compute.
    key = np.array([5, 2], np.uint64)
    assert (np.random.Philox(key=key).random_raw(50) == words[2]).all()
    # Orders use other words than the samples.
    assert not np.isin(
        sampler_of(MIXTURE, RAW_LENGTHS, 4200, seed=2).rng(5).bit_generator.random_raw(50), words[2]
    ).any()


# Constants, not computed: they must never change, or a later version could not resume a run.
GOLDEN_CHUNKS = [8, 6, 7, 5, 1, 2, 9, 0, 3, 4]
GOLDEN_TASKS = [4, 4, 2, 4, 4, 0, 1, 3, 0, 1, 4, 4, 4, 2, 3, 4]
GOLDEN_DOCUMENTS = [1, 6, 4, 0, 3, 2, 5, 4, 1, 2, 5, 0, 3, 6]
GOLDEN_SAMPLE = "61aac13034dac42805bf5149dced7e686201a964f580837e80dc1604768d8087"


def test_orders_and_samples_never_change() -> None:
    schedule = sampler_of(MIXTURE, RAW_LENGTHS, CHUNK * 10, seed=0)
    assert orders(schedule, 0)[0] == GOLDEN_CHUNKS
    assert [schedule.task(i) for i in range(16)] == GOLDEN_TASKS
    assert [document_of(0, i, 7) for i in range(14)] == GOLDEN_DOCUMENTS
    assert sample(sampler_of(MIXTURE, LONG, 480 * 7, seed=0), 12) == GOLDEN_SAMPLE


@given(st.integers(1, 700), st.integers(0, 2**64 - 1))
def test_a_permutation_has_every_index_once(count: int, key: int) -> None:
    assert sorted(permuted(place, count, keys(key)) for place in range(count)) == list(range(count))


@pytest.mark.parametrize("count", [10**6 + 3, 2**40, 10**15 + 37])
def test_a_large_permutation_stays_in_range_and_separates_neighbours(count: int) -> None:
    found = [permuted(place, count, keys(1)) for place in range(2000)]
    assert len(set(found)) == 2000
    assert 0 <= min(found) < max(found) < count
    assert excess(Counter(place * 50 // count for place in found), range(50)) < 1
    # Neighbours are as far apart as any two positions: no difference is common.
    assert len({after - before for before, after in pairwise(found)}) > 1900


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_every_permutation_is_equally_likely(count: int) -> None:
    every = list(permutations(range(count)))
    found = Counter(tuple(permuted(place, count, keys(key)) for place in range(count)) for key in range(3000))
    assert excess(found, every) < 1


@pytest.mark.parametrize("count", [1, 2, 5, 24])
def test_an_epoch_of_documents_holds_each_once(count: int) -> None:
    epochs = [[document_of(1, i, count) for i in range(e * count, (e + 1) * count)] for e in range(20)]
    assert all(sorted(epoch) == list(range(count)) for epoch in epochs)


def test_orders_of_documents_differ_by_epoch_and_by_seed() -> None:
    found = {tuple(document_of(seed, i + e * 24, 24) for i in range(24)) for seed in (1, 2) for e in range(20)}
    assert len(found) == 40
    # They also differ from the order of chunks; this corpus has as many chunks.
    same = sampler_of(MIXTURE, RAW_LENGTHS, CHUNK * 24, seed=1)
    assert not found & {tuple(orders(same, epoch)[0]) for epoch in range(20)}


def test_numpy_integers_are_accepted() -> None:
    schedule = sampler_of(MIXTURE, RAW_LENGTHS, CHUNK * 1000, seed=0)
    i: Any = np.int64(4321)
    assert schedule.text(i) == schedule.text(4321)
    assert document_of(0, i, 100) == document_of(0, 4321, 100)
    assert all(type(bound) is int for bound in schedule.text(i))


@pytest.mark.parametrize("tokens", [0, 1, 41])
def test_a_corpus_smaller_than_a_chunk_is_refused(tokens: int) -> None:
    with pytest.raises(DataError, match=rf"has {tokens} tokens, but a block of 8 samples needs 42"):
        sampler_of(MIXTURE, RAW_LENGTHS, tokens, seed=0)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(UsageError, match=f"seed must be between 0 and {2**64 - 1}, got {seed}"):
        sampler_of(MIXTURE, RAW_LENGTHS, 4200, seed)


def test_a_length_for_each_task_is_needed() -> None:
    with pytest.raises(UsageError, match="expected 5 raw lengths, one per task, got 4"):
        sampler_of(MIXTURE, RAW_LENGTHS[:4], 4200, seed=0)


@pytest.mark.parametrize("i", [-1, 2**64])
@pytest.mark.parametrize("ask", ["task", "text", "rng", "document"])
def test_a_number_out_of_range_is_refused(ask: str, i: int) -> None:
    schedule = sampler_of(MIXTURE, RAW_LENGTHS, 4200, seed=0)
    with pytest.raises(UsageError, match=f"sample number must be between 0 and {2**64 - 1}, got {i}"):
        document_of(0, i, 3) if ask == "document" else getattr(schedule, ask)(i)


def test_a_corpus_without_documents_is_refused() -> None:
    with pytest.raises(DataError, match="found none"):
        document_of(0, 0, 0)
