import itertools
from fractions import Fraction

import numpy as np
import pytest
from numpy.typing import NDArray

from t5g2convert.adaptation.mixture import Task, read_mixture
from t5g2convert.adaptation.sentinels import Sentinels
from t5g2convert.adaptation.ul2 import (
    Example,
    Frame,
    corrupt,
    lengths,
    spans,
)

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
    """Tokens that are all unlike, so that a token in the wrong place shows."""
    return np.arange(1000, 1000 + length, dtype=np.uint32)


def philox(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=seed))


def with_options(task: Task, **options: object) -> Task:
    return Task.model_validate({**task.model_dump(), **options})


def pieces_of(example: Example, frame: Frame, task: Task) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Kept pieces, taken pieces and sentinels, read from the sample alone, as a decoder that knows the format would."""
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
    """All that holds for every sample."""
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
def test_every_length_comes_back_whole(task: Task) -> None:
    for length in LENGTHS:
        raw = text(length)
        check(corrupt(raw, task, SENTINELS, FRAME, philox(length)), raw, task, FRAME)


@each_task
def test_density_and_spans_are_t5s(task: Task) -> None:
    for length in LENGTHS:
        mean, rate = PAPER[task.name]
        noise = min(max(round(rate * length), 1), length - 1)
        count = max(1, round(Fraction(noise, mean)))
        assert spans(length, task) == (noise, count)
