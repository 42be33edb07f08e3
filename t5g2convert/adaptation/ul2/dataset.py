"""UL2 samples as batches, and the loader that makes them: pure functions of the seed and a sample's number.

A step takes its samples in order: of `w` processes, process r takes samples r, r + w, and so on. If they do not fill
the last micro-batch, the step's first sample fills it, with labels that do not count. So all processes make the same
number of passes over the same kind of data.
"""

import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from t5g2convert.adaptation.data.images import pixel_values
from t5g2convert.adaptation.data.packed import ImageDocument, Packed
from t5g2convert.adaptation.data.tokens import ModelTokens
from t5g2convert.adaptation.train.loss import IGNORED
from t5g2convert.adaptation.train.schedule import first_sample, is_image_step
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.corruption import Example, Frame, corrupt, split_prefix
from t5g2convert.adaptation.ul2.mixture import Task
from t5g2convert.adaptation.ul2.sampler import Sampler, document_of
from t5g2convert.adaptation.ul2.sentinels import Sentinels
from t5g2convert.errors import Interrupted, T5g2Error

IMAGES: Final = "images"
"""Name of the task of documents with images in logs."""

Batch = dict[str, Tensor]


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The samples of one pass of a process; those with `counted` False are only filling."""

    step: int
    samples: tuple[int, ...]
    counted: tuple[bool, ...]


def micro_batches(settings: Settings, *, rank: int, world: int, micro: int, start: int) -> Iterator[MicroBatch]:
    """Yield all micro-batches of a process.

    Args:
        settings: The run's settings.
        rank: Number of the process.
        world: Number of processes.
        micro: Samples per micro-batch.
        start: First step.
    """
    passes = passes_of(settings, world=world, micro=micro)
    for step in range(start, settings.steps):
        for number in range(passes):
            slots = [rank + world * (number * micro + slot) for slot in range(micro)]
            first = first_sample(settings, step)
            counted = tuple(slot < settings.samples for slot in slots)
            chosen = tuple(first + (slot if counts else 0) for slot, counts in zip(slots, counted, strict=True))
            yield MicroBatch(step, chosen, counted)


def passes_of(settings: Settings, *, world: int, micro: int) -> int:
    """Return the number of micro-batches per process and step."""
    return -(-settings.samples // (world * micro))


class UL2Dataset(Dataset[Batch]):
    """The batches of packed data, by micro-batch.

    Args:
        packed: The data.
        settings: The run's settings.
        tokens: The model's token ids.
        sentinels: The ids that replace spans.
        sampler: The order of text samples; None if all steps are image steps.
        model: The folder with the image processor.
    """

    def __init__(
        self,
        packed: Packed,
        settings: Settings,
        tokens: ModelTokens,
        sentinels: Sentinels,
        sampler: Sampler | None,
        model: Path,
    ) -> None:
        self.packed, self.settings, self.tokens, self.sentinels = packed, settings, tokens, sentinels
        self.sampler, self.model = sampler, model
        self.frame = frame_of(settings, tokens)
        self.image_task = image_task(settings)

    def __getitem__(self, chosen: MicroBatch) -> Batch:
        """Return the batch of a micro-batch; see `collate`."""
        if is_image_step(self.settings, chosen.step):
            documents = [self.document(i) for i in chosen.samples]
            examples = [self.image(document) for document in documents]
            paths = [path for document in documents for path in document.images]
            batch = collate(examples, chosen.counted, self.tokens)
            batch["pixel_values"] = torch.from_numpy(pixel_values(paths, self.model))
            return batch
        examples = [self.text(i) for i in chosen.samples]
        batch = collate(examples, chosen.counted, self.tokens)
        if self.settings.teacher is not None:
            # Gemma 3 has never read text without bos, whatever the encoder reads.
            batch |= teaching(examples, self.tokens.bos, width=batch["labels"].shape[1])
        return batch

    def text(self, i: int) -> Example:
        """Return text sample i."""
        assert self.sampler is not None, "there are text steps"
        number = self.sampler.task(i)
        raw = self.packed.read(*self.sampler.text_range(i))
        task = self.settings.mixture.tasks[number]
        return corrupt(raw, task, self.sentinels, self.frame, self.sampler.rng(i), index=number)

    def document(self, i: int) -> ImageDocument:
        """Return the document of image sample i."""
        return self.packed.images[document_of(self.settings.seed, i, len(self.packed.images))]

    @property
    def longest(self) -> int:
        """Raw tokens of the longest text sample; 0 without text."""
        return 0 if self.sampler is None else max(self.sampler.raw_lengths)

    def image(self, document: ImageDocument) -> Example:
        """Split a document with images: the encoder reads all through the last image, the decoder writes the rest.

        A final eos of the document is dropped, since every target ends with one.
        """
        raw = document.tokens[:-1] if int(document.tokens[-1]) == self.tokens.eos else document.tokens
        number = len(self.settings.mixture.tasks)
        return split_prefix(
            raw, document.split, self.frame, task=self.image_task, sentinels=self.sentinels, index=number
        )


def frame_of(settings: Settings, tokens: ModelTokens) -> Frame:
    """Return the ids around the encoder's input and at the end of labels."""
    return Frame(tokens.bos if settings.encoder_bos else None, tokens.eos if settings.encoder_eos else None, tokens.eos)


