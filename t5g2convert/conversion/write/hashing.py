"""Compute the sha256 of files while they are copied, each on its own thread (hashlib releases the interpreter's lock).

A hash needs the bytes of a file in order. Chunks arrive in the order of the copy, which differs from the order of the
file if it holds both stacks: a chunk that does not follow the previous one is skipped, and read back at the end.
"""

import hashlib
import os
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Final

READ_BACK_BYTES: Final = 1 << 18

Piece = tuple[int, memoryview, Callable[[], None]]
"""Offset in the file, the bytes, and a function to call when the bytes are no longer needed."""


class FileHasher:
    """Hash one file from the chunks that are fed to it.

    Args:
        fd: Descriptor of the file, open for reading.
        size: Its final size in bytes.
        written: Number of leading bytes that are already written: gaps among them can be read back at once.
        finished: Called from the thread with the sha256, hexadecimal, after the last byte is hashed.
    """

    def __init__(self, fd: int, size: int, *, written: int, finished: Callable[[str], None] | None = None) -> None:
        self._fd, self._size, self._written, self._finished = fd, size, written, finished
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._memory = bytearray(READ_BACK_BYTES)
        self._pieces: SimpleQueue[Piece | None] = SimpleQueue()
        self._failure: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def feed(self, offset: int, data: memoryview, done: Callable[[], None]) -> None:
        """Add a chunk; the thread calls `done` once, when the chunk's buffer may be reused."""
        self._pieces.put((offset, data, done))

    def close(self) -> None:
        """Declare that all chunks were fed, so that skipped bytes are read back; a second call does nothing."""
        self._pieces.put(None)

    def stop(self) -> None:
        """Stop soon, without a result."""
        self._abandoned = True
        self._pieces.put(None)

    def join(self) -> None:
        """Wait until the thread has ended."""
        self._thread.join()

    def hexdigest(self) -> str:
        """Wait for the thread, and return the sha256 of the whole file.

        Raises:
            OSError: The file could not be read back.
            OutputError: `finished` failed.
        """
        self._thread.join()
        if self._failure is not None:
            raise self._failure
        return self._sha256.hexdigest()

    def _run(self) -> None:
        while (piece := self._pieces.get()) is not None:
            offset, data, done = piece
            try:
                if self._failure is None and not self._abandoned:
                    self._take(offset, data)
            except BaseException as error:  # noqa: BLE001 - the thread must still release the buffers
                self._failure = error
            finally:
                del data, piece
                done()
        try:
            if not self._abandoned and self._failure is None:
                self._read_back(self._size)
                if self._finished is not None and not self._abandoned:
                    self._finished(self._sha256.hexdigest())
        except BaseException as error:  # noqa: BLE001 - `hexdigest` raises it again
            self._failure = error

    def _take(self, offset: int, data: memoryview) -> None:
        if self._position < offset <= self._written:
            self._read_back(offset)
        if offset == self._position:
            self._sha256.update(data)
            self._position += len(data)

    def _read_back(self, end: int) -> None:
        while self._position < end and not self._abandoned:
            room = memoryview(self._memory)[: min(READ_BACK_BYTES, end - self._position)]
            count = os.preadv(self._fd, [room], self._position)
            if not count:
                raise OSError(f"ends at byte {self._position}, expected {end}")
            self._sha256.update(room[:count])
            self._position += count


@dataclass(frozen=True, slots=True)
class Hashers:
    """The hashers of one conversion, by file name."""

    sources: Mapping[str, FileHasher]
    shards: Mapping[str, FileHasher]

    def close(self) -> None:
        """Close the hashers of all files."""
        for hasher in (*self.sources.values(), *self.shards.values()):
            hasher.close()

    def abandon(self) -> None:
        """Stop all hashers, including finished ones, and wait for them."""
        hashers = (*self.sources.values(), *self.shards.values())
        for hasher in hashers:
            hasher.stop()
        for hasher in hashers:
            hasher.join()
