"""What the passes are given: seeded token batches and pixels, or a text and a picture of one's own."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from t5g2convert.checkpoint.dtypes import CONFIG_NAMES
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.reference.prompts import TextCodec, picture
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.vision import VisionTower
from t5g2convert.reference.weights import DTYPES

SEED: Final = 2512_14856
MAX_TOKENS: Final = 8192
"""Tokens of a sequence at most; a sliding window that is longer stays unproved, which is said."""

BEYOND_WINDOW: Final = 24
"""Tokens that a sequence is longer than the sliding window."""

MEMORY_TOKENS: Final = 8
"""Tokens of the hidden memory in decoder_parity."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and which of them are no padding, both [B, T]."""

    ids_BT: Tensor
    kept_BT: Tensor


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Text with one image in it: ids in which -1 stands for an image token, and what the image's tokens are."""

    ids_BT: Tensor
    features_ITC: Tensor

    def with_token(self, image_token: int) -> Tensor:
        """The ids as a model wants them, whose image token this is."""
        return torch.where(self.ids_BT < 0, image_token, self.ids_BT)


class Inputs:
    """The inputs of one verification.

    Attributes:
        text: A text file in place of seeded tokens.
        image: A picture file in place of seeded pixels.
        remarks: What of these inputs a reader of the report must know.
    """

    def __init__(self, text: Path | None = None, image: Path | None = None) -> None:
        self.text = text
        self.image = image
        self.remarks: list[str] = []

    def check(self, folder: Path, source: Path | None) -> None:
        """Refuse inputs that nothing can be made of, before any check is made.

        Raises:
            UsageError: There is no source to compare with, or `folder` has no tokenizer for the text.
        """
        if source is None and (self.text or self.image) is not None:
            raise UsageError("a text or a picture is read by both models, and no source was given")
        if self.text is not None:
            read_text(self.text)
            try:
                TextCodec(folder)
            except CheckpointError as error:
                raise UsageError(f"the text cannot be read: {error}") from None

    def batch(self, target: T5Gemma2Reference, folder: Path) -> Batch:
        """Tokens for both stacks, longer than the sliding window; `folder` has the tokenizer."""
        settings = target.decoder.settings
        window = max(settings.sliding_window, target.encoder.settings.sliding_window)
        length = min(window + BEYOND_WINDOW, MAX_TOKENS)
        if self.text is not None:
            tokens = TextCodec(folder, settings.vocab_size).encode(read_text(self.text))
            ending = target.encoder.settings.eoi_token_index
            if ending in tokens and self._eoi(target) is None:
                tokens = [token for token in tokens if token != ending]
            batch = text_batch(tokens, length)
        else:
            batch = token_batch(settings.vocab_size, length, never=reserved(target), placed=self._eoi(target))
        longest = batch.ids_BT.shape[1]
        if longest <= window:
            self.remarks.append(f"the sequences have {longest} tokens: the sliding window of {window} was not reached")
        return Batch(batch.ids_BT.to(target.weights.device), batch.kept_BT.to(target.weights.device))

    def _eoi(self, target: T5Gemma2Reference) -> int | None:
        """The end-of-image token, where its row must be exact: in the dtype that the row was scaled and rounded in."""
        token = target.encoder.settings.eoi_token_index
        if token >= target.decoder.settings.vocab_size or target.encoder.eoi is None:
            return None
        stored = target.weights.checkpoint.tensors.get(target.encoder.eoi)
        if stored is None or DTYPES.get(stored.entry.dtype) == target.weights.dtype:
            return token
        self.remarks.append(
            "the end-of-image token was left out: its row was scaled and rounded in "
            f"{CONFIG_NAMES[stored.entry.dtype]} and is exact in that dtype only; provenance judges its bytes"
        )
        return None

    def pixels(self, tower: VisionTower, folder: Path) -> Tensor:
        """One image; `folder` has the processor's settings."""
        dtype = tower.weights.dtype or torch.float32
        return pixels(tower, 1, dtype) if self.image is None else picture(self.image, tower, folder, dtype)

    def image_batch(self, target: T5Gemma2Reference, features_ITC: Tensor) -> ImageBatch:
        """Text with that image in it."""
        ids_BT = image_ids(target.decoder.settings.vocab_size, features_ITC.shape[1], never=reserved(target))
        return ImageBatch(ids_BT.to(target.weights.device), features_ITC)


def reserved(target: T5Gemma2Reference) -> set[int]:
    """Ids that do not occur among random ones: they stand for something else than themselves."""
    tokens = target.model.tokens
    return {tokens.image_token_index, tokens.eoi_token_index}


def generator() -> torch.Generator:
    """A fresh generator with the seed of all inputs."""
    return torch.Generator().manual_seed(SEED)


def token_batch(vocab: int, length: int, *, never: set[int], placed: int | None = None) -> Batch:
    """Seeded ids from the whole vocabulary, two sequences; the second has padding on both sides.

    Args:
        vocab: Rows of the embedding table.
        length: Tokens of a sequence, at least 8.
        never: Ids that do not occur.
        placed: An id that is put in several places: the end-of-image token, which has an embedding of its own.
    """
    allowed = torch.tensor([number for number in range(vocab) if number not in never])
    ids_BT = allowed[torch.randint(len(allowed), (2, length), generator=generator())]
    if placed is not None:
        ids_BT[:, [length // 3, length // 2, length - 6]] = placed
    return Batch(ids_BT, padded(length))


def text_batch(tokens: list[int], length: int) -> Batch:
    """The same from a text: its first tokens, and the same again with padding on both sides.

    Raises:
        UsageError: The text has fewer than 8 tokens.
    """
    if len(tokens) < 8:
        raise UsageError(f"the text has {len(tokens)} tokens, expected 8 at least")
    ids_BT = torch.tensor(tokens[:length]).expand(2, -1).clone()
    return Batch(ids_BT, padded(ids_BT.shape[1]))


def padded(length: int) -> Tensor:
    """Nothing padded in the first sequence; three tokens in front and two behind in the second."""
    kept_BT = torch.ones(2, length, dtype=torch.bool)
    kept_BT[1, :3] = False
    kept_BT[1, -2:] = False
    return kept_BT


def image_ids(vocab: int, tokens: int, *, never: set[int]) -> Tensor:
    """A seeded sequence with one image in its middle, [1, T]; -1 stands for its `tokens` tokens."""
    text = token_batch(vocab, 10, never=never).ids_BT[0]
    return torch.cat((text[:6], torch.full((tokens,), -1), text[6:]))[None]


def pixels(tower: VisionTower, images: int, dtype: torch.dtype) -> Tensor:
    """Seeded pixels, [images, channels, side, side], standard normal."""
    return torch.randn(tower.pixel_shape(images), generator=generator()).to(dtype)


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        UsageError: It cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
