"""The samples of a run as batches, and the loader that makes them: pure functions of the seed and a sample's number."""

import signal
from abc import abstractmethod
from collections.abc import Generator, Iterator, Sequence
from itertools import tee
from pathlib import Path
from typing import Generic, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from t5g2convert.adaptation.data.corpora import Corpora
from t5g2convert.adaptation.data.example import Example
from t5g2convert.adaptation.data.tokens import ModelTokens
from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.train.cost import operations
from t5g2convert.adaptation.train.loss import IGNORED
from t5g2convert.adaptation.train.micro_batches import MicroBatch, SampleSize, micro_batches
from t5g2convert.adaptation.train.run_settings import RunSettings
from t5g2convert.adaptation.train.schedule import Leg
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2
from t5g2convert.errors import Interrupted, T5g2Error

Batch = dict[str, Tensor]

S = TypeVar("S", bound=RunSettings)


class Samples(Dataset[Batch], Generic[S]):
    """The samples of an objective; the batch of a micro-batch is made on access, as `collate` returns it.

    Args:
        corpora: The data.
        settings: The run's settings.
        tokens: The model's token ids.
        model: The folder with the image processor.
        shapes: The model's shapes, for the cost of a sample.
    """

    task_names: Sequence[str]
    """The names of the tasks by number, for logs."""
    has_images: bool
    """Whether any step reads images, which train the projector."""
    longest_raw: int
    """Most tokens that a teacher reads of a sample, without bos; 0 if it reads none."""

    def __init__(self, corpora: Corpora, settings: S, tokens: ModelTokens, model: Path, shapes: T5Gemma2) -> None:
        self.corpora, self.settings, self.tokens, self.model, self.shapes = corpora, settings, tokens, model, shapes
        self.earlier: tuple[Leg, ...] = ()
        """The legs of the run before these settings."""
        self._sizes: dict[tuple[int, int, int], SampleSize] = {}

    @abstractmethod
    def __getitem__(self, chosen: MicroBatch) -> Batch:
        """Return the batch of a micro-batch; see `collate`."""

    @abstractmethod
    def size(self, step: int, i: int) -> SampleSize:
        """Return the size of sample i of a step's kind, without making it."""

    def order(self, loop: LoopConfig, *, rank: int, world: int, start: int = 0) -> Iterator[MicroBatch]:
        """Return an iterator over the micro-batches of a process, from step `start` on."""
        return micro_batches(
            self.settings,
            self.size,
            rank=rank,
            world=world,
            tokens=loop.most_tokens(self.settings),
            samples=loop.micro_batch,
            start=start,
            earlier=self.earlier,
        )

    def padded(self, sizes: Sequence[SampleSize]) -> SampleSize:
        """Return the size of a micro-batch, each sample padded to the longest."""
        encoder, labels = (max((getattr(size, name) for size in sizes), default=0) for name in ("encoder", "labels"))
        padding = len(sizes) * self.sized(encoder, labels).cost
        padding -= sum(self.sized(size.encoder, size.labels).cost for size in sizes)
        return SampleSize(len(sizes) * encoder, len(sizes) * labels, sum(size.cost for size in sizes) + padding)

    def sized(self, encoder: int, labels: int, images: int = 0) -> SampleSize:
        """Return a sample's size with its cost."""
        key = encoder, labels, images
        if key not in self._sizes:
            cost = operations(self.shapes, encoder=encoder, decoder=labels, images=images).training
            self._sizes[key] = SampleSize(encoder, labels, cost, images)
        return self._sizes[key]


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
        "input_ids": stacked(encoder, pad),
        "attention_mask": stacked([np.ones_like(each) for each in encoder], 0),
        "decoder_input_ids": stacked(inputs, pad),
        "decoder_attention_mask": stacked([np.ones_like(each) for each in inputs], 0),
        "labels": stacked(hidden, IGNORED),
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
    positions = stacked(at, -1)
    return {
        "raw_ids": stacked(texts, 0),
        "raw_mask": stacked([np.ones_like(each) for each in texts], 0),
        "teacher_positions": torch.nn.functional.pad(positions, (0, width - positions.shape[1]), value=-1),
    }


def stacked(rows: Sequence[NDArray[np.int64]], fill: int) -> Tensor:
    """Return rows as one tensor, padded on the right."""
    result = np.full((len(rows), max(map(len, rows))), fill, dtype=np.int64)
    for target, row in zip(result, rows, strict=True):
        target[: len(row)] = row
    return torch.from_numpy(result)


def load_batches(
    samples: Dataset[Batch], order: Iterator[MicroBatch], *, workers: int
) -> Generator[tuple[MicroBatch, Batch | T5g2Error], None, None]:
    """Yield batches in order, each with its micro-batch; a batch that cannot be made is replaced by its error.

    Closing the generator ends the workers.

    Args:
        samples: The dataset.
        order: All micro-batches.
        workers: Processes that prepare batches ahead of time; with 0 this process makes them on demand.
    """
    if not workers:
        for chosen in order:
            yield chosen, _Attempts(samples)[chosen]
        return
    # The loader takes micro-batches ahead of those that are yielded.
    places, ahead = tee(order)
    made = DataLoader(
        _Attempts(samples),
        batch_size=None,
        sampler=ahead,
        num_workers=workers,
        worker_init_fn=_ignore_signals,
    )
    yield from zip(places, made, strict=True)


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


def _ignore_signals(_: int) -> None:
    """Ignore the signals that a terminal or SLURM sends to all processes: the main process ends the workers."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
