"""The schedule of a run: the learning rate of every step, and which steps use documents with images."""

import math

from t5g2convert.adaptation.train.settings import Settings


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


def first_sample(settings: Settings, step: int) -> int:
    """Return the first sample of a step, counted among the samples of its kind."""
    images = 0 if settings.image_every is None else step // settings.image_every
    return (images if is_image_step(settings, step) else step - images) * settings.samples