def image_task(settings: Settings) -> Task:
    """Return the task of documents with images: the mixture's prefix task, if it has one."""
    found = next((task for task in settings.mixture.tasks if task.kind == "prefix"), None)
    if found is None:
        return Task(name=IMAGES, kind="prefix", rate=0.5, weight=1, sentinel=False)
    return found.model_copy(update={"name": IMAGES})


def task_names(settings: Settings) -> tuple[str, ...]:
    """Return the names of the tasks by number; images come last."""
    return (*(task.name for task in settings.mixture.tasks), IMAGES)


def collate(examples: Sequence[Example], counted: Sequence[bool], tokens: ModelTokens) -> Batch:
    """Return samples as a batch, padded on the right to the longest.

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
    """Return the teacher's input, and the position of its prediction for each label.

    The label at raw position p is predicted at p - 1 of the raw text, or one later if bos comes first. The first token
    of a text has no prediction, so it is learnt from the text itself.

    Args:
        examples: The samples.
        bos: First token of the teacher's input, if any.
        width: Labels of the padded batch.

    Returns:
        `raw_ids` and `raw_mask` [B, R], and `teacher_positions` [B, width], -1 where the teacher predicts nothing.
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


def load_batches(
    samples: Dataset[Batch], order: Callable[[], Iterator[MicroBatch]], *, workers: int
) -> Iterator[tuple[int, Batch | T5g2Error]]:
    """Yield batches in order, each with its step; a batch that cannot be made is replaced by its error.

    Args:
        samples: The dataset.
        order: Returns an iterator over all micro-batches.
        workers: Processes that prepare batches ahead of time; with 0 this process makes them on demand.
    """
    if not workers:
        for chosen in order():
            yield chosen.step, _Attempts(samples)[chosen]
        return
    made = DataLoader(
        _Attempts(samples),
        batch_size=None,
        sampler=_Order(order),
        num_workers=workers,
        worker_init_fn=_ignore_interrupt,
    )
    for chosen, batch in zip(order(), made, strict=True):
        yield chosen.step, batch


class _Attempts(Dataset["Batch | T5g2Error"]):
    """Batches, or their errors as values: torch would wrap an error that a worker raises into a traceback."""

    def __init__(self, samples: Dataset[Batch]) -> None:
        self._samples = samples

    def __getitem__(self, chosen: MicroBatch) -> Batch | T5g2Error:
        try:
            return self._samples[chosen]
        except Interrupted:
            raise
        except T5g2Error as error:
            return error


def _ignore_interrupt(_: int) -> None:
    """Ignore SIGINT, which a terminal sends to all processes: the main process ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Order:
    """The micro-batches as a sampler of a DataLoader."""

    def __init__(self, order: Callable[[], Iterator[MicroBatch]]) -> None:
        self._order = order

    def __iter__(self) -> Iterator[MicroBatch]:
        return self._order()
