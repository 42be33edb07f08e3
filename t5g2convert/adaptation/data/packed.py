"""Packed data, as training reads it: memory-mapped token ids, where documents end, and pictures as files.

::

    index.json          what there is, with the sha256 of every file
    text-00000.bin      uint32, little-endian: the tokens of all documents without pictures, one behind the other
    text.doc            uint64: where each of these documents ends, counted in tokens from the first
    image-00000.bin     the tokens of all documents with pictures
    image.doc           uint64 [documents, 2]: where each ends in the tokens, and in image.pic
    image.pic           40 bytes for each place of a picture: its sha256, and the ending of its name
    images/             the pictures, each once, named by its sha256
    counts.bin          uint64 [vocabulary]: how often each token stands in all of the documents
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
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
from t5g2convert.checkpoint.digest import sha256_of
from t5g2convert.errors import DataError

COUNTS_FILE: Final = "counts.bin"
PICTURES_FILE: Final = "image.pic"
PICTURES_FOLDER: Final = "images"

TOKEN: Final = np.dtype("<u4")
END: Final = np.dtype("<u8")
PICTURE: Final = np.dtype([("sha256", "V32"), ("ending", "S8")])
CHECKED_AT_ONCE: Final = 1 << 20
"""Ends of documents that are compared at once."""


class TokenStream:
    """Documents, one behind the other, in memory-mapped shards.

    Args:
        folder: Where they are.
        name: What the names of their files begin with.
        entry: What the index says of them.

    Raises:
        DataError: A file is missing or of another size.
    """

    def __init__(self, folder: Path, name: str, entry: StreamEntry) -> None:
        self.tokens = entry.tokens
        total = sum(shard.tokens for shard in entry.shards)
        if total != entry.tokens:
            raise DataError(
                f"the shards of {name} hold {total} tokens together, the index says {entry.tokens}",
                where=folder / INDEX_FILE,
            )
        self.paths = tuple(folder / shard_name(name, number) for number in range(len(entry.shards)))
        self._shards = [
            mapped_array(path, TOKEN, (shard.tokens,)) for path, shard in zip(self.paths, entry.shards, strict=True)
        ]
        self._starts = np.cumsum([0, *(shard.tokens for shard in entry.shards)])

    def read(self, start: int, stop: int) -> NDArray[np.uint32]:
        """The tokens from `start` to `stop`, [stop - start]: a copy.

        Raises:
            IndexError: There are no such tokens.
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
    """A document with pictures.

    Attributes:
        tokens: Its token ids, with its eos.
        images: The files of its pictures, in the order of the text.
        split: Where the target starts: behind the end-of-image token of the last picture.
    """

    tokens: NDArray[np.uint32]
    images: tuple[Path, ...]
    split: int


class ImageDocuments(Sequence[ImageDocument]):
    """All documents with pictures, each read when it is asked for."""

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
                f"has {len(images)} pictures and {len(closed)} end-of-image tokens",
                where=f"{self._folder.parent}: document {number}",
                hint="pack the data again",
            )
        return ImageDocument(tokens, images, int(closed[-1]) + 1)


