"""Reading packed data: memory-mapped token ids, the ends of documents, and images in shards.

::

    index.json          the contents, with the sha256 of every file
    text-00000.bin      uint32, little-endian: the tokens of all documents without images, concatenated
    text.doc            uint64: the end of each of these documents, in tokens from the start
    image-00000.bin     the tokens of all documents with images
    image.doc           uint64 [documents, 3]: the end of each in the tokens, its end in image.pic, and the start of
                        its target in the document
    image.pic           56 bytes per image of a document: its sha256, extension, shard, first byte, number of bytes
    pair-00000.bin      the tokens of all pairs: each input, complete, and its target, complete
    pair.doc            uint64 [pairs, 3], like image.doc
    pair.pic            the images of the inputs, like image.pic
    pictures-00000.bin  the bytes of the images, each distinct image once, concatenated
    counts.bin          uint64 [vocabulary]: occurrences of each token in all documents
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Self

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.document_table import PICTURES, TABLE_COLUMNS, StoredImages
from t5g2convert.adaptation.data.image_documents import PICTURES_FILE, ImageDocuments
from t5g2convert.adaptation.data.index import INDEX_FILE, Index, PictureShardEntry, ShardEntry, read_index, tokens_entry
from t5g2convert.adaptation.data.pairs import PAIR, PAIR_PICTURES_FILE, PAIRS_FILE, Pairs
from t5g2convert.adaptation.data.token_stream import END, TokenStream, mapped_array, shard_name
from t5g2convert.adaptation.data.tokens import read_tokens, tokenizer_sha256
from t5g2convert.checkpoint.file_store import sha256_of
from t5g2convert.errors import DataError

COUNTS_FILE: Final = "counts.bin"
SKIPPED_FILE: Final = "skipped.jsonl"

CHECKED_AT_ONCE: Final = 1 << 20
"""Ends of documents compared at once."""


@dataclass(frozen=True, slots=True)
class Packed:
    """A folder of packed data.

    Attributes:
        folder: The folder.
        index: index.json.
        sha256: sha256 of index.json, which lists the sha256 of all files: the identity of the data.
        text: The documents without images.
        images: The documents with images.
        pairs: The pairs of an input and a target.
        counts: Occurrences of each token in all documents, uint64 [vocabulary].
    """

    folder: Path
    index: Index
    sha256: str
    text: TokenStream
    images: ImageDocuments
    pairs: Pairs
    counts: NDArray[np.uint64]

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False, sha256: str | None = None) -> Self:
        """Open a folder written by `t5g2 pack`, and check the sizes of all files.

        The number of files does not depend on the number of documents and images, only on their bytes. No document,
        image or table is read, except the last row of the tables.

        Args:
            folder: The folder.
            verify: Also call `check_bytes`.
            sha256: Expected sha256 of the index, if the data was opened before.

        Raises:
            DataError: The data is missing, damaged, or has a different sha256.
        """
        index, found = read_index(folder)
        if sha256 not in (None, found):
            raise DataError(
                f"has sha256 {found}, expected {sha256}",
                where=folder / INDEX_FILE,
                hint="use the data that the run started with",
            )
        text, image = TokenStream(folder, "text", index.text), TokenStream(folder, "image", index.image)
        ends = mapped_array(folder / "text.doc", END, (index.text.documents,))
        rows = mapped_array(folder / "image.doc", END, (index.image.documents, TABLE_COLUMNS))
        counts = mapped_array(folder / COUNTS_FILE, END, (index.tokens.vocabulary,))
        _check_last(ends, index.text.tokens, folder / "text.doc")
        _check_last(rows[:, 0], index.image.tokens, folder / "image.doc")
        _check_last(rows[:, 1], index.pictures.places, folder / "image.doc")
        stored = StoredImages(folder, index.pictures, PICTURES_FILE, index.pictures.places)
        images = ImageDocuments(image, rows, stored, folder / "image.doc", index.tokens.eoi)
        pairs = Pairs.open(folder, index)
        _check_last(pairs.rows[:, 0], index.pair.tokens, folder / PAIRS_FILE)
        _check_last(pairs.rows[:, 1], index.pair.places, folder / PAIRS_FILE)
        packed = cls(folder, index, found, text, images, pairs, counts)
        if verify:
            packed.check_bytes()
        return packed

    def check_bytes(self, *, part: int = 0, parts: int = 1) -> None:
        """Compare the sha256 of all files and check the order of all ends, or with `parts` this part's share of them.

        Raises:
            DataError: Files cannot be read or were modified, all are listed; or a document ends before it begins.
        """
        _verify(self.folder, self.index, part, parts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Let another process open the folder again, instead of pickling a copy of all data."""
        return partial(Packed.open, sha256=self.sha256), (self.folder,)

    @property
    def tokens(self) -> int:
        """Number of tokens in the documents without images."""
        return self.text.tokens

    @property
    def highest(self) -> int:
        """The highest token id in any document; -1 without documents."""
        return self.index.highest

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table of the model that the data was packed for."""
        return self.index.tokens.vocabulary

    @property
    def tokenizer_sha256(self) -> str:
        """sha256 of the tokenizer.json that the data was packed with."""
        return self.index.tokenizer_sha256

    def read(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Return a copy of the tokens `start` to `stop` of the documents without images, [stop - start]."""
        return self.text.read(start, stop)


