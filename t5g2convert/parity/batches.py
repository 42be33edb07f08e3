"""The inputs of the reference passes: seeded tokens and pixels, or the user's text and picture."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol

import torch
from torch import Tensor

from t5g2convert.checkpoint.header import CONFIG_NAMES
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.reference.prompts import TextCodec, picture
from t5g2convert.reference.stack import Stack
from t5g2convert.reference.vision import VisionTower
from t5g2convert.reference.weights import DTYPES, Weights

SEED: Final = 2512_14856
MAX_TOKENS: Final = 4096 + 24
"""Maximum tokens of a sequence; it does not reach a longer sliding window, and the report says so."""

BEYOND_WINDOW: Final = 24
"""Tokens by which a sequence exceeds the sliding window."""

CHARACTERS: Final = 16
"""Characters of a text to read per token at first; Gemma's tokens have about four."""

SHORTEST: Final = 8
"""Fewest tokens of a text."""

MEMORY_TOKENS: Final = 8
"""Tokens of the hidden memory in decoder_parity."""


@dataclass(frozen=True, slots=True)
class Batch:
    """Token ids and a mask that is False at padding, both [B, T], with remarks for the report."""

    ids_BT: Tensor
    kept_BT: Tensor
    remarks: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ImageBatch:
    """Text with one image: ids with -1 for image tokens, and the image's features."""

    ids_BT: Tensor
    features_ITC: Tensor

    def with_token(self, image_token: int) -> Tensor:
        """Return the ids with a model's image token in them."""
        return torch.where(self.ids_BT < 0, image_token, self.ids_BT)


class TokenModel(Protocol):
    """A model that reads tokens; `weights` are its tensors."""

    weights: Weights

    @property
    def stacks(self) -> Sequence[Stack]:
        """Its text stacks."""

    @property
    def reserved(self) -> Collection[int]:
        """Ids that random sequences must not contain, since they mark something other than a token."""


@dataclass(frozen=True)
class Inputs:
    """The inputs of both models in one verification: seeded tokens and pixels, or the user's text and picture.

    Attributes:
        text: The text file to read instead of seeded tokens.
        tokens: Its tokens.
        picture: The pixels of an image file to read instead of seeded ones, float32.
    """

    text: Path | None = None
    tokens: Sequence[int] = ()
    picture: Tensor | None = None

    def batch(self, target: TokenModel) -> Batch:
        """Return tokens for all stacks of a model, longer than the sliding window.

        Raises:
            UsageError: The text has a token without a row.
        """
        stacks = [stack.settings for stack in target.stacks]
        window = max((stack.sliding_window for stack in stacks if "sliding_attention" in stack.layer_types), default=0)
        length = min(window + BEYOND_WINDOW, MAX_TOKENS)
        if self.text is None:
            exact_eoi, remarks = _exact_eoi(target)
            batch = token_batch(stacks[0].vocab_size, length, never=target.reserved, placed=exact_eoi)
        else:
            tokens, remarks = self._readable(target)
            batch = text_batch(tokens, length)
        longest = batch.ids_BT.shape[1]
        if longest <= window:
            unreached = f"the sequences have {longest} tokens, so the sliding window of {window} was not exceeded"
            remarks = (*remarks, unreached)
        device = target.weights.device
        return Batch(batch.ids_BT.to(device), batch.kept_BT.to(device), remarks)

    def _readable(self, target: TokenModel) -> tuple[Sequence[int], tuple[str, ...]]:
        """Return the text's tokens and remarks; without the end-of-image token where its row need not be exact."""
        settings = target.stacks[0].settings
        vocab, ending = settings.vocab_size, target.stacks[0].eoi_token
        if max(self.tokens) >= vocab:
            raise UsageError(f"{self.text} has token {max(self.tokens)}, but the embedding table has {vocab} rows")
        if ending not in self.tokens:
            unread = "the text has no end-of-image token, so only provenance judged its row"
            return self.tokens, (unread,) if ending is not None and ending < vocab else ()
        exact_eoi, remarks = _exact_eoi(target)
        if exact_eoi is not None:
            return self.tokens, remarks
        return [token for token in self.tokens if token != ending], remarks

    def pixels(self, tower: VisionTower) -> Tensor:
        """Return one image in the size that a tower reads."""
        dtype = tower.weights.dtype or torch.float32
        return pixels(tower, 1, dtype) if self.picture is None else self.picture.to(dtype)

    def image_batch(self, target: TokenModel, features_ITC: Tensor) -> ImageBatch:
        """Return the text with that image in it."""
        ids_BT = image_ids(target.stacks[0].settings.vocab_size, features_ITC.shape[1], never=target.reserved)
        return ImageBatch(ids_BT.to(target.weights.device), features_ITC)


