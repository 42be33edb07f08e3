"""Pairs as batches: pure functions of the seed and a sample's number."""

from pathlib import Path
from typing import Final

import numpy as np
import torch

from t5g2convert.adaptation.data.corpora import Corpora
from t5g2convert.adaptation.data.example import NO_POSITION, Example
from t5g2convert.adaptation.data.images import pixel_values
from t5g2convert.adaptation.data.pairs import Pair
from t5g2convert.adaptation.data.tokens import ModelTokens
from t5g2convert.adaptation.pairs.sampler import Order
from t5g2convert.adaptation.pairs.settings import PairSettings
from t5g2convert.adaptation.train.dataset import Batch, Samples, collate, teaching
from t5g2convert.adaptation.train.loss import IDLE_PIXELS, PIXELS
from t5g2convert.adaptation.train.micro_batches import MicroBatch, SampleSize
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2

TASKS: Final = ("pairs", "images")
"""Names of the tasks in logs: pairs without images, and with."""


class PairDataset(Samples[PairSettings]):
    """The batches of packed pairs, by micro-batch.

    Args:
        corpora: The data.
        settings: The run's settings.
        tokens: The model's token ids.
        model: The folder with the image processor.
        shapes: The model's shapes, for the cost of a sample.
        sampler: The order of the pairs.
        pairs: Number of pairs that the order has.
        longest: Tokens of the longest pair, source and target, without bos.
        has_images: Whether pairs have images.
    """

    task_names = TASKS

    def __init__(
        self,
        corpora: Corpora,
        settings: PairSettings,
        tokens: ModelTokens,
        model: Path,
        shapes: T5Gemma2,
        sampler: Order,
        *,
        pairs: int,
        longest: int,
        has_images: bool,
    ) -> None:
        super().__init__(corpora, settings, tokens, model, shapes)
        self.sampler, self.pairs = sampler, pairs
        self.longest_raw, self.has_images = longest, has_images

    def __getitem__(self, chosen: MicroBatch) -> Batch:
        """Return the batch of a micro-batch; see `collate`."""
        pairs = [self.pair(i) for i in chosen.samples]
        examples = [self.example(pair) for pair in pairs]
        batch = collate(examples, chosen.counted, self.tokens)
        images = [image.read() for pair in pairs for image in pair.images]
        if images:
            # The class puts the features of all images, in this order, where the image tokens of the batch are.
            batch[PIXELS] = torch.from_numpy(pixel_values(images, self.model))
        elif chosen.has_images:
            side = self.shapes.vision.image_size
            batch[IDLE_PIXELS] = torch.zeros(1, 3, side, side)
        if self.settings.teacher is not None:
            batch |= teaching(examples, self.tokens.bos, width=batch["labels"].shape[1])
        return batch

    def size(self, step: int, i: int) -> SampleSize:
        """Return the size of a pair, from the table of the pairs alone."""
        corpus, number = self.sampler.pair(i)
        encoder, labels, images = self.corpora[corpus].packed.pairs.sizes(number, number + 1)[0].tolist()
        return self.sized(encoder, labels, images)

    def pair(self, i: int) -> Pair:
        """Return the pair of sample i."""
        corpus, number = self.sampler.pair(i)
        return self.corpora[corpus].packed.pairs[number]

    def example(self, pair: Pair) -> Example:
        """Return a pair as a sample.

        A teacher reads source and target as one text, with one bos. It predicts the target but for the final eos, and
        nothing of a pair with images, which it does not see.
        """
        source, target = pair.source, pair.target
        if len(source) and int(source[0]) == self.tokens.bos:
            source = source[1:]
        if pair.images:
            source = source[:0]
        positions = np.arange(len(source), len(source) + len(target), dtype=np.int64)
        positions[-1] = NO_POSITION
        if pair.images:
            positions[:] = NO_POSITION
        raw = np.concatenate([source, target])
        return Example(pair.source, target, positions, raw, task=1 if pair.images else 0)