def check_tokenizer(packed: Packed, model: Path) -> None:
    """Refuse data that was packed with a different tokenizer, or for different special tokens, than the model's.

    Raises:
        DataError: The tokenizer or the tokens differ.
        CheckpointError: The model has no config or no tokenizer.
    """
    found = tokenizer_sha256(model)
    if found != packed.tokenizer_sha256:
        raise DataError(
            f"was packed with the tokenizer {packed.tokenizer_sha256[:16]}, but {model} has {found[:16]}",
            where=packed.folder,
            hint="pack the data again, with this model",
        )
    ours, theirs = (tokens.model_dump() for tokens in (packed.index.tokens, tokens_entry(read_tokens(model))))
    if different := [f"{name} {ours[name]} and {theirs[name]}" for name in ours if ours[name] != theirs[name]]:
        raise DataError(
            f"was packed for a model with other tokens (data and model): {', '.join(different)}",
            where=packed.folder,
            hint="pack the data again, with this model",
        )


def _check_last(ends: NDArray[Any], total: int, where: Path) -> None:
    last = int(ends[-1]) if len(ends) else 0
    if last != total:
        raise DataError(
            f"the last document ends at {last}, but the index says {total}", where=where, hint="pack the data again"
        )


def _check_ascending(ends: NDArray[Any], where: Path, *, fewest: int = 1) -> None:
    """Refuse ends that do not ascend by `fewest` (0 or 1) or more."""
    last = 0
    for start in range(0, len(ends), CHECKED_AT_ONCE):
        piece = ends[start : start + CHECKED_AT_ONCE].astype(np.uint64)
        before = np.concatenate([np.array([last], np.uint64), piece[:-1]])
        wrong = piece <= before if fewest else piece < before
        if wrong.any():
            number = start + int(np.argmax(wrong))
            raise DataError(f"document {number} ends before it begins", where=where, hint="pack the data again")
        last = int(piece[-1])


def _verify(folder: Path, index: Index, part: int, parts: int) -> None:
    expected = {
        "text.doc": index.text.ends, "image.doc": index.image.ends,
        PICTURES_FILE: index.pictures.sha256, COUNTS_FILE: index.counts,
    }  # fmt: skip
    if index.has_pair_files:
        expected |= {PAIRS_FILE: index.pair.ends, PAIR_PICTURES_FILE: index.pair.pictures}
    if index.skipped is not None:
        expected[SKIPPED_FILE] = index.skipped.sha256
    shards: dict[str, Sequence[ShardEntry | PictureShardEntry]] = {
        "text": index.text.shards, "image": index.image.shards, PAIR: index.pair.shards,
        PICTURES: index.pictures.shards,
    }  # fmt: skip
    for name, entries in shards.items():
        expected |= {shard_name(name, number): entry.sha256 for number, entry in enumerate(entries)}
    share = sorted(expected)[part::parts]
    if "text.doc" in share:
        _check_ascending(mapped_array(folder / "text.doc", END, (index.text.documents,)), folder / "text.doc")
    if "image.doc" in share:
        rows = mapped_array(folder / "image.doc", END, (index.image.documents, TABLE_COLUMNS))
        _check_ascending(rows[:, 0], folder / "image.doc")
        _check_ascending(rows[:, 1], folder / "image.doc")
    if PAIRS_FILE in share:
        rows = mapped_array(folder / PAIRS_FILE, END, (index.pair.documents, TABLE_COLUMNS))
        _check_ascending(rows[:, 0], folder / PAIRS_FILE)
        _check_ascending(rows[:, 1], folder / PAIRS_FILE, fewest=0)
    try:
        wrong = [name for name in share if sha256_of(folder / name) != expected[name]]
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=error.filename) from None
    if wrong:
        raise DataError(
            f"{len(wrong)} file(s) were modified after packing: their sha256 differs",
            where=folder,
            hint="copy them again, or pack the data again",
            details=wrong,
        )
