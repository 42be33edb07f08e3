"""The schedule of a run: the learning rate of every step, and the number of its first sample.

A run has several legs if its settings were changed when it was resumed. Image steps and the seed are the same in all.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from t5g2convert.adaptation.train.run_settings import RunSettings


@dataclass(frozen=True, slots=True)
class Leg:
    """The steps of a run until a change of its settings.

    Attributes:
        until: Completed steps when the settings were changed.
        settings: The settings until then.
    """

    until: int
    settings: RunSettings


def learning_rate(settings: RunSettings, step: int, peak: float | None = None) -> float:
    """Return the learning rate of a step, counted from 0: linear warmup, then half a cosine to the floor.

    Args:
        settings: The run's settings.
        step: The step.
        peak: The peak of a part of the model; None for the run's.
    """
    peak = settings.lr if peak is None else peak
    if step < settings.warmup:
        return peak * (step + 1) / settings.warmup
    done = (step - settings.warmup) / max(1, settings.steps - settings.warmup)
    floor = settings.lr_floor
    return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)


def first_sample(settings: RunSettings, step: int, earlier: Sequence[Leg] = ()) -> int:
    """Return the first sample of a step, counted among the samples of its kind.

    Where the steps A to B of `--skip-steps` begin, as many samples as these steps have are passed over.

    Args:
        settings: The settings of the leg that the step is in.
        step: The step.
        earlier: The legs before it.
    """
    count = start = 0
    for leg in (*earlier, Leg(step + 1, settings)):
        steps = settings.steps_of_kind(step, start, leg.until) + sum(
            settings.steps_of_kind(step, first - 1, last)
            for first, last in leg.settings.skipped
            if start < first <= leg.until
        )
        count, start = count + steps * leg.settings.samples_of(step), leg.until
    # Without the step itself.
    return count - settings.samples_of(step)
