"""Pairs of an input and a target, as the model will see them, read on access."""

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.document_table import TABLE_COLUMNS, DocumentTable, StoredImage, StoredImages
from t5g2convert.adaptation.data.index import Index
from t5g2convert.adaptation.data.token_stream import END, TokenStream, mapped_array

PAIR: Final = "pair"
"""Prefix of the shards of pairs."""

PAIRS_FILE: Final = "pair.doc"
PAIR_PICTURES_FILE: Final = "pair.pic"


@dataclass(frozen=True, slots=True)
class Pair:
    """An input and its target.

    Attributes:
        source: All that the encoder reads: bos first if the model has it, all tokens of images, no eos.
        target: The labels; the last is eos.
        images: The images in the source, in order.
    """

    source: NDArray[np.uint32]
    target: NDArray[np.uint32]
    images: tuple[StoredImage, ...]


class Pairs(DocumentTable[Pair]):
    """All pairs."""

    @classmethod
    def open(cls, folder: Path, index: Index) -> Self:
        """Open the pairs of packed data; data of format 2 has none, and no files of them.

        Raises:
            DataError: A file is missing or has another size.
        """
        where, entry, eoi = folder / PAIRS_FILE, index.pair, index.tokens.eoi
        stream = TokenStream(folder, PAIR, entry)
        if not index.has_pair_files:
            return cls(stream, np.empty((0, TABLE_COLUMNS), END), (), where, eoi)
        images = StoredImages(folder, index.pictures, PAIR_PICTURES_FILE, entry.places)
        rows = mapped_array(where, END, (entry.documents, TABLE_COLUMNS))
        return cls(stream, rows, images, where, eoi)

    def document(
        self, number: int, tokens: NDArray[np.uint32], images: tuple[StoredImage, ...], split: int, behind: int
    ) -> Pair:
        """Return a pair; all its images are in its source.

        Raises:
            DataError: The target is not inside the document, or an image is in it.
        """
        if not max(behind, 1) <= split < len(tokens):
            raise self.error(number, f"has its target at {split} of {len(tokens)}, or an image in it")
        return Pair(tokens[:split], tokens[split:], images)
