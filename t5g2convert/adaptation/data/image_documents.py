"""Documents with images, and the images themselves, read on access from their shards."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, overload

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.image_columns import ImageBytes
from t5g2convert.adaptation.data.images import ENDINGS
from t5g2convert.adaptation.data.index import INDEX_FILE, PicturesEntry
from t5g2convert.adaptation.data.token_stream import TokenStream, check_size, mapped_array, shard_name
from t5g2convert.errors import DataError

PICTURES_FILE: Final = "image.pic"
PICTURES: Final = "pictures"
"""Prefix of the shards of images."""

PICTURE: Final = np.dtype([("sha256", "V32"), ("ending", "S4"), ("shard", "<u4"), ("offset", "<u8"), ("nbytes", "<u8")])
"""The row of an image of a document: 56 bytes."""

IMAGE_COLUMNS: Final = 3
"""Columns of image.doc: the end in tokens, the end in image.pic, and the start of the target in the document."""

PACK_AGAIN: Final = "pack the data again"


@dataclass(frozen=True, slots=True)
class StoredImage:
    """An image in a shard.

    Attributes:
        path: The shard.
        offset: Its first byte.
        nbytes: Its number of bytes.
        sha256: The sha256 of its bytes.
        ending: The extension of its format.
    """

    path: Path
    offset: int
    nbytes: int
    sha256: bytes
    ending: str

    def __str__(self) -> str:
        return f"{self.path}: image at byte {self.offset}"

    def read(self) -> ImageBytes:
        """Return its bytes, after a check of their sha256.

        Raises:
            DataError: They cannot be read, or were modified.
        """
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self.offset)
                data = file.read(self.nbytes)
                while piece := file.read(self.nbytes - len(data)):
                    data += piece
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=self.path) from None
        if hashlib.sha256(data).digest() != self.sha256:
            raise DataError(
                "was modified after packing: its sha256 differs",
                where=str(self),
                hint="copy the file again, or pack the data again",
            )
        return ImageBytes(str(self), data)


class StoredImages(Sequence[StoredImage]):
    """The images of all documents, in order; an image that several documents have is stored once.

    Args:
        folder: The folder of packed data.
        entry: The entry in the index.

    Raises:
        DataError: A file is missing or has another size.
    """

    def __init__(self, folder: Path, entry: PicturesEntry) -> None:
        total = sum(shard.nbytes for shard in entry.shards)
        if total != entry.nbytes:
            raise DataError(
                f"the shards of {PICTURES} have {total} bytes, but the index says {entry.nbytes}",
                where=folder / INDEX_FILE,
            )
        self._paths = [folder / shard_name(PICTURES, number) for number in range(len(entry.shards))]
        self._sizes = [shard.nbytes for shard in entry.shards]
        for path, size in zip(self._paths, self._sizes, strict=True):
            check_size(path, size)
        self._file = folder / PICTURES_FILE
        self._rows = mapped_array(self._file, PICTURE, (entry.places,))

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, number: int) -> StoredImage: ...
    @overload
    def __getitem__(self, number: slice) -> list[StoredImage]: ...
    def __getitem__(self, number: int | slice) -> StoredImage | list[StoredImage]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        row = self._rows[number]
        shard, offset, nbytes = (int(row[name]) for name in ("shard", "offset", "nbytes"))
        ending = row["ending"].decode("latin-1")
        if ending not in ENDINGS.values():
            raise DataError(f"image {number} ends in {ending!r}", where=self._file, hint=PACK_AGAIN)
        if shard >= len(self._paths) or offset + nbytes > self._sizes[shard]:
            raise DataError(f"image {number} is not inside a shard", where=self._file, hint=PACK_AGAIN)
        return StoredImage(self._paths[shard], offset, nbytes, bytes(row["sha256"]), ending)


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


class ImageDocuments(Sequence[ImageDocument]):
    """All documents with images, read on access.

    Args:
        stream: Their tokens.
        rows: The rows of image.doc, uint64 [documents, 3].
        images: The images of all documents.
        where: The path of image.doc, for errors.
        eoi: The end-of-image token.
    """

    def __init__(self, stream: TokenStream, rows: NDArray[Any], images: StoredImages, where: Path, eoi: int) -> None:
        self._stream, self._rows, self._images, self._where, self._eoi = stream, rows, images, where, eoi

    def __len__(self) -> int:
        return len(self._rows)

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
        start, first = (int(end) for end in self._rows[number - 1, :2]) if number else (0, 0)
        stop, last, split = (int(value) for value in self._rows[number])
        if not (start < stop <= self._stream.tokens and first < last <= len(self._images)):
            raise self._error(number, "ends before it begins")
        tokens = self._stream.read(start, stop)
        images = tuple(self._images[first:last])
        closed = np.flatnonzero(tokens == self._eoi)
        if len(closed) != len(images):
            raise self._error(number, f"has {len(images)} images and {len(closed)} end-of-image tokens")
        if split != int(closed[-1]) + 1:
            raise self._error(number, f"has its target at {split}, but its last image ends at {int(closed[-1]) + 1}")
        return ImageDocument(tokens, images, split)

    def sizes(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the sizes of documents `start` to `stop`, [stop - start, 3]: tokens before the target, in it, images.

        Only image.doc is read.

        Raises:
            DataError: A document ends before it begins, or its target is not inside it.
        """
        # Ends are less than 2**48, as in the index; larger ones become negative or fail the comparison.
        ends = self._rows[start:stop, :2].astype(np.int64)
        splits = self._rows[start:stop, 2].astype(np.int64)
        before = self._rows[start - 1 : start, :2].astype(np.int64) if start else np.zeros((1, 2), np.int64)
        lengths, images = np.diff(ends, axis=0, prepend=before).T
        wrong = (lengths <= 0) | (images <= 0) | (splits <= 0) | (splits >= lengths)
        if wrong.any():
            raise self._error(start + int(np.argmax(wrong)), "ends before it begins, or its target is not inside it")
        return np.stack([splits, lengths - splits, images], axis=1)

    def _error(self, number: int, reason: str) -> DataError:
        return DataError(reason, where=f"{self._where}: document {number}", hint=PACK_AGAIN)
