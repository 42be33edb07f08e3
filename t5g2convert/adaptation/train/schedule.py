"""The schedule of a run: the learning rate of every step, which steps use images, and the samples of a step.

A run has several legs if its settings were changed when it was resumed. Image steps and the seed are the same in all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from t5g2convert.adaptation.train.settings import Settings


@dataclass(frozen=True, slots=True)
class Leg:
    """The steps of a run until a change of its settings.

    Attributes:
        until: Completed steps when the settings were changed.
        settings: The settings until then.
    """

    until: int
    settings: Settings


def learning_rate(settings: Settings, step: int) -> float:
    """Return the learning rate of a step, counted from 0: linear warmup, then half a cosine to the floor."""
    if step < settings.warmup:
        return settings.lr * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    floor = settings.lr_floor
    return settings.lr * (floor + (1 - floor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


def is_image_step(settings: Settings, step: int) -> bool:
    """Return whether a step uses documents with images: the last of every `image_every`."""
    return settings.image_every is not None and (step + 1) % settings.image_every == 0


def samples_of(settings: Settings, step: int) -> int:
    """Return the number of samples of a step."""
    if not is_image_step(settings, step):
        return settings.samples
    assert settings.image_samples is not None, "`prepare` sets it"
    return settings.image_samples


def first_sample(settings: Settings, step: int, earlier: Sequence[Leg] = ()) -> int:
    """Return the first sample of a step, counted among the samples of its kind.

    Where the steps A to B of `--skip-steps` begin, as many samples as these steps have are passed over.

    Args:
        settings: The settings of the leg that the step is in.
        step: The step.
        earlier: The legs before it.
    """
    count = start = 0
    for leg in (*earlier, Leg(step + 1, settings)):
        steps = _steps_of_kind(settings, step, start, leg.until) + sum(
            _steps_of_kind(settings, step, first - 1, last)
            for first, last in leg.settings.skipped
            if start < first <= leg.until
        )
        count, start = count + steps * samples_of(leg.settings, step), leg.until
    # Without the step itself.
    return count - samples_of(settings, step)


def _steps_of_kind(settings: Settings, step: int, start: int, stop: int) -> int:
    """Return how many of the steps from `start` to before `stop` are of the kind of a step."""
    images = 0 if settings.image_every is None else stop // settings.image_every - start // settings.image_every
    return images if is_image_step(settings, step) else stop - start - images