def read_inputs(
    text: Path | None, image: Path | None, folder: Path, vision: VisionTower | None, *, with_source: bool
) -> Inputs:
    """Read the user's text and picture before any check is made.

    Args:
        text: A text file.
        image: A picture file.
        folder: The output, with its tokenizer and its processor's settings.
        vision: The source's tower.
        with_source: Whether there is a source to compare with.

    Raises:
        UsageError: There is no source, or the text or the picture cannot be used.
    """
    if not with_source and (text or image) is not None:
        raise UsageError("--text and --image require --source: both models read them")
    tokens: list[int] = []
    seen = None
    try:
        if text is not None:
            tokens = first_tokens(TextCodec(folder), text, MAX_TOKENS)
            if len(tokens) < SHORTEST:
                raise UsageError(f"{text} has {len(tokens)} tokens, expected at least {SHORTEST}")
        if image is not None:
            if vision is None:
                raise UsageError(f"{image} cannot be used: the source has no vision tower")
            seen = picture(image, vision, folder, torch.float32)
    except CheckpointError as error:
        raise UsageError(f"the text or the picture cannot be read: {error}") from None
    return Inputs(text, tokens, seen)


def _exact_eoi(target: TokenModel) -> tuple[int | None, tuple[str, ...]]:
    """Return the end-of-image token if its row must be exact: in the dtype it was scaled and rounded in."""
    stack = target.stacks[0]
    token = stack.eoi_token
    if token is None or token >= stack.settings.vocab_size or stack.eoi is None:
        return None, ()
    stored = target.weights.checkpoint.tensors.get(stack.eoi)
    if stored is None or DTYPES.get(stored.entry.dtype) == target.weights.dtype:
        return token, ()
    return None, (
        "the end-of-image token was left out: its row is scaled and rounded in "
        f"{CONFIG_NAMES[stored.entry.dtype]} and is exact in that dtype only; provenance judges its bytes",
    )


def generator() -> torch.Generator:
    """Return a fresh generator with the seed of all inputs."""
    return torch.Generator().manual_seed(SEED)


def token_batch(vocab: int, length: int, *, never: Collection[int], placed: int | None = None) -> Batch:
    """Return two sequences of seeded ids, drawn from the whole vocabulary; the second has padding on both sides.

    Args:
        vocab: Rows of the embedding table.
        length: Tokens of a sequence, at least 8.
        never: Ids to leave out.
        placed: An id to put in several places: the end-of-image token, which has an embedding of its own.
    """
    allowed = torch.tensor([number for number in range(vocab) if number not in never])
    ids_BT = allowed[torch.randint(len(allowed), (2, length), generator=generator())]
    if placed is not None:
        ids_BT[:, [length // 3, length // 2, length - 6]] = placed
    return Batch(ids_BT, padded(length))


def text_batch(tokens: Sequence[int], length: int) -> Batch:
    """Return the first tokens of a text (at least 8 tokens) twice: plain, and with padding on both sides."""
    ids_BT = torch.tensor(list(tokens[:length])).expand(2, -1).clone()
    return Batch(ids_BT, padded(ids_BT.shape[1]))


def padded(length: int) -> Tensor:
    """Return a mask of two sequences: the second has three padding tokens in front and two behind."""
    kept_BT = torch.ones(2, length, dtype=torch.bool)
    kept_BT[1, :3] = False
    kept_BT[1, -2:] = False
    return kept_BT


def image_ids(vocab: int, tokens: int, *, never: Collection[int]) -> Tensor:
    """Return a seeded sequence with one image in its middle, [1, T]; -1 marks the image's tokens."""
    text = token_batch(vocab, 10, never=never).ids_BT[0]
    return torch.cat((text[:6], torch.full((tokens,), -1), text[6:]))[None]


def pixels(tower: VisionTower, images: int, dtype: torch.dtype) -> Tensor:
    """Return seeded pixels, [images, channels, side, side], standard normal."""
    return torch.randn(tower.pixel_shape(images), generator=generator()).to(dtype)


def first_tokens(codec: TextCodec, path: Path, count: int) -> list[int]:
    """Return the first tokens of a text file, or all of them if it has fewer.

    Read the start of the file, then twice as much, until two readings give the same first tokens: tokens do not depend
    on text farther on.

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
    """Return the first characters of a text file.

    Raises:
        UsageError: The file cannot be read, or is not UTF-8.
    """
    try:
        if path.exists() and not path.is_file():
            raise UsageError(f"{path} cannot be read: not a file")
        with path.open(encoding="utf-8") as file:
            return file.read(size)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} cannot be read: {error}") from None
