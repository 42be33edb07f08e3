"""Preflight of fine-tuning: the pairs that are trained and held out, checked before a process is started."""

import math
from fractions import Fraction
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from t5g2convert.adaptation.data.corpora import Corpora, Corpus
from t5g2convert.adaptation.data.tokens import ModelTokens, read_tokens
from t5g2convert.adaptation.pairs.dataset import PairDataset
from t5g2convert.adaptation.pairs.sampler import FixedOrder, Order, PairSampler, chosen
from t5g2convert.adaptation.pairs.settings import PairSettings
from t5g2convert.adaptation.train.preflight import ModelLimits, Prepared, open_model
from t5g2convert.checkpoint.families.registry import read_trainable
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2
from t5g2convert.errors import DataError, UsageError

CHECKED_AT_ONCE: Final = 1 << 20
"""Sizes of pairs compared at once."""

SHOWN: Final = 5
"""Pairs listed in an error."""


class PairSizes(NamedTuple):
    """The sizes of the pairs of a corpus: tokens of all sources and targets and of the longest pair, and images."""

    source: int
    target: int
    longest: int
    images: int


def prepare_pairs(
    model: Path,
    data: Path,
    settings: PairSettings,
    *,
    epochs: float | None,
    held_out: Path | None = None,
    held_out_pairs: int = 0,
    rope_scaling: str | None = None,
) -> Prepared[PairDataset]:
    """Open model and data, and check that they fit the settings and each other.

    Args:
        model: A converted model.
        data: A folder written by `t5g2 pack`, or a file that lists several with weights (see `data.corpora`).
        settings: The run's settings; with `epochs`, their steps are 0.
        epochs: How many times the pairs are read; None for the steps of the settings.
        held_out: Packed pairs of their own to evaluate.
        held_out_pairs: The most of them that are evaluated.
        rope_scaling: `linear:F` that the config must have; None accepts any.

    Raises:
        CheckpointError: The model is damaged or of another kind.
        DataError: The data is missing, damaged, packed with another tokenizer, or has no pairs or too long ones.
        MappingError: The file that lists the data is not valid.
        UsageError: The settings do not fit the model, the data or each other.
    """
    tokens = read_tokens(model)
    corpora = Corpora.open(data)
    corpora.check_tokenizer(model)
    counts = [len(corpus.packed.pairs) for corpus in corpora]
    if not any(counts):
        raise DataError("has no pairs of an input and a target", where=data, hint="t5g2 adapt trains on texts")
    held = [
        math.ceil(settings.eval_pairs * share) if count else 0
        for count, share in zip(counts, corpora.shares, strict=True)
    ]
    for corpus, count, part in zip(corpora, counts, held, strict=True):
        if count and part >= count:
            raise UsageError(f"--eval-pairs leaves none of the {count} pairs of {corpus.name} to train")
    sampler = PairSampler(counts, corpora.shares, held, seed=settings.seed)
    trained = sum(sampler.trained.values())
    settings = with_steps(settings, epochs, trained)
    checkpoint, limits = open_model(model, settings, rope_scaling=rope_scaling)
    sizes = [measure(corpus, limits) for corpus in corpora]
    shapes = read_trainable(checkpoint.config, model / "config.json")
    has_images = any(size.images for size in sizes)
    if has_images and not tokens.pictures:
        raise DataError("has images, but the model has no vision tower", where=data)
    longest = max(size.longest for size in sizes) - (tokens.bos is not None)
    samples = PairDataset(
        corpora, settings, tokens, model, shapes, sampler, pairs=trained, longest=longest, has_images=has_images
    )
    parts = [(Corpora([corpus]), sampler.held_out(number)) for number, corpus in enumerate(corpora) if held[number]]
    if held_out is not None:
        parts += _own(model, held_out, held_out_pairs, limits, settings.seed)
    evaluated = tuple(_one_step(settings, tokens, model, shapes, *part) for part in parts)
    notes = [*limits.notes, *_notes(settings, counts, held, sizes, trained)]
    return Prepared(checkpoint, limits, tokens, samples, tuple(notes), evaluated)


