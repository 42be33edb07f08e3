"""Reading packed data: memory-mapped token ids, the ends of documents, and images as files.

::

    index.json          the contents, with the sha256 of every file
    text-00000.bin      uint32, little-endian: the tokens of all documents without images, concatenated
    text.doc            uint64: the end of each of these documents, in tokens from the start
    image-00000.bin     the tokens of all documents with images
    image.doc           uint64 [documents, 2]: the end of each in the tokens, and in image.pic
    image.pic           40 bytes per image of a document: its sha256, and the extension of its file
    images/             the images, each once, named by its sha256
    counts.bin          uint64 [vocabulary]: occurrences of each token in all documents
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final, Self, overload

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.images import ENDINGS
from t5g2convert.adaptation.data.index import (
    INDEX_FILE,
    Index,
    PicturesEntry,
    StreamEntry,
    check_regular,
    read_index,
    tokens_entry,
)
from t5g2convert.adaptation.data.tokens import read_tokens, tokenizer_sha256
from t5g2convert.checkpoint.file_store import sha256_of
from t5g2convert.errors import DataError

COUNTS_FILE: Final = "counts.bin"
PICTURES_FILE: Final = "image.pic"
PICTURES_FOLDER: Final = "images"
SKIPPED_FILE: Final = "skipped.jsonl"

TOKEN: Final = np.dtype("<u4")
END: Final = np.dtype("<u8")
PICTURE: Final = np.dtype([("sha256", "V32"), ("ending", "S8")])
CHECKED_AT_ONCE: Final = 1 << 20
"""Ends of documents compared at once."""


class TokenStream:
    """Concatenated documents in memory-mapped shards.

    Args:
        folder: The folder of packed data.
        name: Prefix of the file names: `text` or `image`.
        entry: The entry in the index.

    Raises:
        DataError: A file is missing or has another size.
    """

    def __init__(self, folder: Path, name: str, entry: StreamEntry) -> None:
        self.tokens = entry.tokens
        total = sum(shard.tokens for shard in entry.shards)
        if total != entry.tokens:
            raise DataError(
                f"the shards of {name} have {total} tokens, but the index says {entry.tokens}",
                where=folder / INDEX_FILE,
            )
        self.paths = tuple(folder / shard_name(name, number) for number in range(len(entry.shards)))
        self._shards = [
            mapped_array(path, TOKEN, (shard.tokens,)) for path, shard in zip(self.paths, entry.shards, strict=True)
        ]
        self._starts = np.cumsum([0, *(shard.tokens for shard in entry.shards)])

    def read(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Return a copy of the tokens from `start` to `stop`, [stop - start].

        Raises:
            IndexError: The range is out of bounds.
        """
        if not 0 <= start <= stop <= self.tokens:
            raise IndexError(f"tokens {start} to {stop} of {self.tokens}")
        result = np.empty(stop - start, dtype=np.uint32)
        position = start
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        while position < stop:
            end = min(stop, int(self._starts[number + 1]))
            first = int(self._starts[number])
            result[position - start : end - start] = self._shards[number][position - first : end - first]
            position, number = end, number + 1
        return result


@dataclass(frozen=True, slots=True)
class ImageDocument:
    """A document with images.

    Attributes:
        tokens: Token ids, including eos.
        images: Image files, in the order of the text.
        split: Start of the target: after the end-of-image token of the last image.
    """

    tokens: NDArray[np.uint32]
    images: tuple[Path, ...]
    split: int


class ImageDocuments(Sequence[ImageDocument]):
    """All documents with images, read on access."""

    def __init__(self, stream: TokenStream, ends: NDArray[Any], places: NDArray[Any], folder: Path, eoi: int) -> None:
        self._stream, self._ends, self._places, self._folder, self._eoi = stream, ends, places, folder, eoi

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, number: int) -> ImageDocument: ...
    @overload
    def __getitem__(self, number: slice) -> list[ImageDocument]: ...
    def __getitem__(self, number: int | slice) -> ImageDocument | list[ImageDocument]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        start, first = (int(end) for end in self._ends[number - 1]) if number else (0, 0)
        stop, last = (int(end) for end in self._ends[number])
        tokens = self._stream.read(start, stop)
        images = tuple(self._folder / picture_name(place) for place in self._places[first:last])
        closed = np.flatnonzero(tokens == self._eoi)
        if len(closed) != len(images):
            raise DataError(
                f"has {len(images)} images and {len(closed)} end-of-image tokens",
                where=f"{self._folder.parent}: document {number}",
                hint="pack the data again",
            )
        return ImageDocument(tokens, images, int(closed[-1]) + 1)


