import itertools
from collections import Counter
from fractions import Fraction
from math import comb

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from numpy.typing import NDArray

from t5g2convert.adaptation.data.example import Example
from t5g2convert.adaptation.ul2.corruption import (
    Frame,
    composition,
    corrupt,
    lengths,
    longest,
    needed_sentinels,
    spans,
    split_prefix,
)
from t5g2convert.adaptation.ul2.mixture import Task, read_mixture
from t5g2convert.adaptation.ul2.sentinels import Sentinels
from t5g2convert.errors import DataError, UsageError
from tests.adaptation.chance import excess

TASKS = read_mixture().tasks
LENGTHS = [*range(2, 401), 4096, 16_384]
SENTINELS = Sentinels(262_143, 1365)
BOS, EOS = 2, 1
FRAME = Frame(encoder_bos=BOS, encoder_eos=None, eos=EOS)
FRAMES = [Frame(None, None, EOS), FRAME, Frame(BOS, EOS, EOS)]
PAPER = {
    "spans-3-15": (3, Fraction(15, 100)),
    "spans-12-50": (12, Fraction(1, 2)),
    "spans-32-15": (32, Fraction(15, 100)),
    "spans-32-50": (32, Fraction(1, 2)),
    "prefix": (10**9, Fraction(3, 4)),  # one span, however long
}

each_task = pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)


def text(length: int) -> NDArray[np.uint32]:
    """Return tokens that are all different, so that a misplaced token shows."""
    return np.arange(1000, 1000 + length, dtype=np.uint32)


