"""The tokenizer files of a checkpoint; each is read and parsed once, when it is first needed."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.file_names import (
    ADDED_TOKENS_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from t5g2convert.checkpoint.file_store import regular_file
from t5g2convert.checkpoint.folder import Checkpoint, read_json_file
from t5g2convert.checkpoint.header import FileIdentity
from t5g2convert.checkpoint.hub.open_and_fetch import fetch, read_held
from t5g2convert.checkpoint.strictjson import parse_object
from t5g2convert.errors import CheckpointError

_STRING: Final = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_MERGES: Final = re.compile(
    rb'(?<!\\)"merges"\s*+:\s*+\[((?:[^"\[\]]++|%s|\[(?:[^"\[\]]++|%s)*+\])*+)\]' % (_STRING, _STRING), re.DOTALL
)
"""A list of merges: texts, or lists of texts. It cannot occur inside a string: its quotes would have backslashes."""


@dataclass(frozen=True, slots=True)
class TokenizerJson:
    """The contents of a tokenizer.json.

    Attributes:
        path: The file.
        identity: The identity of the file before it was read.
        text: Its bytes.
    """

    path: Path
    identity: FileIdentity
    text: bytes

    @classmethod
    def read(cls, path: Path) -> "TokenizerJson":
        """Read a tokenizer.json.

        Raises:
            CheckpointError: The file cannot be read, or is too large.
        """
        try:
            identity = FileIdentity.of(path)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error
        return cls(path, identity, read_json_file(path))

    def parse(self) -> dict[str, Any]:
        """Parse the file with an empty list instead of the merges: Gemma's would take 150 MB more.

        Raises:
            CheckpointError: The file is not JSON, or has a key twice.
        """
        found = _MERGES.search(self.text)
        text = self.text if found is None else self.text[: found.start(1)] + self.text[found.end(1) :]
        return parse_object(text, self.path)

    def vocabulary(self) -> dict[str, int]:
        """Return the ids of `model.vocab` by token; empty if tokens are stored without ids.

        Raises:
            CheckpointError: As `parse`.
        """
        model = self.parse().get("model")
        found = model.get("vocab") if isinstance(model, dict) else None
        tokens = found.items() if isinstance(found, dict) else ()
        return {token: number for token, number in tokens if type(number) is int}


class Tokenizer:
    """The tokenizer files of a checkpoint; files on the Hub are downloaded when they are first needed.

    Each property raises CheckpointError if its file cannot be read or is not JSON, and HubError if the Hub does not
    provide it.

    Args:
        checkpoint: The checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @cached_property
    def json(self) -> TokenizerJson | None:
        """tokenizer.json; None if it is missing."""
        if not self.checkpoint.holds(TOKENIZER_FILE):
            return None
        fetch(self.checkpoint, [TOKENIZER_FILE])
        return TokenizerJson.read(self.checkpoint.path / TOKENIZER_FILE)

    @cached_property
    def settings(self) -> Mapping[str, Any] | None:
        """tokenizer_config.json; None if it is missing."""
        return read_held(self.checkpoint, TOKENIZER_CONFIG_FILE)

    @cached_property
    def added_tokens(self) -> Mapping[str, Any] | None:
        """added_tokens.json; None if it is missing."""
        return read_held(self.checkpoint, ADDED_TOKENS_FILE)

    @cached_property
    def special_tokens(self) -> Mapping[str, Any] | None:
        """special_tokens_map.json; None if it is missing."""
        return read_held(self.checkpoint, SPECIAL_TOKENS_FILE)


MAX_BYTES: Final = 100_000_000

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def read_pieces(path: Path) -> list[bytes] | None:
    """Return the texts of the pieces in order of id; None if the file is not a SentencePiece model.

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
    """Yield the number, start and end of every length-delimited field.

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
