"""What the passes are given: seeded token batches and pixels, or a text and a picture of one's own."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from t5g2convert.checkpoint.dtypes import CONFIG_NAMES
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.parity.parents import Parent
from t5g2convert.reference.prompts import TextCodec, picture
from t5g2convert.reference.stack import Stack
from t5g2convert.reference.vision import VisionTower
from t5g2convert.reference.weights import DTYPES, Weights

SEED: Final = 2512_14856
MAX_TOKENS: Final = 4096 + 24
"""Tokens of a sequence at most; a sliding window that is longer stays unproved, which is said."""

BEYOND_WINDOW: Final = 24
"""Tokens that a sequence is longer than the sliding window."""

CHARACTERS: Final = 16
"""Characters of a text that are read for each token at first; Gemma's tokens have about four."""

SHORTEST: Final = 8
"""Tokens of a text at least."""

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


class Reader(Protocol):
    """A model that reads tokens; `weights` are its tensors."""

    weights: Weights

    @property
    def stacks(self) -> Sequence[Stack]:
        """Its text stacks."""

    @property
    def reserved(self) -> Collection[int]:
        """Ids that do not occur among random ones: they stand for something else than themselves."""


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
        self._tokens: list[int] = []
        self._pixels: Tensor | None = None

    def check(self, folder: Path, parent: Parent | None) -> None:
        """Read the text and look at the picture, before any check is made.

        Args:
            folder: The output, with its tokenizer and its processor's settings.
            parent: The source, if there is one.

        Raises:
            UsageError: There is nothing to compare with, or nothing can be made of the text or the picture.
        """
        if parent is None and (self.text or self.image) is not None:
            raise UsageError("a text or a picture is read by both models, and no source was given")
        try:
            if self.text is not None:
                self._tokens = first_tokens(TextCodec(folder), self.text, MAX_TOKENS)
                if len(self._tokens) < SHORTEST:
                    raise UsageError(f"{self.text} has {len(self._tokens)} tokens, expected {SHORTEST} at least")
            if self.image is not None and parent is not None:
                if parent.vision is None:
                    raise UsageError(f"{self.image} cannot be looked at: the source has no images")
                self._pixels = picture(self.image, parent.vision, folder, torch.float32)
        except CheckpointError as error:
            raise UsageError(f"the text or the picture cannot be read: {error}") from None

    def batch(self, target: Reader) -> Batch:
        """Tokens for all stacks of a model, longer than the sliding window."""
        stacks = [stack.settings for stack in target.stacks]
        settings = stacks[0]
        window = max((stack.sliding_window for stack in stacks if "sliding_attention" in stack.layer_types), default=0)
        length = min(window + BEYOND_WINDOW, MAX_TOKENS)
        if self.text is not None:
            batch = text_batch(self._readable(target), length)
        else:
            batch = token_batch(settings.vocab_size, length, never=target.reserved, placed=self._eoi(target))
        longest = batch.ids_BT.shape[1]
        if longest <= window:
            self.remarks.append(f"the sequences have {longest} tokens: the sliding window of {window} was not reached")
        return Batch(batch.ids_BT.to(target.weights.device), batch.kept_BT.to(target.weights.device))

    def _readable(self, target: Reader) -> list[int]:
        """The text's tokens, without the end-of-image token where its row need not be exact."""
        settings = target.stacks[0].settings
        vocab, ending = settings.vocab_size, target.stacks[0].eoi_token
        if max(self._tokens) >= vocab:
            raise UsageError(f"{self.text} has token {max(self._tokens)}, the embedding table has {vocab} rows")
        if ending not in self._tokens:
            if ending is not None and ending < vocab:
                self.remarks.append("the text has no end-of-image token: its row was judged by provenance alone")
            return self._tokens
        exact = self._eoi(target) is not None
        return self._tokens if exact else [token for token in self._tokens if token != ending]

    def _eoi(self, target: Reader) -> int | None:
        """The end-of-image token, where its row must be exact: in the dtype that the row was scaled and rounded in."""
        stack = target.stacks[0]
        token = stack.eoi_token
        if token is None or token >= stack.settings.vocab_size or stack.eoi is None:
            return None
        stored = target.weights.checkpoint.tensors.get(stack.eoi)
        if stored is None or DTYPES.get(stored.entry.dtype) == target.weights.dtype:
            return token
        self.remarks.append(
            "the end-of-image token was left out: its row was scaled and rounded in "
            f"{CONFIG_NAMES[stored.entry.dtype]} and is exact in that dtype only; provenance judges its bytes"
        )
        return None

    def pixels(self, tower: VisionTower) -> Tensor:
        """One image."""
        dtype = tower.weights.dtype or torch.float32
        return pixels(tower, 1, dtype) if self._pixels is None else self._pixels.to(dtype)

    def image_batch(self, target: Reader, features_ITC: Tensor) -> ImageBatch:
        """Text with that image in it."""
        ids_BT = image_ids(target.stacks[0].settings.vocab_size, features_ITC.shape[1], never=target.reserved)
        return ImageBatch(ids_BT.to(target.weights.device), features_ITC)


def generator() -> torch.Generator:
    """A fresh generator with the seed of all inputs."""
    return torch.Generator().manual_seed(SEED)


def token_batch(vocab: int, length: int, *, never: Collection[int], placed: int | None = None) -> Batch:
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
    """The same from a text of 8 tokens or more: its first tokens, and the same again with padding on both sides."""
    ids_BT = torch.tensor(tokens[:length]).expand(2, -1).clone()
    return Batch(ids_BT, padded(ids_BT.shape[1]))


def padded(length: int) -> Tensor:
    """Nothing padded in the first sequence; three tokens in front and two behind in the second."""
    kept_BT = torch.ones(2, length, dtype=torch.bool)
    kept_BT[1, :3] = False
    kept_BT[1, -2:] = False
    return kept_BT


def image_ids(vocab: int, tokens: int, *, never: Collection[int]) -> Tensor:
    """A seeded sequence with one image in its middle, [1, T]; -1 stands for its `tokens` tokens."""
    text = token_batch(vocab, 10, never=never).ids_BT[0]
    return torch.cat((text[:6], torch.full((tokens,), -1), text[6:]))[None]


def pixels(tower: VisionTower, images: int, dtype: torch.dtype) -> Tensor:
    """Seeded pixels, [images, channels, side, side], standard normal."""
    return torch.randn(tower.pixel_shape(images), generator=generator()).to(dtype)


def first_tokens(codec: TextCodec, path: Path, count: int) -> list[int]:
    """The first tokens of a text file, all of them where it has fewer.

    As much of the file is read as it takes: a part of it, and another part twice as long, must have the same first
    tokens. Then these are those of the whole file, because no token depends on text so far away.

    Raises:
        CheckpointError: A token has no row.
        UsageError: The file cannot be read, or is not UTF-8.
    """
    size, before = CHARACTERS * count, None
    while True:
        text = read_text(path, size)
        tokens = codec.encode(text)[:count]
        if len(text) < size or (tokens == before and len(tokens) == count):
            return tokens
        size, before = 2 * size, tokens


def read_text(path: Path, size: int) -> str:
    """The first characters of a text file.

    Raises:
        UsageError: It cannot be read, or is not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} cannot be read: it is not a file")
        with path.open(encoding="utf-8") as file:
            return file.read(size)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
