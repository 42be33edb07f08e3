"""sha256 of files while they are copied, each on a thread of its own (hashlib lets other threads run).

A file's hash needs its bytes in order. Pieces arrive in the order of the copy, which is the file's order except where
one file holds both stacks: a piece that does not follow on the last one is skipped then, and read back at the end.
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
"""Offset in the file, the bytes, and what to call when they are no longer needed."""


class FileHasher:
    """Hashes one file from the pieces that are fed to it.

    Args:
        fd: The file, open for reading.
        size: Its final size in bytes.
        there: How many of its first bytes are there already, so that gaps among them can be read back at once.
        finished: Called with the sha256, hexadecimal, from the thread, when the last byte is hashed.
    """

    def __init__(self, fd: int, size: int, *, there: int, finished: Callable[[str], None] | None = None) -> None:
        self._fd, self._size, self._there, self._finished = fd, size, there, finished
        self._sha256 = hashlib.sha256()
        self._position = 0
        self._room = bytearray(READ_BACK_BYTES)
        self._pieces: SimpleQueue[Piece | None] = SimpleQueue()
        self._failure: BaseException | None = None
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def feed(self, offset: int, data: memoryview, done: Callable[[], None]) -> None:
        """Hand over a piece; `done` is called once, from the thread, when its buffer may be used again."""
        self._pieces.put((offset, data, done))

    def close(self) -> None:
        """No more pieces come: what was skipped may be read back now. Said twice, it counts once."""
        self._pieces.put(None)

    def stop(self) -> None:
        """Come to an end soon, without a result."""
        self._abandoned = True
        self._pieces.put(None)

    def join(self) -> None:
        """Wait until it has."""
        self._thread.join()

    def hexdigest(self) -> str:
        """Wait for the thread; the sha256 of the whole file.

        Raises:
            OSError: The file could not be read back.
            OutputError: What was to be done with the finished file failed.
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
            except BaseException as error:  # noqa: BLE001 - the thread must go on handing buffers back
                self._failure = error
            finally:
                del data, piece
                done()
        try:
            if not self._abandoned and self._failure is None:
                self._read_back(self._size)
                if self._finished is not None and not self._abandoned:
                    self._finished(self._sha256.hexdigest())
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that asks for the sha256
            self._failure = error

    def _take(self, offset: int, data: memoryview) -> None:
        if self._position < offset <= self._there:
            self._read_back(offset)
        if offset == self._position:
            self._sha256.update(data)
            self._position += len(data)

    def _read_back(self, end: int) -> None:
        while self._position < end and not self._abandoned:
            room = memoryview(self._room)[: min(READ_BACK_BYTES, end - self._position)]
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
        """No more pieces come."""
        for hasher in (*self.sources.values(), *self.shards.values()):
            hasher.close()

    def abandon(self) -> None:
        """Stop all; a hasher that is done already does not mind."""
        hashers = (*self.sources.values(), *self.shards.values())
        for hasher in hashers:
            hasher.stop()
        for hasher in hashers:
            hasher.join()
