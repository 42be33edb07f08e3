"""All files of packed data, while it is written."""

from contextlib import ExitStack
from pathlib import Path

from t5g2convert.adaptation.data.document_encoder import Encoded
from t5g2convert.adaptation.data.image_documents import PICTURES_FILE
from t5g2convert.adaptation.data.index import PairEntry
from t5g2convert.adaptation.data.packed import COUNTS_FILE, Packed
from t5g2convert.adaptation.data.packed_writer import HashedFile, PictureFiles, StreamFiles, places_of
from t5g2convert.adaptation.data.pairs import PAIR, PAIR_PICTURES_FILE


class PackedFiles:
    """All files of the output except its index and the list of skipped documents.

    Args:
        folder: The folder to write to.
        shard_tokens: Tokens per shard, except the last.
        stack: Closes the files.
        flush: Wait until all bytes are on disk.
    """

    def __init__(self, folder: Path, shard_tokens: int, stack: ExitStack, *, flush: bool) -> None:
        self.folder, self.flush = folder, flush
        self.text = stack.enter_context(StreamFiles(folder, "text", shard_tokens, flush=flush))
        self.image = stack.enter_context(StreamFiles(folder, "image", shard_tokens, flush=flush))
        self.pair = stack.enter_context(StreamFiles(folder, PAIR, shard_tokens, flush=flush))
        self.pictures = stack.enter_context(PictureFiles(folder, flush=flush))
        self.image_rows, self.pair_rows = (
            stack.enter_context(HashedFile(folder / name)) for name in (PICTURES_FILE, PAIR_PICTURES_FILE)
        )
        self.counts = stack.enter_context(HashedFile(folder / COUNTS_FILE))

    @property
    def documents(self) -> int:
        """Documents and pairs written so far."""
        return self.text.documents + self.image.documents + self.pair.documents

    def take_over(self, existing: Packed) -> None:
        """Start with all documents, pairs and images of existing packed data.

        Raises:
            DataError: Its tables cannot be read, or were modified.
            OutputError: The disk is full or fails.
        """
        index = existing.index
        self.text.take_over(existing.folder, index.text)
        self.image.take_over(existing.folder, index.image)
        rows = [(self.image_rows, index.pictures.places, index.pictures.sha256)]
        if index.has_pair_files:
            self.pair.take_over(existing.folder, index.pair)
            rows.append((self.pair_rows, index.pair.places, index.pair.pictures))
        self.pictures.take_over(existing.folder, index.pictures, *rows)

    def write(self, document: Encoded) -> None:
        """Append a document or pair.

        Raises:
            OutputError: The disk is full or fails.
        """
        if not document.pair and not document.images:
            self.text.add(document.tokens)
            return
        stream, rows = (self.pair, self.pair_rows) if document.pair else (self.image, self.image_rows)
        self.pictures.add(document.images, rows)
        stream.add(document.tokens, places_of(rows), document.split)

    def finish_pairs(self, *, cut: int, too_long: int) -> PairEntry:
        """Close the files of pairs and return their entry for the index."""
        entry, places = self.pair.finish(), places_of(self.pair_rows)
        pictures = self.pair_rows.finish(flush=self.flush)
        return PairEntry(**dict(entry), places=places, pictures=pictures, cut=cut, too_long=too_long)
