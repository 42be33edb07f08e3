"""Pairs before they are tokenized, and the parts of a text that are tokens already."""

from collections.abc import Sequence
from dataclasses import dataclass

from t5g2convert.adaptation.data.image_columns import ImageSource
from t5g2convert.adaptation.data.images import text_pieces
from t5g2convert.adaptation.data.tokens import ModelTokens

Part = str | int
"""A text to tokenize, in which names of special tokens are plain characters, or the id of a token.

The id of the begin-of-image token is the place of a whole image.
"""


@dataclass(frozen=True, slots=True)
class PairDocument:
    """An input and its target.

    Attributes:
        where: The file with the line or row, for errors.
        source: The input; bos is put before it unless it begins with it.
        target: The target; eos is put behind it unless it ends with it.
        images: The images of the input, in order.
    """

    where: str
    source: tuple[Part, ...]
    target: tuple[Part, ...]
    images: tuple[ImageSource, ...] = ()


def with_places(texts: Sequence[str], tokens: ModelTokens) -> list[Part]:
    """Return the texts around the images of a document with a place for each image between them."""
    parts: list[Part] = [texts[0]]
    for text in texts[1:]:
        parts += [tokens.boi, text]
    return parts


def plain_pair(
    where: str, text: str, target: str, images: tuple[ImageSource, ...], tokens: ModelTokens
) -> PairDocument:
    """Return the pair of an input and a target without a chat template.

    The images are where the input has `<start_of_image>`; without it, they come first.

    Raises:
        ValueError: The target is empty, or the input without images; or the input has another number of places.
    """
    if not images and not text.strip():
        raise ValueError("the input is empty")
    if not target.strip():
        raise ValueError("the target is empty")
    texts = text_pieces(text, len(images), at_end=True) if images else [text]
    return PairDocument(where, tuple(with_places(texts, tokens)), (target,), images)
