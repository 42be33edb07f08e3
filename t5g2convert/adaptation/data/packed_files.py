"""The files of packed data, except the index and the list of skipped documents."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.document_encoder import Encoded
from t5g2convert.adaptation.data.image_documents import IMAGE_COLUMNS
from t5g2convert.adaptation.data.output_files import OutputFiles
from t5g2convert.adaptation.data.packed import COUNTS_FILE, Packed
from t5g2convert.adaptation.data.packed_writer import PictureFiles, StreamFiles
from t5g2convert.adaptation.data.token_stream import END


class PackedFiles:
    """The files of packed data; they begin with what an earlier run left in them.

    Args:
        files: The files of the output.
        shard_tokens: Tokens per shard, except the last.
        counts: Occurrences of each token in what the earlier run left, uint64 [vocabulary].

    Attributes:
        counts: Occurrences of each token, uint64 [vocabulary].
        pictures: The images.
    """

    def __init__(self, files: OutputFiles, shard_tokens: int, counts: NDArray[np.uint64]) -> None:
        self.files, self.counts = files, counts
        self.pictures = PictureFiles(files)
        self._text = StreamFiles(files, "text", shard_tokens)
        self._image = StreamFiles(files, "image", shard_tokens, columns=IMAGE_COLUMNS)
        self._counts_file = files.open(COUNTS_FILE)

    @property
    def documents(self) -> int:
        """The number of documents."""
        return self._text.documents + self._image.documents

    def take_over(self, existing: Packed) -> None:
        """Start with all documents of existing packed data.

        Raises:
            DataError: Its tables cannot be read, or were modified.
            OutputError: The disk is full or fails.
        """
        index = existing.index
        self._text.take_over(existing.folder, index.text)
        self._image.take_over(existing.folder, index.image)
        self.pictures.take_over(existing.folder, index.pictures)
        self.counts += existing.counts

    def add(self, documents: Sequence[Encoded]) -> None:
        """Append documents.

        Raises:
            OutputError: The disk is full or fails.
        """
        for document in documents:
            if document.images:
                self.pictures.add(document.images)
                self._image.add(document.tokens, self.pictures.places, document.split)
            else:
                self._text.add(document.tokens)
        if documents:
            tokens = np.concatenate([document.tokens for document in documents])
            self.counts += np.bincount(tokens, minlength=len(self.counts)).astype(np.uint64)

    def finish(self, special: Collection[int]) -> dict[str, Any]:
        """Close all files and return their entries in the index.

        Args:
            special: Tokens to count in the index.
        """
        self._counts_file.write(self.counts.astype(END))
        present = np.flatnonzero(self.counts)
        return {
            "text": self._text.finish(),
            "image": self._image.finish(),
            "pictures": self.pictures.finish(),
            "counts": self._counts_file.finish(flush=self.files.flush),
            "highest": int(present[-1]),
            "special": {str(token): int(self.counts[token]) for token in present.tolist() if token in special},
        }
