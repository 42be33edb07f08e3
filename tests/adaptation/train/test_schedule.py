import pytest

from t5g2convert.adaptation.train.schedule import Leg, first_sample, learning_rate
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.errors import UsageError
from tests.adaptation.runs import SETTINGS


def changed(**changes: object) -> Settings:
    return SETTINGS.model_copy(update=changes)


def test_the_learning_rate_rises_linearly_and_falls_to_the_floor() -> None:
    settings = changed(steps=300, warmup=100, lr=1.0, lr_floor=0.2)
    assert [learning_rate(settings, step) for step in (0, 49, 99, 100)] == pytest.approx([0.01, 0.5, 1.0, 1.0])
    assert learning_rate(settings, 200) == pytest.approx(0.6)
    assert learning_rate(settings, 299) == pytest.approx(0.2, abs=1e-3)


def test_without_warmup_the_first_step_has_the_peak() -> None:
    assert learning_rate(changed(warmup=0), 0) == SETTINGS.lr


@pytest.mark.parametrize("every", [None, 1, 3])
def test_each_kind_of_step_goes_through_its_own_samples(every: int | None) -> None:
    settings = changed(image_every=every, image_samples=3)
    next_sample = {False: 0, True: 0}
    for step in range(10):
        kind = settings.kind_of(step) == "images"
        assert kind == (every is not None and step % every == every - 1)
        assert settings.samples_of(step) == (3 if kind else settings.samples)
        assert first_sample(settings, step) == next_sample[kind]
        next_sample[kind] += settings.samples_of(step)


@pytest.mark.parametrize("every", [None, 2, 3])
@pytest.mark.parametrize("single", [None, (5, 11, 2)])
def test_legs_with_other_batches_skip_no_sample(every: int | None, single: tuple[int, ...] | None) -> None:
    batches, images, ends = (512, 1024, 256), (7, 15, 3), (4, 9, 15)
    settings = [
        changed(image_every=every, batch_tokens=tokens, image_samples=count, text_samples=text)
        for tokens, count, text in zip(batches, images, single or [None] * 3, strict=True)
    ]
    legs = [Leg(until, each) for until, each in zip(ends, settings, strict=True)]
    next_sample = {False: 0, True: 0}
    for step in range(15):
        number = sum(step >= until for until in ends)
        kind = settings[number].kind_of(step) == "images"
        assert first_sample(settings[number], step, legs[:number]) == next_sample[kind]
        next_sample[kind] += settings[number].samples_of(step)


@pytest.mark.parametrize("every", [None, 1, 2, 3])
@pytest.mark.parametrize("ranges", [("1-1",), ("3-7",), ("2-2", "5-6", "12-40")])
def test_the_samples_of_skipped_steps_are_passed_over_once(every: int | None, ranges: tuple[str, ...]) -> None:
    settings = changed(image_every=every, image_samples=3, skip_steps=ranges)
    next_sample = {False: 0, True: 0}
    for step in range(15):
        for first, last in settings.skipped:
            if step == first - 1:
                for passed in range(first - 1, last):
                    next_sample[(settings.kind_of(passed) == "images")] += settings.samples_of(passed)
        kind = settings.kind_of(step) == "images"
        assert first_sample(settings, step) == next_sample[kind]
        next_sample[kind] += settings.samples_of(step)


def test_a_skip_counts_in_the_leg_in_which_it_begins() -> None:
    before, after = changed(skip_steps=("2-3", "9-9")), changed(skip_steps=("2-3", "7-8"), batch_tokens=1024)
    legs = [Leg(5, before)]
    assert (before.samples, after.samples) == (8, 16)
    firsts = [first_sample(before if step < 5 else after, step, legs if step >= 5 else ()) for step in range(8)]
    assert firsts == [0, 24, 32, 40, 48, 56, 56 + 16 + 32, 56 + 16 + 32 + 16]


@pytest.mark.parametrize("text", ["0-3", "4-3", "3", "3-", "a-b", "1-2-3", " 1-2", "1-2\n", "-1-2", ""])
def test_a_range_that_is_not_two_steps_in_order_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="expected A-B, the first and the last step"):
        SETTINGS.replace(skip_steps=(text,))


def test_ranges_are_put_in_order_and_do_not_overlap() -> None:
    assert SETTINGS.replace(skip_steps=("20-30", "3-3")).skipped == ((3, 3), (20, 30))
    with pytest.raises(UsageError, match="--skip-steps 3-5 and 5-9 overlap"):
        SETTINGS.replace(skip_steps=("5-9", "3-5"))
