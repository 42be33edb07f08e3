"""The writer of packed data: tokens in shards of fixed size, the ends of documents, and images."""

import hashlib
from collections.abc import Container, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.document_table import PICTURE, PICTURES
from t5g2convert.adaptation.data.image_columns import ImageBytes, ImageSource
from t5g2convert.adaptation.data.images import check_picture
from t5g2convert.adaptation.data.index import PicturesEntry, PictureShardEntry, ShardEntry, StreamEntry
from t5g2convert.adaptation.data.output_files import BUFFER_BYTES, HashedFile, OutputFiles
from t5g2convert.adaptation.data.token_stream import END, TOKEN, mapped_array, shard_name

PICTURE_SHARD_BYTES: Final = 1 << 30
"""Most bytes of a shard of images, and of an image."""


class StreamFiles:
    """The shards of concatenated documents, and the end of each document.

    The files begin with what an earlier run left in them.

    Args:
        files: The files of the output.
        name: Prefix of the file names: `text`, `image` or `pair`.
        shard_tokens: Tokens per shard, except the last.
        columns: Numbers that are recorded for each document.
    """

    def __init__(self, files: OutputFiles, name: str, shard_tokens: int, *, columns: int = 1) -> None:
        self._files, self._name, self._shard_tokens = files, name, shard_tokens
        shards = [shard.nbytes // TOKEN.itemsize for shard in files.finished(name)]
        self._finished = [
            ShardEntry(tokens=tokens, sha256=shard.sha256)
            for tokens, shard in zip(shards, files.finished(name), strict=True)
        ]
        self._shard = files.begun_shard(name)
        self._ends = files.open(f"{name}.doc")
        begun = 0 if self._shard is None else self._shard.nbytes // TOKEN.itemsize
        self.tokens, self.documents = sum(shards) + begun, self._ends.nbytes // (columns * END.itemsize)

    def take_over(self, folder: Path, entry: StreamEntry) -> None:
        """Start with all documents of existing packed data; its last shard stays as short as it is.

        Raises:
            DataError: The table of ends cannot be read, or was modified.
            OutputError: The disk is full or fails.
        """
        for number, shard in enumerate(entry.shards):
            self._files.link(folder / shard_name(self._name, number), shard.sha256)
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
                self._shard = self._files.open(shard_name(self._name, len(self._finished)))
            room = self._shard_tokens - self._shard.nbytes // TOKEN.itemsize
            self._shard.write(document[:room].astype(TOKEN, copy=False))
            document = document[room:]
            if self._shard.nbytes == self._shard_tokens * TOKEN.itemsize:
                self._finish_shard(self._shard)

    def _finish_shard(self, shard: HashedFile) -> None:
        tokens = shard.nbytes // TOKEN.itemsize
        self._finished.append(ShardEntry(tokens=tokens, sha256=shard.finish(flush=self._files.flush)))
        self._shard = None

    def finish(self) -> StreamEntry:
        """Close all files and return their entry for the index."""
        if self._shard is not None:
            self._finish_shard(self._shard)
        ends = self._ends.finish(flush=self._files.flush)
        return StreamEntry(documents=self.documents, tokens=self.tokens, shards=tuple(self._finished), ends=ends)


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
    The files begin with what an earlier run left in them.

    Args:
        files: The files of the output.
        lists: The files with lists of images.
    """

    def __init__(self, files: OutputFiles, *lists: HashedFile) -> None:
        self._files = files
        self._finished = [
            PictureShardEntry(nbytes=shard.nbytes, sha256=shard.sha256) for shard in files.finished(PICTURES)
        ]
        self._shard = files.begun_shard(PICTURES)
        self._known: dict[bytes, bytes] = {}
        """The row of each distinct image, by its sha256."""
        self.losing = 0
        """Images of which 8-bit RGB loses something."""
        for rows in lists:
            self._note_known(files.table(rows, PICTURE))

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
        for number, shard in enumerate(entry.shards):
            self._files.link(folder / shard_name(PICTURES, number), shard.sha256)
        self._finished.extend(entry.shards)
        for file, places, sha256 in lists:
            source = folder / file.path.name
            file.copy(source, sha256)
            self._note_known(mapped_array(source, PICTURE, (places,)))

    def _note_known(self, rows: NDArray[Any]) -> None:
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
            self._shard = self._files.open(shard_name(PICTURES, len(self._finished)))
        row = np.array([(digest, ending.encode(), len(self._finished), self._shard.nbytes, len(data))], PICTURE)
        self._shard.write(data)
        return row.tobytes()

    def _finish_shard(self, shard: HashedFile) -> None:
        self._finished.append(PictureShardEntry(nbytes=shard.nbytes, sha256=shard.finish(flush=self._files.flush)))
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
            sha256=rows.finish(flush=self._files.flush),
        )


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
