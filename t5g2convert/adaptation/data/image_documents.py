"""Documents with images, read on access."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.document_table import DocumentTable, StoredImage

PICTURES_FILE: Final = "image.pic"


@dataclass(frozen=True, slots=True)
class ImageDocument:
    """A document with images.

    Attributes:
        tokens: Token ids, including eos.
        images: Images, in the order of the text.
        split: Start of the target: after the end-of-image token of the last image.
    """

    tokens: NDArray[np.uint32]
    images: tuple[StoredImage, ...]
    split: int


class ImageDocuments(DocumentTable[ImageDocument]):
    """All documents with images."""

    fewest_images = 1

    def document(
        self, number: int, tokens: NDArray[np.uint32], images: tuple[StoredImage, ...], split: int, behind: int
    ) -> ImageDocument:
        """Return a document; its target starts after its last image.

        Raises:
            DataError: The target starts elsewhere.
        """
        if split != behind:
            raise self.error(number, f"has its target at {split}, but its last image ends at {behind}")
        return ImageDocument(tokens, images, split)