@dataclass(frozen=True, slots=True)
class Packed:
    """A folder of packed data.

    Attributes:
        folder: The folder.
        index: index.json.
        sha256: sha256 of index.json, which lists the sha256 of all files: the identity of the data.
        text: The documents without images.
        images: The documents with images.
        counts: Occurrences of each token in all documents, uint64 [vocabulary].
    """

    folder: Path
    index: Index
    sha256: str
    text: TokenStream
    images: ImageDocuments
    counts: NDArray[np.uint64]

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False, sha256: str | None = None) -> Self:
        """Open a folder written by `t5g2 pack`, and check the sizes of all files and the order of all ends.

        Args:
            folder: The folder.
            verify: Also compare the sha256 of every file.
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
        image_ends = mapped_array(folder / "image.doc", END, (index.image.documents, 2))
        places = mapped_array(folder / PICTURES_FILE, PICTURE, (index.pictures.places,))
        counts = mapped_array(folder / COUNTS_FILE, END, (index.tokens.vocabulary,))
        _check_ascending(ends, index.text.tokens, folder / "text.doc")
        _check_ascending(image_ends[:, 0], index.image.tokens, folder / "image.doc")
        _check_ascending(image_ends[:, 1], index.pictures.places, folder / "image.doc")
        _check_pictures(folder / PICTURES_FOLDER, index.pictures)
        images = ImageDocuments(image, image_ends, places, folder / PICTURES_FOLDER, index.tokens.eoi)
        packed = cls(folder, index, found, text, images, counts)
        if verify:
            packed.check_bytes()
        return packed

    def check_bytes(self, *, part: int = 0, parts: int = 1) -> None:
        """Compare the sha256 of all files, or with `parts` of this part's share of them.

        Raises:
            DataError: Files cannot be read or were modified; all are listed.
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


def shard_name(stream: str, number: int) -> str:
    """Return the file name of a shard of tokens."""
    return f"{stream}-{number:05d}.bin"


def picture_name(place: Any) -> str:
    """Return the file name of an image, from its record.

    Raises:
        DataError: The record has an unknown extension.
    """
    ending = place["ending"].decode("latin-1")
    if ending not in ENDINGS.values():
        raise DataError(f"names an image that ends in {ending!r}", where=PICTURES_FILE, hint="pack the data again")
    return f"{bytes(place['sha256']).hex()}.{ending}"


def mapped_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """Memory-map a file as an array, and refuse a size that differs from the index."""
    expected = math.prod(shape) * dtype.itemsize
    check_regular(path)
    try:
        size = path.stat().st_size
        if size != expected:
            raise DataError(
                f"has {size} bytes, but the index says {expected}",
                where=path,
                hint="copy it again, or pack the data again",
            )
        # An empty file cannot be mapped.
        return np.memmap(path, dtype, "r", shape=shape) if expected else np.empty(shape, dtype)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None


def _check_ascending(ends: NDArray[Any], total: int, where: Path) -> None:
    last = 0
    for start in range(0, len(ends), CHECKED_AT_ONCE):
        piece = ends[start : start + CHECKED_AT_ONCE].astype(np.uint64)
        wrong = piece <= np.concatenate([np.array([last], np.uint64), piece[:-1]])
        if wrong.any():
            number = start + int(np.argmax(wrong))
            raise DataError(f"document {number} ends before it begins", where=where, hint="pack the data again")
        last = int(piece[-1])
    if last != total:
        raise DataError(f"the last document ends at {last}, but the index says {total}", where=where)


def _check_pictures(folder: Path, entry: PicturesEntry) -> None:
    try:
        files = nbytes = 0
        for item in sorted(folder.iterdir()) if entry.files or folder.exists() else ():
            if item.is_symlink() or not item.is_file():
                raise DataError(
                    "is a link or not a regular file", where=item, hint="copy it again, or pack the data again"
                )
            files, nbytes = files + 1, nbytes + item.stat().st_size
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=folder) from None
    if (files, nbytes) != (entry.files, entry.nbytes):
        raise DataError(
            f"has {files} images of {nbytes} bytes, but the index says {entry.files} of {entry.nbytes}",
            where=folder,
            hint="copy it again, or pack the data again",
        )


def _verify(folder: Path, index: Index, part: int, parts: int) -> None:
    expected = {
        "text.doc": index.text.ends, "image.doc": index.image.ends,
        PICTURES_FILE: index.pictures.sha256, COUNTS_FILE: index.counts,
    }  # fmt: skip
    if index.skipped is not None:
        expected[SKIPPED_FILE] = index.skipped.sha256
    for name, stream in (("text", index.text), ("image", index.image)):
        expected |= {shard_name(name, number): shard.sha256 for number, shard in enumerate(stream.shards)}
    try:
        names = [f"{PICTURES_FOLDER}/{path.name}" for path in sorted((folder / PICTURES_FOLDER).glob("*"))]
        expected |= {name: name.partition("/")[2].partition(".")[0] for name in names}
        share = sorted(expected)[part::parts]
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
