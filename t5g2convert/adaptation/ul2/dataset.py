"""UL2 samples as batches: pure functions of the seed and a sample's number."""

from pathlib import Path
from typing import Final

import numpy as np
import torch
from numpy.typing import NDArray

from t5g2convert.adaptation.data.corpora import Corpora
from t5g2convert.adaptation.data.example import Example
from t5g2convert.adaptation.data.image_documents import ImageDocument
from t5g2convert.adaptation.data.images import pixel_values
from t5g2convert.adaptation.data.tokens import ModelTokens
from t5g2convert.adaptation.train.dataset import Batch, Samples, collate, teaching
from t5g2convert.adaptation.train.micro_batches import MicroBatch, SampleSize
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.corruption import Frame, corrupt, lengths, split_prefix
from t5g2convert.adaptation.ul2.mixture import Task
from t5g2convert.adaptation.ul2.sampler import DocumentSampler, Sampler
from t5g2convert.adaptation.ul2.sentinels import Sentinels
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2

IMAGES: Final = "images"
"""Name of the task of documents with images in logs."""


class UL2Dataset(Samples[Settings]):
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
        super().__init__(corpora, settings, tokens, model, shapes)
        self.sentinels, self.sampler, self.documents = sentinels, sampler, documents
        self.task_names = task_names(settings)
        self.frame = frame_of(settings, tokens)
        self.image_task = image_task(settings)
        self._added: dict[int, tuple[int, int, int]] = {}
        raw_lengths = () if sampler is None else sampler.raw_lengths
        self.text_sizes = tuple(self.text_size(task, raw) for task, raw in enumerate(raw_lengths))
        """The size of a text sample of each task, as long as they are at most."""

    def __getitem__(self, chosen: MicroBatch) -> Batch:
        """Return the batch of a micro-batch; see `collate`."""
        if self.settings.kind_of(chosen.step) == "images":
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

    def size(self, step: int, i: int) -> SampleSize:
        """Return the size of sample i of a step's kind, without making it."""
        if self.settings.kind_of(step) == "images":
            assert self.documents is not None, "there are image steps"
            corpus, number = self.documents.document(i)
            encoder, labels, images = self.image_sizes(corpus, number, number + 1)[0].tolist()
            return self.sized(encoder, labels, images)
        assert self.sampler is not None, "there are text steps"
        return self.text_size(self.sampler.task(i), self.sampler.length(i))

    def text_size(self, task: int, raw: int) -> SampleSize:
        """Return the size of a text sample of so many raw tokens."""
        return self.sized(*lengths(raw, self.settings.mixture.tasks[task], self.frame))

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
        return self.sized(len(example.encoder), len(example.labels), len(document.images))

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
    def has_images(self) -> bool:  # type: ignore[override]
        """Whether there are image steps."""
        return self.settings.image_every is not None

    @property
    def longest_raw(self) -> int:  # type: ignore[override]
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