@dataclass(frozen=True, slots=True)
class Packed:
    """A folder of packed data.

    Attributes:
        folder: Where it is.
        index: index.json.
        sha256: Of index.json, which holds the sha256 of all else: the identity of the data.
        text: The documents without pictures.
        images: The documents with pictures.
        counts: How often each token stands in all of the documents, uint64 [vocabulary].
    """

    folder: Path
    index: Index
    sha256: str
    text: TokenStream
    images: ImageDocuments
    counts: NDArray[np.uint64]

    @classmethod
    def open(cls, folder: Path, *, verify: bool = False, sha256: str | None = None) -> Self:
        """Open a folder that `t5g2 pack` wrote; the sizes of all files and the order of all ends are checked.

        Args:
            folder: The folder.
            verify: Also read every file and compare its sha256.
            sha256: What the index's must be, where the data was read before.

        Raises:
            DataError: It is missing, damaged, or other data.
        """
        index, found = read_index(folder)
        if sha256 not in (None, found):
            raise DataError(
                f"is other data: its sha256 is {found}, expected {sha256}",
                where=folder / INDEX_FILE,
                hint="give the data that the run began with",
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
        """Read files and compare their sha256; `part` of `parts` looks at its share of them.

        Raises:
            DataError: A file cannot be read, or is not what was packed; all such files are named.
        """
        _verify(self.folder, self.index, part, parts)

    def __reduce__(self) -> tuple[Any, ...]:
        """Another process opens the folder again, where a pickled array would be a copy of all of the data."""
        return _reopen, (self.folder, self.sha256)

    @property
    def tokens(self) -> int:
        """Tokens of the documents without pictures."""
        return self.text.tokens

    @property
    def highest(self) -> int:
        """The highest token id in any document; -1 where there is none."""
        return self.index.highest

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding table that the data was packed for."""
        return self.index.tokens.vocabulary

    @property
    def tokenizer_sha256(self) -> str:
        """sha256 of the tokenizer.json that the data was packed with."""
        return self.index.tokenizer_sha256

    def read(self, start: int, stop: int) -> NDArray[np.uint32]:
        """Tokens of the documents without pictures, from `start` to `stop`: a copy, [stop - start]."""
        return self.text.read(start, stop)


def _reopen(folder: Path, sha256: str) -> Packed:
    return Packed.open(folder, sha256=sha256)


def check_tokenizer(packed: Packed, model: Path) -> None:
    """Refuse data that was packed with another tokenizer than a model's, or for other special tokens.

    Raises:
        DataError: It was.
        CheckpointError: The model has no config or no tokenizer.
    """
    found = tokenizer_sha256(model)
    if found != packed.tokenizer_sha256:
        raise DataError(
            f"was packed with the tokenizer {packed.tokenizer_sha256[:16]}, {model} has {found[:16]}",
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
    """The name of a file of tokens."""
    return f"{stream}-{number:05d}.bin"


def picture_name(place: Any) -> str:
    """The name of a picture's file, from its record.

    Raises:
        DataError: The record has an ending that no picture has.
    """
    ending = place["ending"].decode("latin-1")
    if ending not in ENDINGS.values():
        raise DataError(f"names a picture that ends in {ending!r}", where=PICTURES_FILE, hint="pack the data again")
    return f"{bytes(place['sha256']).hex()}.{ending}"


def mapped_array(path: Path, dtype: np.dtype[Any], shape: tuple[int, ...]) -> NDArray[Any]:
    """A file as an array that is read where it is looked at."""
    expected = math.prod(shape) * dtype.itemsize
    check_regular(path)
    try:
        size = path.stat().st_size
        if size != expected:
            raise DataError(
                f"has {size} bytes, the index says {expected}", where=path, hint="copy it again, or pack the data again"
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
        raise DataError(f"the last document ends at {last}, the index says {total}", where=where)


def _check_pictures(folder: Path, entry: PicturesEntry) -> None:
    try:
        files = nbytes = 0
        for item in sorted(folder.iterdir()) if entry.files or folder.exists() else ():
            if item.is_symlink() or not item.is_file():
                raise DataError("is a link or no file", where=item, hint="copy it again, or pack the data again")
            files, nbytes = files + 1, nbytes + item.stat().st_size
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=folder) from None
    if (files, nbytes) != (entry.files, entry.nbytes):
        raise DataError(
            f"has {files} pictures of {nbytes} bytes, the index says {entry.files} of {entry.nbytes}",
            where=folder,
            hint="copy it again, or pack the data again",
        )


def _verify(folder: Path, index: Index, part: int, parts: int) -> None:
    expected = {
        "text.doc": index.text.ends, "image.doc": index.image.ends,
        PICTURES_FILE: index.pictures.sha256, COUNTS_FILE: index.counts,
    }  # fmt: skip
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
            f"{len(wrong)} file(s) are not those that were packed: their sha256 differs",
            where=folder,
            hint="copy them again, or pack the data again",
            details=wrong,
        )
