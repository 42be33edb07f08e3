"""The writer of packed data: tokens in shards of fixed size, the ends of documents, and images."""

import hashlib
import os
from collections.abc import Container, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.document_table import PICTURE, PICTURES
from t5g2convert.adaptation.data.image_columns import ImageBytes, ImageSource
from t5g2convert.adaptation.data.images import check_picture
from t5g2convert.adaptation.data.index import PicturesEntry, PictureShardEntry, ShardEntry, StreamEntry
from t5g2convert.adaptation.data.token_stream import END, TOKEN, mapped_array, shard_name
from t5g2convert.conversion.write.copy import output_errors
from t5g2convert.errors import DataError

BUFFER_BYTES: Final = 1 << 20

PICTURE_SHARD_BYTES: Final = 1 << 30
"""Most bytes of a shard of images, and of an image."""


class HashedFile:
    """A file that is written sequentially, with its sha256.

    Raises:
        OutputError: The disk is full or fails; the methods raise it too.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.nbytes = path, 0
        self._sha256 = hashlib.sha256()
        with output_errors(path):
            self._file: BinaryIO | None = path.open("xb", buffering=BUFFER_BYTES)

    def write(self, values: NDArray[Any] | bytes) -> None:
        """Append the bytes of an array."""
        assert self._file is not None, "the file is open"
        data = values if isinstance(values, bytes) else np.ascontiguousarray(values).tobytes()
        self._sha256.update(data)
        self.nbytes += len(data)
        with output_errors(self.path):
            self._file.write(data)

    def copy(self, source: Path, sha256: str) -> None:
        """Fill the empty file with the bytes of another one, in blocks.

        Raises:
            DataError: The other file cannot be read, or its sha256 differs.
        """
        try:
            with source.open("rb", buffering=0) as file:
                while block := file.read(BUFFER_BYTES):
                    self.write(block)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror}", where=source) from None
        if self._sha256.hexdigest() != sha256:
            raise DataError(
                "was modified after packing: its sha256 differs",
                where=source,
                hint="copy the file again, or pack the data again",
            )

    def finish(self, *, flush: bool) -> str:
        """Close the file, after a flush to disk if `flush`, and return its sha256, hexadecimal."""
        assert self._file is not None, "the file is open"
        with output_errors(self.path):
            self._file.flush()
            if flush:
                os.fsync(self._file.fileno())
            self._file.close()
        self._file = None
        return self._sha256.hexdigest()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._file is not None:
            # The file is discarded, so errors of its last bytes do not matter.
            with suppress(OSError):
                self._file.close()


def _link(source: Path, target: Path, sha256: str, *, flush: bool) -> None:
    """Make a hard link to a file, or a copy of it where the file system has no links."""
    try:
        target.hardlink_to(source)
    except OSError:
        with HashedFile(target) as file:
            file.copy(source, sha256)
            file.finish(flush=flush)


class StreamFiles:
    """The shards of concatenated documents, and the end of each document.

    Args:
        folder: The folder to write to.
        name: Prefix of the file names: `text`, `image` or `pair`.
        shard_tokens: Tokens per shard, except the last.
        flush: Wait until all bytes are on disk.
    """

    def __init__(self, folder: Path, name: str, shard_tokens: int, *, flush: bool) -> None:
        self._folder, self._name, self._shard_tokens, self._flush = folder, name, shard_tokens, flush
        self._shard: HashedFile | None = None
        self._finished: list[ShardEntry] = []
        self._ends = HashedFile(folder / f"{name}.doc")
        self.tokens = self.documents = 0

    def take_over(self, folder: Path, entry: StreamEntry) -> None:
        """Start with all documents of existing packed data; its last shard stays as short as it is.

        Raises:
            DataError: The table of ends cannot be read, or was modified.
            OutputError: The disk is full or fails.
        """
        for name, shard in ((shard_name(self._name, number), shard) for number, shard in enumerate(entry.shards)):
            _link(folder / name, self._folder / name, shard.sha256, flush=self._flush)
        self._finished.extend(entry.shards)
        self._ends.copy(folder / f"{self._name}.doc", entry.ends)
        self.tokens, self.documents = entry.tokens, entry.documents

    def add(self, document: NDArray[np.uint32], *more: int) -> None:
        """Append a document of at least one token; `more` is recorded with its end."""
        self.tokens += len(document)
        self.documents += 1
        self._ends.write(np.array([self.tokens, *more], END))
        while len(document):
            if self._shard is None:
                self._shard = HashedFile(self._folder / shard_name(self._name, len(self._finished)))
            room = self._shard_tokens - self._shard.nbytes // TOKEN.itemsize
            self._shard.write(document[:room].astype(TOKEN, copy=False))
            document = document[room:]
            if self._shard.nbytes == self._shard_tokens * TOKEN.itemsize:
                self._finish_shard(self._shard)

    def _finish_shard(self, shard: HashedFile) -> None:
        tokens = shard.nbytes // TOKEN.itemsize
        self._finished.append(ShardEntry(tokens=tokens, sha256=shard.finish(flush=self._flush)))
        self._shard = None

    def finish(self) -> StreamEntry:
        """Close all files and return their entry for the index."""
        if self._shard is not None:
            self._finish_shard(self._shard)
        ends = self._ends.finish(flush=self._flush)
        return StreamEntry(documents=self.documents, tokens=self.tokens, shards=tuple(self._finished), ends=ends)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for file in (self._shard, self._ends):
            if file is not None:
                file.__exit__(kind, error, traceback)


@dataclass(frozen=True, slots=True)
class CheckedImage:
    """An image to store.

    Attributes:
        sha256: The sha256 of its bytes.
        data: Its bytes; none if it is already stored.
        ending: The extension of its format.
        loses: Whether it has more than 8-bit RGB holds.
    """

    sha256: bytes
    data: bytes
    ending: str
    loses: bool


class PictureFiles:
    """The shards of images, each distinct image once.

    The sha256 and the row of each distinct image stay in memory: about 250 bytes per image, 2.5 GB for ten million.

    Args:
        folder: The folder to write to.
        flush: Wait until all bytes are on disk.
    """

    def __init__(self, folder: Path, *, flush: bool) -> None:
        self._folder, self._flush = folder, flush
        self._known: dict[bytes, bytes] = {}
        """The row of each distinct image, by its sha256."""
        self._shard: HashedFile | None = None
        self._finished: list[PictureShardEntry] = []
        self.losing = 0
        """Images of which 8-bit RGB loses something."""

    @property
    def known(self) -> Container[bytes]:
        """The sha256 of all stored images."""
        return self._known.keys()

    def take_over(self, folder: Path, entry: PicturesEntry, *lists: tuple[HashedFile, int, str]) -> None:
        """Start with all images of existing packed data; none of them is stored again.

        Args:
            folder: The folder of the data.
            entry: Its images.
            lists: Lists of images to start with the existing ones, their lengths and sha256.

        Raises:
            DataError: A list cannot be read, or was modified.
            OutputError: The disk is full or fails.
        """
        for name, shard in ((shard_name(PICTURES, number), shard) for number, shard in enumerate(entry.shards)):
            _link(folder / name, self._folder / name, shard.sha256, flush=self._flush)
        self._finished.extend(entry.shards)
        for file, places, sha256 in lists:
            source = folder / file.path.name
            file.copy(source, sha256)
            rows = mapped_array(source, PICTURE, (places,))
            for start in range(0, len(rows), BUFFER_BYTES):
                for row in rows[start : start + BUFFER_BYTES]:
                    self._known.setdefault(row["sha256"].tobytes(), row.tobytes())

    def add(self, images: Sequence[CheckedImage], rows: HashedFile) -> None:
        """Store the images of a document unless they are already stored, and append their rows to a list.

        Raises:
            OutputError: The disk is full or fails.
        """
        for image in images:
            if image.sha256 not in self._known:
                self.losing += image.loses
                self._known[image.sha256] = self._store(image.sha256, image.data, image.ending)
            rows.write(self._known[image.sha256])

    def _store(self, digest: bytes, data: bytes, ending: str) -> bytes:
        """Append an image to its shard and return its row; a shard is closed before an image that does not fit."""
        if self._shard is not None and self._shard.nbytes + len(data) > PICTURE_SHARD_BYTES:
            self._finish_shard(self._shard)
        if self._shard is None:
            self._shard = HashedFile(self._folder / shard_name(PICTURES, len(self._finished)))
        row = np.array([(digest, ending.encode(), len(self._finished), self._shard.nbytes, len(data))], PICTURE)
        self._shard.write(data)
        return row.tobytes()

    def _finish_shard(self, shard: HashedFile) -> None:
        self._finished.append(PictureShardEntry(nbytes=shard.nbytes, sha256=shard.finish(flush=self._flush)))
        self._shard = None

    def finish(self, rows: HashedFile) -> PicturesEntry:
        """Close all files and return the entry for the index, with the list `image.pic`."""
        if self._shard is not None:
            self._finish_shard(self._shard)
        return PicturesEntry(
            places=places_of(rows),
            images=len(self._known),
            nbytes=sum(shard.nbytes for shard in self._finished),
            shards=tuple(self._finished),
            sha256=rows.finish(flush=self._flush),
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._shard is not None:
            self._shard.__exit__(kind, error, traceback)


def places_of(rows: HashedFile) -> int:
    """Return the length of a list of images."""
    return rows.nbytes // PICTURE.itemsize


def checked_image(image: ImageSource, known: Container[bytes]) -> CheckedImage:
    """Read an image and decode it, unless its sha256 is known.

    Raises:
        ValueError: It is missing, not an image, or larger than a shard.
    """
    try:
        data = _bytes_of(image)
        digest = hashlib.sha256(data).digest()
        if digest in known:
            return CheckedImage(digest, b"", "", loses=False)
        ending, loses = check_picture(ImageBytes(str(image), data))
    except ValueError as error:
        raise ValueError(f"{image} {error}") from None
    return CheckedImage(digest, data, ending, loses)


def _bytes_of(image: ImageSource) -> bytes:
    """Return the bytes of an image.

    Raises:
        ValueError: It is missing, cannot be read, or is larger than a shard.
    """
    if isinstance(image, ImageBytes):
        data = image.data
    elif not image.is_file():
        raise ValueError("is not a file" if image.exists() else "is missing")
    else:
        try:
            with image.open("rb") as file:
                data = file.read(PICTURE_SHARD_BYTES + 1)
        except OSError as error:
            raise ValueError(f"cannot be read: {error.strerror}") from None
    if len(data) > PICTURE_SHARD_BYTES:
        raise ValueError(f"is larger than {PICTURE_SHARD_BYTES} bytes, the limit for an image")
    return data
