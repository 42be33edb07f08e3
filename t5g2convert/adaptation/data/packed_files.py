"""All files of packed data, while it is written."""

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.document_encoder import Encoded
from t5g2convert.adaptation.data.document_table import TABLE_COLUMNS
from t5g2convert.adaptation.data.image_documents import PICTURES_FILE
from t5g2convert.adaptation.data.index import PairEntry
from t5g2convert.adaptation.data.output_files import OutputFiles
from t5g2convert.adaptation.data.packed import COUNTS_FILE, Packed
from t5g2convert.adaptation.data.packed_writer import PictureFiles, StreamFiles, places_of
from t5g2convert.adaptation.data.pairs import PAIR, PAIR_PICTURES_FILE
from t5g2convert.adaptation.data.token_stream import END


class PackedFiles:
    """All files of the output except its index and the list of skipped documents.

    They begin with what an earlier run left in them.

    Args:
        files: The files of the output.
        shard_tokens: Tokens per shard, except the last.
        counts: Occurrences of each token in what the earlier run left, uint64 [vocabulary].

    Attributes:
        files: The files of the output.
        counts: Occurrences of each token, uint64 [vocabulary].
        pictures: The images.
    """

    def __init__(self, files: OutputFiles, shard_tokens: int, counts: NDArray[np.uint64]) -> None:
        self.files, self.counts = files, counts
        self._text = StreamFiles(files, "text", shard_tokens)
        self._image = StreamFiles(files, "image", shard_tokens, columns=TABLE_COLUMNS)
        self._pair = StreamFiles(files, PAIR, shard_tokens, columns=TABLE_COLUMNS)
        self._image_rows, self._pair_rows = files.open(PICTURES_FILE), files.open(PAIR_PICTURES_FILE)
        self.pictures = PictureFiles(files, self._image_rows, self._pair_rows)
        self._counts_file = files.open(COUNTS_FILE)

    @property
    def documents(self) -> int:
        """Documents and pairs written so far."""
        return self._text.documents + self._image.documents + self._pair.documents

    def take_over(self, existing: Packed) -> None:
        """Start with all documents, pairs and images of existing packed data.

        Raises:
            DataError: Its tables cannot be read, or were modified.
            OutputError: The disk is full or fails.
        """
        index = existing.index
        self._text.take_over(existing.folder, index.text)
        self._image.take_over(existing.folder, index.image)
        rows = [(self._image_rows, index.pictures.places, index.pictures.sha256)]
        if index.has_pair_files:
            self._pair.take_over(existing.folder, index.pair)
            rows.append((self._pair_rows, index.pair.places, index.pair.pictures))
        self.pictures.take_over(existing.folder, index.pictures, *rows)
        self.counts += existing.counts

    def add(self, documents: Sequence[Encoded]) -> None:
        """Append documents and pairs.

        Raises:
            OutputError: The disk is full or fails.
        """
        for document in documents:
            if not document.pair and not document.images:
                self._text.add(document.tokens)
                continue
            stream, rows = (self._pair, self._pair_rows) if document.pair else (self._image, self._image_rows)
            self.pictures.add(document.images, rows)
            stream.add(document.tokens, places_of(rows), document.split)
        if documents:
            tokens = np.concatenate([document.tokens for document in documents])
            self.counts += np.bincount(tokens, minlength=len(self.counts)).astype(np.uint64)

    def finish(self, special: Collection[int], *, cut: int, too_long: int) -> dict[str, Any]:
        """Close all files and return their entries in the index.

        Args:
            special: Tokens to count in the index.
            cut: Pairs with an input that was cut.
            too_long: Pairs that were skipped because they are too long.
        """
        flush = self.files.flush
        self._counts_file.write(self.counts.astype(END))
        present = np.flatnonzero(self.counts)
        places, pictures = places_of(self._pair_rows), self._pair_rows.finish(flush=flush)
        pair = PairEntry(**dict(self._pair.finish()), places=places, pictures=pictures, cut=cut, too_long=too_long)
        return {
            "text": self._text.finish(),
            "image": self._image.finish(),
            "pair": pair,
            "pictures": self.pictures.finish(self._image_rows),
            "counts": self._counts_file.finish(flush=flush),
            "highest": int(present[-1]),
            "special": {str(token): int(self.counts[token]) for token in present.tolist() if token in special},
        }
