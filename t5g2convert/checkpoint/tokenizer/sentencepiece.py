"""The pieces of a SentencePiece model, read from its protobuf.

A model is a `ModelProto`. Its repeated field 1 holds the pieces, in the order of their ids, and field 1 of a piece is
its text. All other fields are settings, and are skipped.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.file_store import regular_file
from t5g2convert.errors import CheckpointError

MAX_BYTES: Final = 100_000_000

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_pieces(path: Path) -> list[bytes] | None:
    """Return the texts of the pieces in the order of their ids; None if the file is not a SentencePiece model.

    Raises:
        CheckpointError: The file cannot be read.
    """
    try:
        if regular_file(path).stat().st_size > MAX_BYTES:
            return None
        data = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
    try:
        pieces = [_text(data, start, end) for field, start, end in _fields(data, 0, len(data)) if field == 1]
    except (ValueError, IndexError):
        return None
    return pieces or None


def _text(data: bytes, start: int, end: int) -> bytes:
    return next(data[first:last] for field, first, last in _fields(data, start, end) if field == 1)


def _fields(data: bytes, at: int, end: int) -> Iterator[tuple[int, int, int]]:
    """Yield the number, start and end of every field of bytes.

    Raises:
        ValueError: The data is not a protobuf message.
        IndexError: The data ends too early.
    """
    while at < end:
        tag, at = _varint(data, at)
        field, kind = tag >> 3, tag & 7
        if not field:
            raise ValueError("field 0")
        if kind == _VARINT:
            _, at = _varint(data, at)
        elif kind == _BYTES:
            length, start = _varint(data, at)
            at = start + length
            if at <= end:
                yield field, start, at
        elif kind in (_FIXED64, _FIXED32):
            at += 8 if kind == _FIXED64 else 4
        else:
            raise ValueError(f"wire type {kind}")
    if at != end:
        raise ValueError("a field ends after its message")


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while shift < 64:
        byte = data[at]
        value, at, shift = value | (byte & 127) << shift, at + 1, shift + 7
        if byte < 128:
            return value, at
    raise ValueError("a number is too long")