def philox(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def with_options(task: Task, **options: object) -> Task:
    return Task.model_validate({**task.model_dump(), **options})


def pieces_of(example: Example, frame: Frame, task: Task) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Return kept pieces, taken pieces and sentinels, read from the sample alone by its format."""
    encoder, labels = example.encoder.tolist(), example.labels.tolist()
    for token in (frame.encoder_bos, task.mode_token):
        assert token is None or encoder.pop(0) == token
    assert frame.encoder_eos is None or encoder.pop() == frame.encoder_eos
    assert labels.pop() == frame.eos
    if not task.sentinel:
        return [encoder], [labels], []
    marks = [token for token in encoder if token > 260_000]
    assert marks == [token for token in labels if token > 260_000]
    kept, taken = [], []
    for mark in marks:
        kept.append(encoder[: encoder.index(mark)])
        encoder = encoder[encoder.index(mark) + 1 :]
    assert encoder == []
    for mark, after in itertools.pairwise([*marks, None]):
        assert labels.pop(0) == mark
        end = len(labels) if after is None else labels.index(after)
        taken.append(labels[:end])
        labels = labels[end:]
    return kept, taken, marks


def check(example: Example, raw: NDArray[np.uint32], task: Task, frame: Frame) -> None:
    """Check what holds for every sample."""
    kept, taken, marks = pieces_of(example, frame, task)
    assert [token for pair in zip(kept, taken, strict=True) for piece in pair for token in piece] == raw.tolist()
    assert all(kept)
    assert all(taken)
    noise, count = spans(raw.size, task)
    assert (sum(map(len, taken)), len(taken)) == (noise, count)
    assert marks == [SENTINELS.first - k for k in range(len(marks))]
    assert (example.encoder.size, example.labels.size) == lengths(raw.size, task, frame)
    assert [array.dtype for array in (example.encoder, example.labels, example.positions)] == [
        "uint32",
        "uint32",
        "int64",
    ]
    is_raw = example.positions >= 0
    assert (example.labels[is_raw] == raw[example.positions[is_raw]]).all()
    others = example.labels[~is_raw].tolist()
    assert others == [*marks, EOS]
    assert (example.positions[~is_raw] == -1).all()
    assert example.raw is raw


@each_task
def test_every_length_is_recovered_whole(task: Task) -> None:
    for length in LENGTHS:
        raw = text(length)
        check(corrupt(raw, task, SENTINELS, FRAME, philox(length)), raw, task, FRAME)


@each_task
def test_density_and_spans_equal_those_of_t5(task: Task) -> None:
    for length in LENGTHS:
        mean, rate = PAPER[task.name]
        noise = min(max(round(rate * length), 1), length - 1)
        count = max(1, round(Fraction(noise, mean)))
        assert spans(length, task) == (noise, count)


@st.composite
def tasks(draw: st.DrawFn) -> Task:
    """Any task, with any options."""
    options = {"name": "any", "weight": 1, "mode_token": draw(st.sampled_from([None, 256_005]))}
    rate = draw(st.floats(0.01, 0.99))
    if draw(st.booleans()):
        return Task(kind="prefix", rate=rate, sentinel=draw(st.booleans()), **options)
    least = max(1.0, 1.01 * rate / (1 - rate))  # otherwise the spans touch
    return Task(kind="spans", rate=rate, mean_span=draw(st.floats(least, least + 40)), **options)


def separable(length: int, task: Task) -> bool:
    """Return whether enough tokens remain to separate the spans; rounding may take too many of a short text."""
    noise = min(max(round(length * task.rate), 1), length - 1)
    return task.mean_span is None or round(noise / task.mean_span) <= length - noise


@given(tasks(), st.integers(2, 300), st.sampled_from(FRAMES), st.integers(0, 2**64 - 1))
def test_any_task_and_frame_is_recovered_whole(task: Task, length: int, frame: Frame, seed: int) -> None:
    assume(separable(length, task))
    raw = text(length)
    check(corrupt(raw, task, SENTINELS, frame, philox(seed)), raw, task, frame)


@each_task
def test_the_longest_text_fits_and_a_longer_one_does_not(task: Task) -> None:
    variants = [task, with_options(task, mode_token=256_005)]
    if task.kind == "prefix":
        variants.append(with_options(task, sentinel=True))
    budgets = [(n, n) for n in (*range(6, 200), 512, 4096, 16_384)] + [(512, 64), (64, 512), (6, 10_000), (10_000, 6)]
    for variant, frame, (encoder, decoder) in itertools.product(variants, FRAMES, budgets):
        found = longest(variant, frame, encoder=encoder, decoder=decoder)
        sizes, larger = lengths(found, variant, frame), lengths(found + 1, variant, frame)
        assert sizes[0] <= encoder
        assert sizes[1] <= decoder
        assert larger[0] > encoder or larger[1] > decoder


@given(tasks(), st.sampled_from(FRAMES), st.integers(6, 90), st.integers(6, 90))
def test_no_longer_text_fits_at_all(task: Task, frame: Frame, encoder: int, decoder: int) -> None:
    every = range(2, encoder + decoder + 2)
    assume(all(separable(length, task) for length in every))
    sizes = {length: lengths(length, task, frame) for length in every}
    fitting = [length for length in every if sizes[length][0] <= encoder and sizes[length][1] <= decoder]
    assert longest(task, frame, encoder=encoder, decoder=decoder) == max(fitting)


def test_budgets_that_are_too_small_are_refused() -> None:
    # Two tokens: bos, one kept, its sentinel; sentinel, one taken, eos.
    assert longest(TASKS[0], FRAME, encoder=3, decoder=3) == 2
    for encoder, decoder in ((2, 3), (3, 2), (0, 0)):
        with pytest.raises(UsageError, match=f"at least 3 encoder tokens and 3 labels, got {encoder} and {decoder}"):
            longest(TASKS[0], FRAME, encoder=encoder, decoder=decoder)


@pytest.mark.parametrize("length", [-1, 0, 1])
def test_fewer_than_two_tokens_are_refused(length: int) -> None:
    with pytest.raises(DataError, match=f"at least 2 tokens, got {length}"):
        lengths(length, TASKS[0], FRAME)


def test_spans_that_would_touch_are_refused() -> None:
    dense = Task(name="dense", kind="spans", rate=0.5, mean_span=1, weight=1)
    # round(7 * 0.5) is 4, and 4 spans of one token need 4 tokens to separate them; 3 are left.
    assert spans(6, dense) == (3, 3)
    with pytest.raises(DataError, match="removes 4 spans from 7 tokens, but only 3"):
        spans(7, dense)
    # The longest that fits 7 and 9 is this text; it is reported instead of being used.
    frame = Frame(None, None, EOS)
    assert longest(dense, frame, encoder=6, decoder=9) == 6
    with pytest.raises(DataError, match="removes 4 spans from 7 tokens"):
        longest(dense, frame, encoder=7, decoder=9)


def test_the_prefix_task_takes_the_end() -> None:
    prefix = TASKS[4]
    for length in LENGTHS:
        raw = text(length)
        example = corrupt(raw, prefix, SENTINELS, Frame(None, None, EOS), philox(0))
        kept = length - example.labels.size + 1
        assert example.encoder.tolist() == raw[:kept].tolist()
        assert example.labels.tolist() == [*raw[kept:].tolist(), EOS]
        assert example.positions.tolist() == [*range(kept, length), -1]


class Scripted:
    """A generator with given raw words."""

    def __init__(self, *answers: list[int]) -> None:
        self.answers = list(answers)
        self.bit_generator = self

    def random_raw(self, count: int) -> NDArray[np.uint64]:
        answer = self.answers.pop(0)
        assert len(answer) == count
        return np.array(answer, np.uint64)


def test_a_composition_cuts_at_the_lowest_words() -> None:
    # Five tokens have four places to cut, after the 1st, 2nd, 3rd and 4th. The two lowest words, 3 and 5,
    # belong to the 2nd and the 4th place: 2 + 2 + 1.
    assert composition(5, 3, Scripted([9, 3, 2**64 - 1, 5])).tolist() == [2, 2, 1]
    # With one piece or with single tokens there is nothing to choose.
    assert composition(5, 1, Scripted()).tolist() == [5]
    assert composition(3, 3, Scripted([8, 1])).tolist() == [1, 1, 1]


def test_equal_words_are_drawn_again() -> None:
    # The 2nd and the 3rd place tie for the second cut; in the second draw the 1st and the 2nd are lowest.
    scripted = Scripted([0, 7, 7, 9], [1, 2, 3, 4])
    assert composition(5, 3, scripted).tolist() == [1, 1, 3]
    assert scripted.answers == []
    # Equal words above or below the bound decide nothing.
    assert composition(5, 3, Scripted([4, 4, 8, 8])).tolist() == [1, 1, 3]


def test_spans_by_hand() -> None:
    # Eleven tokens, rate 0.4 and spans of 2: round(4.4) = 4 are taken in round(4 / 2) = 2 spans, 7 are kept.
    task = Task(name="hand", kind="spans", rate=0.4, mean_span=2, weight=1, mode_token=9)
    # Taken, three places: the 3rd has the lowest word, 3 + 1. Kept, six places: the 2nd has it, 2 + 5.
    rng = Scripted([5, 6, 4], [8, 1, 9, 9, 9, 9])
    raw = np.array([10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20], np.uint32)
    # 10 11 [12 13 14] 15 16 17 18 19 [20]
    example = corrupt(raw, task, Sentinels(99, 5), Frame(encoder_bos=2, encoder_eos=3, eos=1), rng, index=6)
    assert example.encoder.tolist() == [2, 9, 10, 11, 99, 15, 16, 17, 18, 19, 98, 3]
    assert example.labels.tolist() == [99, 12, 13, 14, 98, 20, 1]
    assert example.positions.tolist() == [-1, 2, 3, 4, -1, 10, -1]
    assert example.task == 6


def test_a_prefix_by_hand() -> None:
    # Six tokens, rate 0.75: round(4.5) is 4, to even; two are the prefix.
    raw = np.array([10, 11, 12, 13, 14, 15], np.uint32)
    task = Task(name="hand", kind="prefix", rate=0.75, weight=1, sentinel=False)
    example = corrupt(raw, task, Sentinels(99, 0), Frame(None, None, 1), Scripted())
    assert example.encoder.tolist() == [10, 11]
    assert example.labels.tolist() == [12, 13, 14, 15, 1]
    marked = corrupt(raw, with_options(task, sentinel=True), Sentinels(99, 1), Frame(2, 3, 1), Scripted())
    assert marked.encoder.tolist() == [2, 10, 11, 99, 3]
    assert marked.labels.tolist() == [99, 12, 13, 14, 15, 1]
    assert marked.positions.tolist() == [-1, 2, 3, 4, 5, -1]


def test_a_seeded_composition_by_hand() -> None:
    # The first words of Philox with key 0, in every numpy; only their first digits are needed.
    words = [int(word) >> 48 for word in philox(0).bit_generator.random_raw(9)]
    assert words == [0x02F4, 0x3DD6, 0x1C86, 0x907D, 0x809B, 0x4711, 0xF250, 0xFC6E, 0x40FA]
    # The three lowest are the first, third and second: ten tokens are cut after the 1st, 2nd and 3rd.
    assert composition(10, 4, philox(0)).tolist() == [1, 1, 1, 7]
    # The five lowest are these, the 9th and the 6th.
    assert composition(10, 6, philox(0)).tolist() == [1, 1, 1, 3, 3, 1]


def compositions(total: int, pieces: int) -> list[tuple[int, ...]]:
    if pieces == 1:
        return [(total,)]
    return [
        (head, *tail) for head in range(1, total) for tail in compositions(total - head, pieces - 1) if total > head
    ]


@pytest.mark.parametrize(("total", "pieces"), [(2, 2), (5, 2), (6, 3), (7, 4), (8, 5), (9, 3), (9, 8)])
def test_every_composition_is_equally_likely(total: int, pieces: int) -> None:
    every = compositions(total, pieces)
    assert len(every) == comb(total - 1, pieces - 1)
    rng = philox(total * 10 + pieces)
    found = Counter(tuple(composition(total, pieces, rng).tolist()) for _ in range(40 * len(every)))
    if len(every) == 1:
        assert set(found) == set(every)
    else:
        assert excess(found, every) < 1


def test_every_mask_is_equally_likely() -> None:
    # Twelve tokens at 0.5 in spans of 2: 6 are taken in 3 spans, separated by 6: 10 compositions of both, 100 masks.
    task = Task(name="law", kind="spans", rate=0.5, mean_span=2, weight=1)
    every = {
        tuple(np.repeat([0, 1] * 3, [kept[0], taken[0], kept[1], taken[1], kept[2], taken[2]]).tolist())
        for kept in compositions(6, 3)
        for taken in compositions(6, 3)
    }
    assert len(every) == 100
    found: Counter[tuple[int, ...]] = Counter()
    for seed in range(4000):
        example = corrupt(text(12), task, SENTINELS, FRAME, philox(seed))
        taken = set(example.positions.tolist())
        found[tuple(int(at in taken) for at in range(12))] += 1
    assert excess(found, every) < 1


def test_unequal_probabilities_are_detected() -> None:
    # Assigning each token to a random piece looks similar, but its compositions are not equally likely.
    every, rng = compositions(6, 3), np.random.default_rng(0)
    thrown = Counter(tuple((rng.multinomial(3, [1 / 3] * 3) + 1).tolist()) for _ in range(1000))
    assert excess(thrown, every) > 2


@pytest.mark.parametrize("at", [1, 20, 49])
def test_a_text_is_split_after_its_last_image(at: int) -> None:
    raw, task = text(50), TASKS[4]
    example = split_prefix(raw, at, FRAME, task=task, sentinels=SENTINELS, index=4)
    assert example.encoder.tolist() == [BOS, *raw[:at].tolist()]
    assert example.labels.tolist() == [*raw[at:].tolist(), EOS]
    assert example.positions.tolist() == [*range(at, 50), -1]
    assert example.task == 4
    marked = with_options(task, sentinel=True, mode_token=256_005)
    example = split_prefix(raw, at, FRAME, task=marked, sentinels=SENTINELS)
    assert example.encoder.tolist() == [BOS, 256_005, *raw[:at].tolist(), 262_143]
    assert example.labels.tolist() == [262_143, *raw[at:].tolist(), EOS]
    assert example.positions.tolist() == [-1, *range(at, 50), -1]


@pytest.mark.parametrize("at", [-1, 0, 50, 51])
def test_an_empty_side_is_refused(at: int) -> None:
    with pytest.raises(DataError, match=f"prefix of 50 tokens must have 1 to 49, got {at}"):
        split_prefix(text(50), at, FRAME, task=TASKS[4], sentinels=SENTINELS)


@pytest.mark.parametrize("token", [262_143, 262_143 - 600, 262_143 - 1364])
@each_task
def test_a_sentinel_in_the_text_is_refused(task: Task, token: int) -> None:
    raw = text(100)
    raw[63] = token
    with pytest.raises(DataError, match=rf"token {token} at position 63 .* is a sentinel \(260779 to 262143\)"):
        corrupt(raw, task, SENTINELS, FRAME, philox(0))
    with pytest.raises(DataError, match="is a sentinel"):
        split_prefix(raw, 50, FRAME, task=TASKS[4], sentinels=SENTINELS)


@pytest.mark.parametrize("token", [0, 260_778, 262_144, 2**32 - 1])
def test_ids_next_to_the_sentinels_are_text(token: int) -> None:
    raw = text(100)
    raw[[0, 63, 99]] = token
    example = corrupt(raw, TASKS[1], SENTINELS, FRAME, philox(0))
    assert sorted([*example.encoder, *example.labels]).count(token) == 3
    raw[5] = 262_143
    corrupt(raw, TASKS[4], Sentinels(262_143, 0), FRAME, philox(0))


def test_too_few_sentinels_are_refused() -> None:
    count = spans(400, TASKS[1])[1]
    corrupt(text(400), TASKS[1], Sentinels(262_143, count), FRAME, philox(0))
    with pytest.raises(DataError, match=rf"needs {count} sentinels, but {count - 1} are available"):
        corrupt(text(400), TASKS[1], Sentinels(262_143, count - 1), FRAME, philox(0))


@pytest.mark.parametrize("raw", [text(10).astype(np.int64), text(10).reshape(2, 5), text(10).astype(">u4")])
def test_other_arrays_are_refused(raw: NDArray[np.uint32]) -> None:
    with pytest.raises(DataError, match="expected uint32 tokens in one dimension, got"):
        corrupt(raw, TASKS[0], SENTINELS, FRAME, philox(0))


def test_16384_in_and_out_need_1260_sentinels() -> None:
    raw_lengths = tuple(longest(task, FRAME, encoder=16_384, decoder=16_384) for task in TASKS)
    assert raw_lengths == (18_204, 30_246, 19_168, 31_774, 21_844)
    assert needed_sentinels(read_mixture(), raw_lengths) == 1260
    # The densest task: 30,246 tokens, 15,123 of them taken, in spans of 12.
    assert spans(30_246, TASKS[1]) == (15_123, 1260)
    # T5's own number of sentinels, where other code wraps or clamps.
    with pytest.raises(DataError, match="samples of these lengths need 1260 sentinels, but 100 are available"):
        Sentinels.of(vocabulary=262_144, reserved={262_043}, needed=1260)


def test_prefixes_without_sentinels_need_none() -> None:
    mixture = read_mixture()
    only = mixture.model_copy(update={"tasks": mixture.tasks[4:]})
    assert needed_sentinels(only, (100,)) == 0
    marked = mixture.model_copy(update={"tasks": (with_options(mixture.tasks[4], sentinel=True),)})
    assert needed_sentinels(marked, (100,)) == 1
