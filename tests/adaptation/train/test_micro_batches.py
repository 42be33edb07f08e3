import pytest
from hypothesis import given
from hypothesis import strategies as st

from t5g2convert.adaptation.train.micro_batches import MicroBatch, SampleSize, deal, micro_batches
from t5g2convert.adaptation.train.settings import Settings
from tests.adaptation.runs import SETTINGS

SIZES = [SampleSize(8, 8, 40), SampleSize(8, 2, 20), SampleSize(3, 8, 30), SampleSize(3, 2, 10)]
"""Sizes of four different samples."""


def settings_of(**changes: object) -> Settings:
    return SETTINGS.model_copy(update={"batch_tokens": 640, "image_samples": 6, "steps": 7, **changes})


def size(step: int, i: int) -> SampleSize:
    return SIZES[(i * 7 + i // 3) % 4]


def padded(sizes: list[SampleSize]) -> int:
    return len(sizes) * (max(size.encoder for size in sizes) + max(size.labels for size in sizes))


@given(
    st.lists(st.sampled_from(SIZES), min_size=1, max_size=40),
    st.integers(1, 9),
    st.one_of(st.none(), st.integers(1, 100)),
    st.one_of(st.none(), st.integers(1, 10)),
)
def test_every_sample_is_dealt_once_within_the_limits(
    sizes: list[SampleSize], world: int, tokens: int | None, samples: int | None
) -> None:
    passes = deal(sizes, world=world, tokens=tokens, samples=samples)
    assert sorted(number for chosen in passes for number in chosen) == list(range(len(sizes)))
    costs = [sizes[number].cost for chosen in passes for number in chosen]
    assert costs == sorted(costs, reverse=True)
    for chosen in passes:
        for rank in range(world):
            own = [sizes[number] for number in chosen[rank::world]]
            assert samples is None or len(own) <= samples
            assert tokens is None or len(own) <= 1 or padded(own) <= tokens


def test_passes_with_images_come_first() -> None:
    sizes = [SampleSize(8, 8, 9), SampleSize(2, 2, 1, images=1), SampleSize(4, 4, 3), SampleSize(8, 8, 7, images=1)]
    settings = SETTINGS.model_copy(update={"steps": 1, "text_samples": 4})
    made = list(micro_batches(settings, lambda _, i: sizes[i], rank=0, world=1, tokens=None, samples=1, start=0))
    assert [place.samples for place in made] == [(3,), (1,), (0,), (2,)]
    assert [place.has_images for place in made] == [True, True, False, False]
    assert [(place.is_first, place.is_last) for place in made] == [(True, False), *[(False, False)] * 2, (False, True)]


def test_a_pass_takes_as_many_as_fit() -> None:
    sizes = [SIZES[number] for number in (3, 0, 3, 1, 3, 2)]
    assert deal(sizes, world=1, tokens=16) == [(1,), (5,), (3,), (0, 2, 4)]
    assert deal(sizes, world=2, tokens=16) == [(1, 5), (3, 0), (2, 4)]
    assert deal(sizes, world=1, tokens=None) == [(1, 5, 3, 0, 2, 4)]
    assert deal(sizes, world=1, tokens=None, samples=4) == [(1, 5, 3, 0), (2, 4)]


def test_equal_samples_stay_in_order() -> None:
    assert deal([SIZES[0]] * 5, world=2, tokens=1) == [(0, 1), (2, 3), (4,)]


@pytest.mark.parametrize("world", [1, 2, 3, 7])
@pytest.mark.parametrize(("tokens", "samples"), [(1, None), (40, None), (None, 4), (None, 16)])
@pytest.mark.parametrize("every", [None, 1, 3])
def test_all_processes_together_make_every_sample_once(
    world: int, tokens: int | None, samples: int | None, every: int | None
) -> None:
    settings = settings_of(image_every=every)
    made: dict[bool, list[int]] = {False: [], True: []}
    shapes = []
    for rank in range(world):
        own = list(micro_batches(settings, size, rank=rank, world=world, tokens=tokens, samples=samples, start=0))
        shapes.append([(place.step, len(place.samples), place.is_first, place.is_last) for place in own])
        for place in own:
            counted = [i for i, counts in zip(place.samples, place.counted, strict=True) if counts]
            made[(settings.kind_of(place.step) == "images")] += counted
    assert all(shape == shapes[0] for shape in shapes)
    assert [step for step, _, is_first, _ in shapes[0] if is_first] == list(range(7))
    assert [step for step, _, _, is_last in shapes[0] if is_last] == list(range(7))
    images = 0 if every is None else 7 // every
    assert sorted(made[True]) == list(range(6 * images))
    assert sorted(made[False]) == list(range(10 * (7 - images)))


def test_a_resumed_run_makes_the_same_micro_batches() -> None:
    settings = settings_of(steps=9, image_every=2)
    every, later = (
        list(micro_batches(settings, size, rank=1, world=2, tokens=None, samples=3, start=start)) for start in (0, 5)
    )
    assert later == [place for place in every if place.step >= 5]


def test_the_cheapest_sample_fills_the_last_pass() -> None:
    settings = settings_of(steps=1, batch_tokens=64 * 5)
    first, second = (
        list(micro_batches(settings, lambda step, i: SIZES[0], rank=rank, world=2, tokens=1, start=0))
        for rank in (0, 1)
    )
    assert first[-1] == MicroBatch(0, (4,), (True,), is_first=False)
    assert second[-1] == MicroBatch(0, (4,), (False,), is_first=False)