def with_steps(settings: PairSettings, epochs: float | None, pairs: int) -> PairSettings:
    """Return the settings with the steps of so many epochs.

    Raises:
        UsageError: There are both steps and epochs, or neither.
    """
    if (epochs is None) == (settings.steps == 0):
        raise UsageError("expected either --steps or --epochs")
    if epochs is None:
        return settings
    # As it was written: 1.1 is a little more in binary, which may make one more step.
    return settings.model_copy(update={"steps": math.ceil(Fraction(repr(epochs)) * pairs / settings.batch_pairs)})


def measure(corpus: Corpus, limits: ModelLimits) -> PairSizes:
    """Measure the pairs of a corpus, and refuse those beyond the model's positions: they are never cut.

    Raises:
        DataError: Pairs are too long.
    """
    pairs = corpus.packed.pairs
    most = limits.encoder_positions, limits.decoder_positions
    totals, longest, wrong, shown = np.zeros(3, np.int64), 0, 0, list[str]()
    for start in range(0, len(pairs), CHECKED_AT_ONCE):
        sizes = pairs.sizes(start, min(start + CHECKED_AT_ONCE, len(pairs)))
        totals += sizes.sum(axis=0)
        longest = max(longest, int(sizes[:, :2].sum(axis=1).max()))
        over = np.flatnonzero((sizes[:, :2] > most).any(axis=1))
        wrong += len(over)
        for number in over[: SHOWN - len(shown)].tolist():
            source, target, _ = sizes[number].tolist()
            shown.append(f"pair {start + number}: {source} tokens of input and {target} of target")
    if wrong:
        raise DataError(
            f"{wrong} pair(s) exceed the model's {most[0]} positions of the encoder or {most[1]} of the decoder, first "
            f"{shown[0]}",
            where=corpus.packed.folder,
            hint="leave them out, or shorten them",
            details=shown,
        )
    source, target, images = totals.tolist()
    return PairSizes(source, target, longest, images)


def _own(model: Path, data: Path, most: int, limits: ModelLimits, seed: int) -> list[tuple[Corpora, list[int]]]:
    """Return the corpora of held-out data with the pairs of each that are evaluated."""
    corpora = Corpora.open(data)
    corpora.check_tokenizer(model)
    found = []
    for corpus, share in zip(corpora, corpora.shares, strict=True):
        measure(corpus, limits)
        if count := len(corpus.packed.pairs):
            found.append((Corpora([corpus]), chosen(count, math.ceil(most * share), seed=seed)))
    if not found:
        raise DataError("has no pairs to evaluate", where=data)
    return found


def _one_step(
    settings: PairSettings, tokens: ModelTokens, model: Path, shapes: T5Gemma2, corpora: Corpora, numbers: list[int]
) -> PairDataset:
    """Return pairs as a run of one step."""
    changes = {"steps": 1, "batch_pairs": len(numbers), "teacher": None, "freeze_until": 0, "skip_steps": ()}
    order: Order = FixedOrder(numbers)
    settings = settings.model_copy(update=changes)
    pictured = corpora[0].packed.index.pair.places > 0
    return PairDataset(
        corpora, settings, tokens, model, shapes, order, pairs=len(numbers), longest=0, has_images=pictured
    )


def _notes(
    settings: PairSettings, counts: list[int], held: list[int], sizes: list[PairSizes], trained: int
) -> list[str]:
    drawn = settings.steps * settings.batch_pairs
    source, target, images = (sum(getattr(size, name) for size in sizes) for name in ("source", "target", "images"))
    pictured = f", and {images:,} images" if images else ""
    left_out = f"; {sum(held):,} pairs are held out" if any(held) else ""
    return [
        f"{sum(counts):,} pairs with {source:,} tokens of input and {target:,} of target{pictured}{left_out}",
        f"{settings.steps:,} steps of {settings.batch_pairs:,} read {trained:,} pairs {drawn / trained:.3g} times",
    ]
