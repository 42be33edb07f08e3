"""Held-out data of UL2, as steps of text samples and of documents with images."""

import math
from collections.abc import Iterator
from pathlib import Path

from t5g2convert.adaptation.data.corpora import Corpora
from t5g2convert.adaptation.train.preflight import prepare
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.dataset import UL2Dataset


def open_held_out(model: Path, data: Path, settings: Settings, samples: int) -> tuple[UL2Dataset, ...]:
    """Open held-out data as steps of text samples, and of documents with images if the run has image steps.

    Each step has samples of one corpus.

    Args:
        model: The model.
        data: A folder written by `t5g2 pack`, or a file that lists several with weights.
        settings: The run's settings.
        samples: Number of samples, divided by the weights of the corpora, and of each rounded up to whole blocks of
            the mixture; at most what its data gives once.

    Raises:
        DataError: The data is missing, damaged, or does not fit the model.
    """
    corpora = Corpora.open(data)
    found: list[UL2Dataset] = []
    for corpus, share in zip(corpora, corpora.shares, strict=True):
        found += _held_out(model, Corpora([corpus]), settings, math.ceil(samples * share))
    return tuple(found)


def _held_out(model: Path, data: Corpora, settings: Settings, count: int) -> Iterator[UL2Dataset]:
    """Yield a corpus as a step of text, and as one of documents with images, if it has such samples."""
    changes = {"steps": 1, "teacher": None, "freeze_until": 0, "trainable": (), "skip_steps": ()}
    if data.tokens:
        text = prepare(model, data, settings.model_copy(update={**changes, "image_every": None})).samples
        assert text.sampler is not None, "all steps are text steps"
        block = settings.mixture.block
        once = int(1 / max(text.sampler.epochs(1)))
        blocks = max(1, min(-(-count // block), once // block))
        text.settings = text.settings.model_copy(update={"text_samples": blocks * block})
        yield text
    if settings.image_every is not None and (documents := len(data[0].packed.images)):
        images = prepare(model, data, settings.model_copy(update={**changes, "image_every": 1})).samples
        images.settings = images.settings.model_copy(update={"image_samples": min(count, documents)})
        yield images
