"""Samples as arrays, and micro-batches of them: pure functions of the seed and of a sample's number.

A step takes its samples in order: of `w` processes, process r takes samples r, r + w, and so on. Where they do not fill
the last micro-batch, the step's first sample fills it, with labels that do not count, so that all processes
make the same number of passes over the same kind of data.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from t5g2convert.adaptation.data.images import pixel_values
from t5g2convert.adaptation.data.packed import ImageDocument, Packed
from t5g2convert.adaptation.data.tokens import ModelTokens
from t5g2convert.adaptation.train.loss import IGNORED
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.corruption import Example, Frame, corrupt, split_prefix
from t5g2convert.adaptation.ul2.mixture import Task
from t5g2convert.adaptation.ul2.sampler import Schedule, document_of
from t5g2convert.adaptation.ul2.sentinels import Sentinels

IMAGES: Final = "images"
"""What logs call the task of documents with images."""

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class Place:
    """A micro-batch of one process: its step and its samples; those of `counted` False only fill it up."""

    step: int
    samples: tuple[int, ...]
    counted: tuple[bool, ...]


def places(settings: Settings, *, rank: int, world: int, micro: int, start: int) -> Iterator[Place]:
    """All micro-batches of a process, from a step on.

    Args:
        settings: The run's.
        rank: Which process.
        world: How many processes.
        micro: Samples of a micro-batch.
        start: The first step.
    """
    passes = passes_of(settings, world=world, micro=micro)
    for step in range(start, settings.steps):
        for number in range(passes):
            slots = [rank + world * (number * micro + slot) for slot in range(micro)]
            first = settings.first_sample(step)
            counted = tuple(slot < settings.samples for slot in slots)
            chosen = tuple(first + (slot if counts else 0) for slot, counts in zip(slots, counted, strict=True))
            yield Place(step, chosen, counted)


def passes_of(settings: Settings, *, world: int, micro: int) -> int:
    """Micro-batches of each process in a step."""
    return -(-settings.samples // (world * micro))


class Samples(Dataset[Batch]):
    """The micro-batches of packed data.

    Args:
        packed: The data.
        settings: The run's.
        tokens: The model's ids.
        sentinels: The ids that stand for spans.
        schedule: Which sample is made of what; None where only images are trained on.
        model: The folder whose image processor makes pixels.
    """

    def __init__(
        self,
        packed: Packed,
        settings: Settings,
        tokens: ModelTokens,
        sentinels: Sentinels,
        schedule: Schedule | None,
        model: Path,
    ) -> None:
        self.packed, self.settings, self.tokens, self.sentinels = packed, settings, tokens, sentinels
        self.schedule, self.model = schedule, model
        self.frame = frame_of(settings, tokens)
        self.image_task = image_task(settings)

    def __getitem__(self, place: Place) -> Batch:
        """The micro-batch at a place; see `collate`."""
        if self.settings.is_image_step(place.step):
            documents = [self.document(i) for i in place.samples]
            examples = [self.image(document) for document in documents]
            paths = [path for document in documents for path in document.images]
            batch = collate(examples, place.counted, self.tokens)
            batch["pixel_values"] = torch.from_numpy(pixel_values(paths, self.model))
            return batch
        examples = [self.text(i) for i in place.samples]
        batch = collate(examples, place.counted, self.tokens)
        if self.settings.teacher is not None:
            # Gemma 3 has never read a text without bos, whatever the encoder is given.
            batch |= teaching(examples, self.tokens.bos, width=batch["labels"].shape[1])
        return batch

    def text(self, i: int) -> Example:
        """Text sample i."""
        assert self.schedule is not None, "there are steps of text"
        number = self.schedule.task(i)
        raw = self.packed.read(*self.schedule.stretch(i))
        task = self.settings.mixture.tasks[number]
        return corrupt(raw, task, self.sentinels, self.frame, self.schedule.rng(i), index=number)

    def document(self, i: int) -> ImageDocument:
        """The document of image sample i."""
        return self.packed.images[document_of(self.settings.seed, i, len(self.packed.images))]

    @property
    def longest(self) -> int:
        """Raw tokens of the longest sample of text; 0 where there is none."""
        return 0 if self.schedule is None else max(self.schedule.raw_lengths)

    def image(self, document: ImageDocument) -> Example:
        """A document with images: all through the last image for the encoder, the rest for the decoder.

        Its last token, eos, is the label that every target ends with, and not twice.
        """
        raw = document.tokens[:-1] if int(document.tokens[-1]) == self.tokens.eos else document.tokens
        number = len(self.settings.mixture.tasks)
        return split_prefix(
            raw, document.split, self.frame, task=self.image_task, sentinels=self.sentinels, index=number
        )


def frame_of(settings: Settings, tokens: ModelTokens) -> Frame:
    """The ids around the encoder's input and at the end of labels."""
    return Frame(tokens.bos if settings.encoder_bos else None, tokens.eos if settings.encoder_eos else None, tokens.eos)


