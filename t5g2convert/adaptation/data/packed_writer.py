"""The writer of packed data: tokens in shards of fixed size, the ends of documents, and images."""

import hashlib
import os
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Final, Self, cast

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.image_columns import ImageBytes, ImageSource
from t5g2convert.adaptation.data.images import check_picture
from t5g2convert.adaptation.data.index import PicturesEntry, ShardEntry, StreamEntry
from t5g2convert.adaptation.data.packed import (
    END,
    PICTURE,
    PICTURES_FILE,
    PICTURES_FOLDER,
    TOKEN,
    picture_name,
    shard_name,
)
from t5g2convert.checkpoint.atomic_write import flush_folder
from t5g2convert.conversion.write.copy import output_errors

BUFFER_BYTES: Final = 1 << 20


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


class StreamFiles:
    """The shards of concatenated documents, and the end of each document.

    Args:
        folder: The folder to write to.
        name: Prefix of the file names: `text` or `image`.
        shard_tokens: Tokens per shard, except the last.
        flush: Wait until all bytes are on disk.
    """

    def __init__(self, folder: Path, name: str, shard_tokens: int, *, flush: bool) -> None:
        self._folder, self._name, self._shard_tokens, self._flush = folder, name, shard_tokens, flush
        self._shard: HashedFile | None = None
        self._finished: list[ShardEntry] = []
        self._ends = HashedFile(folder / f"{name}.doc")
        self.tokens = self.documents = 0

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


class PictureFiles:
    """The folder of images, each stored once, and the list of the images of all documents.

    Args:
        folder: The folder to write to.
        flush: Wait until all bytes are on disk.
    """

    def __init__(self, folder: Path, *, flush: bool) -> None:
        self._folder, self._flush = folder / PICTURES_FOLDER, flush
        self._partial = self._folder / "partial"
        self._count = self._files = self._nbytes = 0
        self.losing = 0
        """Images of which 8-bit RGB loses something."""
        with output_errors(self._folder):
            self._folder.mkdir()
        self._places = HashedFile(folder / PICTURES_FILE)

    def add(self, images: Sequence[ImageSource]) -> None:
        """Copy the images of a document unless they are already stored, and append them to the list.

        Raises:
            ValueError: One is missing or not an image; then none is added.
            OutputError: The disk is full or fails.
        """
        places, new = [], dict[Path, int]()
        try:
            for image in images:
                place, nbytes = self._store(image)
                places.append(place)
                new |= {} if nbytes is None else {self._folder / picture_name(place[0]): nbytes}
        except ValueError:
            with output_errors(self._folder):
                for path in (*new, self._partial):
                    path.unlink(missing_ok=True)
            raise
        for place in places:
            self._places.write(place)
        self._count += len(places)
        self._files, self._nbytes = self._files + len(new), self._nbytes + sum(new.values())

    def _store(self, image: ImageSource) -> tuple[NDArray[Any], int | None]:
        """Return the entry of an image in the list, and the bytes of its file; None if it is already stored."""
        try:
            digest, nbytes = self._copy(image)
            # Check the copy: the file may change meanwhile.
            ending, loses = check_picture(self._partial)
        except ValueError as error:
            raise ValueError(f"{image} {error}") from None
        place = np.array([(digest, ending.encode())], PICTURE)
        with output_errors(self._folder):
            target = self._folder / picture_name(place[0])
            is_new = not target.exists()
            self.losing += is_new and loses
            self._partial.replace(target)
        return place, nbytes if is_new else None

    def _copy(self, image: ImageSource) -> tuple[bytes, int]:
        sha256, nbytes = hashlib.sha256(), 0
        with _opened(image) as source, output_errors(self._partial), self._partial.open("wb", buffering=0) as target:
            while piece := _read(source):
                sha256.update(piece)
                nbytes += len(piece)
                written = 0
                while written < len(piece):
                    written += target.write(piece[written:])
            if self._flush:
                os.fsync(target.fileno())
        return sha256.digest(), nbytes

    def finish(self) -> PicturesEntry:
        """Close the list and return the entry for the index."""
        with output_errors(self._folder):
            if not self._files:
                self._folder.rmdir()
            elif self._flush:
                flush_folder(self._folder)
        sha256 = self._places.finish(flush=self._flush)
        return PicturesEntry(places=self._count, files=self._files, nbytes=self._nbytes, sha256=sha256)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._places.__exit__(kind, error, traceback)


def _opened(image: ImageSource) -> BinaryIO:
    """Open an image for reading.

    Raises:
        ValueError: It is missing, or cannot be read.
    """
    if isinstance(image, ImageBytes):
        return BytesIO(image.data)
    if not image.is_file():
        raise ValueError("is not a file" if image.exists() else "is missing")
    try:
        return cast(BinaryIO, image.open("rb", buffering=0))
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None


def _read(source: BinaryIO) -> bytes:
    try:
        return source.read(BUFFER_BYTES)
    except OSError as error:
        raise ValueError(f"cannot be read: {error.strerror}") from None
