"""Documents with images or targets, and the images themselves, read on access from a table and its shards."""

import hashlib
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Generic, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.image_columns import ImageBytes
from t5g2convert.adaptation.data.images import ENDINGS
from t5g2convert.adaptation.data.index import INDEX_FILE, PicturesEntry
from t5g2convert.adaptation.data.token_stream import TokenStream, check_size, mapped_array, shard_name
from t5g2convert.errors import DataError

PICTURES: Final = "pictures"
"""Prefix of the shards of images."""

PICTURE: Final = np.dtype([("sha256", "V32"), ("ending", "S4"), ("shard", "<u4"), ("offset", "<u8"), ("nbytes", "<u8")])
"""The row of an image of a document: 56 bytes."""

TABLE_COLUMNS: Final = 3
"""Columns of a table: the end in tokens, the end in the list of images, and the start of the target in the document."""

PACK_AGAIN: Final = "pack the data again"

T = TypeVar("T")


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
    """A list of images, in the order of the documents that have them; an image with several places is stored once.

    Args:
        folder: The folder of packed data.
        entry: The images in the index.
        name: The file of the list.
        places: Its length.

    Raises:
        DataError: A file is missing or has another size.
    """

    def __init__(self, folder: Path, entry: PicturesEntry, name: str, places: int) -> None:
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
        self._file = folder / name
        self._rows = mapped_array(self._file, PICTURE, (places,))

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


class DocumentTable(Sequence[T], Generic[T]):
    """All documents of a table, read on access.

    Args:
        stream: Their tokens.
        rows: The rows of the table, uint64 [documents, 3].
        images: The images of all documents.
        where: The path of the table, for errors.
        eoi: The end-of-image token.
    """

    fewest_images = 0
    """Images that each document has at least."""

    def __init__(
        self, stream: TokenStream, rows: NDArray[Any], images: Sequence[StoredImage], where: Path, eoi: int
    ) -> None:
        self._stream, self.rows, self._images, self._where, self._eoi = stream, rows, images, where, eoi

    def __len__(self) -> int:
        return len(self.rows)

    @overload
    def __getitem__(self, number: int) -> T: ...
    @overload
    def __getitem__(self, number: slice) -> list[T]: ...
    def __getitem__(self, number: int | slice) -> T | list[T]:
        if isinstance(number, slice):
            return [self[each] for each in range(*number.indices(len(self)))]
        if number < 0:
            number += len(self)
        if not 0 <= number < len(self):
            raise IndexError(f"document {number} of {len(self)}")
        start, first = (int(end) for end in self.rows[number - 1, :2]) if number else (0, 0)
        stop, last, split = (int(value) for value in self.rows[number])
        if not (start < stop <= self._stream.tokens and first + self.fewest_images <= last <= len(self._images)):
            raise self.error(number, "ends before it begins")
        tokens = self._stream.read(start, stop)
        images = tuple(self._images[first:last])
        closed = np.flatnonzero(tokens == self._eoi)
        if len(closed) != len(images):
            raise self.error(number, f"has {len(images)} images and {len(closed)} end-of-image tokens")
        return self.document(number, tokens, images, split, int(closed[-1]) + 1 if len(closed) else 0)

    @abstractmethod
    def document(
        self, number: int, tokens: NDArray[np.uint32], images: tuple[StoredImage, ...], split: int, behind: int
    ) -> T:
        """Return a document.

        Args:
            number: Its number.
            tokens: All its tokens.
            images: Its images.
            split: The start of its target.
            behind: The end of its last image; 0 without images.

        Raises:
            DataError: The target cannot start at `split`.
        """

    def sizes(self, start: int, stop: int) -> NDArray[np.int64]:
        """Return the sizes of documents `start` to `stop`, [stop - start, 3]: tokens before the target, in it, images.

        Only the table is read.

        Raises:
            DataError: A document ends before it begins, or its target is not inside it.
        """
        # Ends are less than 2**48, as in the index; larger ones become negative or fail the comparison.
        ends = self.rows[start:stop, :2].astype(np.int64)
        splits = self.rows[start:stop, 2].astype(np.int64)
        before = self.rows[start - 1 : start, :2].astype(np.int64) if start else np.zeros((1, 2), np.int64)
        lengths, images = np.diff(ends, axis=0, prepend=before).T
        wrong = (lengths <= 0) | (images < self.fewest_images) | (splits <= 0) | (splits >= lengths)
        if wrong.any():
            raise self.error(start + int(np.argmax(wrong)), "ends before it begins, or its target is not inside it")
        return np.stack([splits, lengths - splits, images], axis=1)

    def error(self, number: int, reason: str) -> DataError:
        """Return an error about a document."""
        return DataError(reason, where=f"{self._where}: document {number}", hint=PACK_AGAIN)
