"""UL2 samples as batches, and the loader that makes them: pure functions of the seed and a sample's number."""

import signal
from collections.abc import Generator, Iterator, Sequence
from itertools import tee
from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from t5g2convert.adaptation.data.corpora import Corpora
from t5g2convert.adaptation.data.image_documents import ImageDocument
from t5g2convert.adaptation.data.images import pixel_values
from t5g2convert.adaptation.data.tokens import ModelTokens
from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.train.cost import operations
from t5g2convert.adaptation.train.loss import IGNORED
from t5g2convert.adaptation.train.schedule import Leg, is_image_step
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.corruption import Example, Frame, corrupt, lengths, split_prefix
from t5g2convert.adaptation.ul2.micro_batches import MicroBatch, SampleSize, micro_batches
from t5g2convert.adaptation.ul2.mixture import Task
from t5g2convert.adaptation.ul2.sampler import DocumentSampler, Sampler
from t5g2convert.adaptation.ul2.sentinels import Sentinels
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2
from t5g2convert.errors import Interrupted, T5g2Error

IMAGES: Final = "images"
"""Name of the task of documents with images in logs."""

Batch = dict[str, Tensor]


class UL2Dataset(Dataset[Batch]):
    """The batches of packed data, by micro-batch.

    Args:
        corpora: The data.
        settings: The run's settings.
        tokens: The model's token ids.
        sentinels: The ids that replace spans.
        sampler: The order of text samples; None if all steps are image steps.
        documents: The order of documents with images; None without image steps.
        model: The folder with the image processor.
        shapes: The model's shapes, for the cost of a sample.
    """

    def __init__(
        self,
        corpora: Corpora,
        settings: Settings,
        tokens: ModelTokens,
        sentinels: Sentinels,
        sampler: Sampler | None,
        documents: DocumentSampler | None,
        model: Path,
        shapes: T5Gemma2,
    ) -> None:
        self.corpora, self.settings, self.tokens, self.sentinels = corpora, settings, tokens, sentinels
        self.sampler, self.documents, self.model, self.shapes = sampler, documents, model, shapes
        self.earlier: tuple[Leg, ...] = ()
        """The legs of the run before these settings."""
        self.frame = frame_of(settings, tokens)
        self.image_task = image_task(settings)
        self._sizes: dict[tuple[int, int, int], SampleSize] = {}
        self._added: dict[int, tuple[int, int, int]] = {}
        raw_lengths = () if sampler is None else sampler.raw_lengths
        self.text_sizes = tuple(self.text_size(task, raw) for task, raw in enumerate(raw_lengths))
        """The size of a text sample of each task, as long as they are at most."""

    def __getitem__(self, chosen: MicroBatch) -> Batch:
        """Return the batch of a micro-batch; see `collate`."""
        if is_image_step(self.settings, chosen.step):
            documents = [self.document(i) for i in chosen.samples]
            examples = [self.image(document) for document in documents]
            images = [image.read() for document in documents for image in document.images]
            batch = collate(examples, chosen.counted, self.tokens)
            batch["pixel_values"] = torch.from_numpy(pixel_values(images, self.model))
            return batch
        examples = [self.text(i) for i in chosen.samples]
        batch = collate(examples, chosen.counted, self.tokens)
        if self.settings.teacher is not None:
            # Gemma 3 has never read text without bos, whatever the encoder reads.
            batch |= teaching(examples, self.tokens.bos, width=batch["labels"].shape[1])
        return batch

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

    def size(self, step: int, i: int) -> SampleSize:
        """Return the size of sample i of a step's kind, without making it."""
        if is_image_step(self.settings, step):
            assert self.documents is not None, "there are image steps"
            corpus, number = self.documents.document(i)
            encoder, labels, images = self.image_sizes(corpus, number, number + 1)[0].tolist()
            return self._size(encoder, labels, images)
        assert self.sampler is not None, "there are text steps"
        return self.text_size(self.sampler.task(i), self.sampler.length(i))

    def text_size(self, task: int, raw: int) -> SampleSize:
        """Return the size of a text sample of so many raw tokens."""
        return self._size(*lengths(raw, self.settings.mixture.tasks[task], self.frame))

    def image_sizes(self, corpus: int, start: int, stop: int) -> NDArray[np.int64]:
        """Return the sizes of samples of documents with images, [stop - start, 3]: encoder tokens, labels and images.

        Only the table of the documents is read: the objective adds the same tokens to each.
        """
        documents = self.corpora[corpus].packed.images
        if corpus not in self._added:
            first = documents[0]
            size = self.image_size(first)
            self._added[corpus] = size.encoder - first.split, size.labels - (len(first.tokens) - first.split), 0
        return documents.sizes(start, stop) + self._added[corpus]

    def image_size(self, document: ImageDocument) -> SampleSize:
        """Return the size of the sample of a document with images."""
        example = self.image(document)
        return self._size(len(example.encoder), len(example.labels), len(document.images))

    def padded(self, sizes: Sequence[SampleSize]) -> SampleSize:
        """Return the size of a micro-batch, each sample padded to the longest."""
        encoder, labels = (max((getattr(size, name) for size in sizes), default=0) for name in ("encoder", "labels"))
        padding = len(sizes) * self._size(encoder, labels).cost
        padding -= sum(self._size(size.encoder, size.labels).cost for size in sizes)
        return SampleSize(len(sizes) * encoder, len(sizes) * labels, sum(size.cost for size in sizes) + padding)

    def _size(self, encoder: int, labels: int, images: int = 0) -> SampleSize:
        key = encoder, labels, images
        if key not in self._sizes:
            cost = operations(self.shapes, encoder=encoder, decoder=labels, images=images).training
            self._sizes[key] = SampleSize(encoder, labels, cost)
        return self._sizes[key]

    def text(self, i: int) -> Example:
        """Return text sample i."""
        assert self.sampler is not None, "there are text steps"
        number = self.sampler.task(i)
        found = self.sampler.text(i)
        raw = self.corpora[found.corpus].packed.read(found.start, found.stop)
        task = self.settings.mixture.tasks[number]
        return corrupt(raw, task, self.sentinels, self.frame, self.sampler.rng(i), index=number)

    def document(self, i: int) -> ImageDocument:
        """Return the document of image sample i."""
        assert self.documents is not None, "there are image steps"
        corpus, number = self.documents.document(i)
        return self.corpora[corpus].packed.images[number]

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