def image_task(settings: Settings) -> Task:
    """How documents with images are taken apart: as the mixture's prefix task marks its own, if it has one."""
    found = next((task for task in settings.mixture.tasks if task.kind == "prefix"), None)
    if found is None:
        return Task(name=IMAGES, kind="prefix", rate=0.5, weight=1, sentinel=False)
    return found.model_copy(update={"name": IMAGES})


def task_names(settings: Settings) -> tuple[str, ...]:
    """The tasks in the order of their numbers, and that of images behind them."""
    return (*(task.name for task in settings.mixture.tasks), IMAGES)


def collate(examples: Sequence[Example], counted: Sequence[bool], tokens: ModelTokens) -> Batch:
    """A micro-batch, padded on the right to the longest of its samples.

    Returns:
        `input_ids` and `attention_mask` [B, E], `decoder_input_ids`, `decoder_attention_mask` and `labels` [B, D],
        `tasks` [B]; all int64. The decoder reads bos and all labels but the last. Labels of padding and of samples that
        do not count are `IGNORED`.
    """
    pad = 0 if tokens.pad is None else tokens.pad
    start = tokens.eos if tokens.bos is None else tokens.bos
    labels = [example.labels.astype(np.int64) for example in examples]
    inputs = [np.concatenate([[start], each[:-1]]) for each in labels]
    hidden = [each if counts else np.full_like(each, IGNORED) for each, counts in zip(labels, counted, strict=True)]
    encoder = [example.encoder.astype(np.int64) for example in examples]
    return {
        "input_ids": _stacked(encoder, pad),
        "attention_mask": _stacked([np.ones_like(each) for each in encoder], 0),
        "decoder_input_ids": _stacked(inputs, pad),
        "decoder_attention_mask": _stacked([np.ones_like(each) for each in inputs], 0),
        "labels": _stacked(hidden, IGNORED),
        "tasks": torch.tensor([example.task for example in examples]),
    }


def teaching(examples: Sequence[Example], bos: int | None, *, width: int) -> Batch:
    """What a teacher reads, and where it says what it expects of a label.

    The label at raw position p is predicted at p - 1 of the raw text, one place later where bos stands before it. The
    first token of a stretch has nothing before it that was read in its place, so it is learnt from the text itself.

    Args:
        examples: The samples.
        bos: What the teacher's input starts with, if anything.
        width: Labels of the padded batch.

    Returns:
        `raw_ids` and `raw_mask` [B, R], and `teacher_positions` [B, width], -1 where there is no teacher's word.
    """
    before = [] if bos is None else [bos]
    texts = [np.concatenate([before, example.raw]).astype(np.int64) for example in examples]
    at = [np.where(example.positions >= 1, example.positions - 1 + len(before), -1) for example in examples]
    positions = _stacked(at, -1)
    return {
        "raw_ids": _stacked(texts, 0),
        "raw_mask": _stacked([np.ones_like(each) for each in texts], 0),
        "teacher_positions": torch.nn.functional.pad(positions, (0, width - positions.shape[1]), value=-1),
    }


def _stacked(rows: Sequence[NDArray[np.int64]], fill: int) -> Tensor:
    result = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for target, row in zip(result, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(result)
