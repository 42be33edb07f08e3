"""Rows as batches of documents to encode, read ahead of the writing."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Final

from t5g2convert.adaptation.data.chat import PairMaker
from t5g2convert.adaptation.data.document_encoder import Pieces
from t5g2convert.adaptation.data.images import PLACEHOLDER, text_pieces
from t5g2convert.adaptation.data.pack_journal import InputDigest, Mark, PackState
from t5g2convert.adaptation.data.pair_documents import PairDocument, with_places
from t5g2convert.adaptation.data.rows import Document, Fault, Row
from t5g2convert.adaptation.data.tokens import ModelTokens

BATCH_CHARACTERS: Final = 1 << 20
"""Characters tokenized at once, plus those of at most one document."""

BATCH_DOCUMENTS: Final = 4096

BATCH_IMAGES: Final = 64
"""Images in memory at once, plus those of at most one document."""

MAX_FAULTS: Final = 100
"""Faulty documents after which packing stops."""


class DocumentBatches:
    """Reads rows, and notes those that have no text or cannot be packed.

    Args:
        maker: Makes the documents and pairs of a row.
        tokens: The token ids of the model.
        begun: The state of an interrupted run.
        skip_bad: Documents that may be skipped.

    Attributes:
        faults: The documents that cannot be packed, by number; those that the encoder finds are added.
        blank: Documents without text; with an earlier run, all that it found empty.
        plain_placeholders: Documents without images that have a placeholder in their text.
    """

    def __init__(self, maker: PairMaker, tokens: ModelTokens, begun: PackState | None, *, skip_bad: int) -> None:
        self._maker, self._tokens, self._skip_bad = maker, tokens, skip_bad
        self._input = InputDigest(begun)
        self._marks: deque[Mark | None] = deque()
        self.faults: dict[int, Fault] = {} if begun is None else begun.read_faults()
        self._number = 0 if begun is None else begun.documents
        self.blank = 0 if begun is None else begun.empty
        self.plain_placeholders = 0 if begun is None else begun.plain_placeholders

    def read(self, rows: Iterable[Row | PairDocument]) -> Iterator[list[Pieces]]:
        """Yield the documents of all rows in batches, until there are too many faults.

        Another run can go on behind a batch that ends with a row; the pairs of a long conversation fill several.

        Raises:
            DataError: The rows that an interrupted run packed are not the same.
        """
        batch, characters, images = list[Pieces](), 0, 0

        def is_full() -> bool:
            return characters >= BATCH_CHARACTERS or images >= BATCH_IMAGES or len(batch) >= BATCH_DOCUMENTS

        for row in self._input.follow(rows):
            for document in self._maker.documents([row]):
                if is_full():
                    self._marks.append(None)
                    yield batch
                    batch, characters, images = [], 0, 0
                if (pieces := self._pieces(document)) is not None:
                    batch.append(pieces)
                    characters += sum(
                        len(part) for part in (*pieces.source, *(pieces.target or ())) if isinstance(part, str)
                    )
                    images += len(pieces.images)
                self._number += 1
            if len(self.faults) >= self._skip_bad + MAX_FAULTS:
                break
            if is_full():
                self._note_mark()
                yield batch
                batch, characters, images = [], 0, 0
        if batch:
            self._note_mark()
            yield batch

    @property
    def sha256(self) -> str:
        """The sha256 of all rows so far, hexadecimal."""
        return self._input.sha256

    def next_mark(self) -> Mark | None:
        """Return how far the input was read at the end of a batch; to be called once for each batch, in order.

        None for a batch that ends inside a row.
        """
        return self._marks.popleft()

    def _note_mark(self) -> None:
        read = self._input
        self._marks.append(Mark(read.rows, read.sha256, self._number, self.blank, self.plain_placeholders))

    def _pieces(self, document: Document | PairDocument | Fault) -> Pieces | None:
        if isinstance(document, Fault):
            self.faults[self._number] = document
            return None
        if isinstance(document, Document) and not document.images and not document.text.strip():
            self.blank += 1
            return None
        source, target = (document.source, document.target) if isinstance(document, PairDocument) else ((), None)
        try:
            if document.images and not self._tokens.pictures:
                raise ValueError("has images, but the model has no vision tower")
            if isinstance(document, Document):
                texts = text_pieces(document.text, len(document.images)) if document.images else [document.text]
                source = tuple(with_places(texts, self._tokens))
        except ValueError as error:
            self.faults[self._number] = Fault(document.where, str(error))
            return None
        self.plain_placeholders += not document.images and any(
            PLACEHOLDER in part for part in source if isinstance(part, str)
        )
        return Pieces(self._number, document.where, source, target, document.images)
