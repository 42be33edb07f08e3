"""A JSON document read in pieces: what is asked for is parsed, the rest is passed over, and memory stays bounded.

A published tokenizer.json has 33 MB and would take several hundred as Python objects.
"""

import json
import re
from collections.abc import Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.strictjson import is_text
from t5g2convert.errors import CheckpointError

PIECE_BYTES: Final = 1 << 18
MAX_TOKEN_BYTES: Final = 1 << 24
"""Largest text, number or object that is held at once."""

_SPACE: Final = re.compile(rb"[ \t\r\n]*+")
_TEXT: Final = rb'[^"\\]*+(?:\\.[^"\\]*+)*+'
"""What may be between two quotes."""

_STRING: Final = re.compile(rb'"(%s)"' % _TEXT, re.DOTALL)
_PLAIN: Final = re.compile(rb'[^\s",:{}\[\]]++')
# Everything at one depth, with objects and lists that hold none of their own.
_FLAT: Final = re.compile(
    rb'(?:[^"{}\[\]]++|"%s"|[\[{][^"{}\[\]]*+(?:"%s"[^"{}\[\]]*+)*+[\]}])++' % (_TEXT, _TEXT), re.DOTALL
)
# The end of a member whose value is a whole number, with another behind it.
_NEXT: Final = re.compile(rb'\d\s*+,(?=\s*+")')
NEAR: Final = 1 << 10
"""Bytes at the end of what was read in which the last whole member ends, if its name is not a long one."""


class JsonStream:
    """A reader that walks through one JSON document from its start to its end.

    Every value must be read or skipped before the next key or item is asked for.

    Args:
        file: The file, at its start.
        where: Its path, for errors.
    """

    def __init__(self, file: BufferedReader, where: Path) -> None:
        self._file, self._where = file, where
        self._text, self._at, self._read = b"", 0, 0

    def peek(self) -> bytes:
        """Return the first byte of what comes next, white space left out; nothing at the end of the file."""
        while True:
            self._at = _SPACE.match(self._text, self._at).end()  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def members(self) -> Iterator[str]:
        """Yield the keys of an object."""
        self._take(b"{")
        if self.peek() == b"}":
            self._at += 1
            return
        while True:
            key = self.string()
            self._take(b":")
            yield key
            if not self._goes_on(b"}"):
                return

    def items(self) -> Iterator[int]:
        """Yield the numbers of the items of a list, from 0."""
        self._take(b"[")
        if self.peek() == b"]":
            self._at += 1
            return
        number = 0
        while True:
            yield number
            number += 1
            if not self._goes_on(b"]"):
                return

    def numbered(self) -> Iterator[dict[str, int]]:
        """Yield the members of an object of whole numbers, many at once.

        Raises:
            CheckpointError: A value is not a whole number of 0 or more; the error names its key.
        """
        self._take(b"{")
        if self.peek() == b"}":
            self._at += 1
            return
        looked = -1
        while True:
            members = {} if looked == self._read else self._whole_members()
            if members:
                yield members
                continue
            looked = self._read
            if len(self._text) - self._at >= PIECE_BYTES or not self._more():
                # Slow: the last ones, and what is odd: a name of many pieces, or what is not a whole number.
                name = self._raw_string()
                self._take(b":")
                yield {self._decoded(name): self._number(name)}
                if not self._goes_on(b"}"):
                    return

    def _whole_members(self) -> dict[str, int]:
        """Take the members that are in memory whole, if all are whole numbers; the last one of the object is left."""
        near = max(len(self._text) - NEAR, self._at)
        ends = [found.end() for found in _NEXT.finditer(self._text, near)]
        try:
            members = json.loads(b"{%s}" % self._text[self._at : ends[-1] - 1]) if ends else {}
        except (ValueError, RecursionError):
            return {}
        numbers = members.values()
        if {*map(type, numbers)} != {int} or min(numbers) < 0 or not is_text("".join(members)):
            return {}
        self._at = ends[-1]
        return dict(members)

    def string(self) -> str:
        """Return a string."""
        return self._decoded(self._raw_string())

    def value(self) -> Any:
        """Return a value whole."""
        start = self.peek()
        if start == b'"':
            return self.string()
        if start not in (b"{", b"["):
            return self._scalar()
        parts: list[bytes] = []
        self._pass(parts)
        try:
            return json.loads(b"".join(parts))
        except (ValueError, RecursionError) as error:
            raise self._invalid(f"{error}") from None

    def skip(self) -> None:
        """Pass over a value."""
        start = self.peek()
        if start == b'"':
            self._raw_string()
        elif start in (b"{", b"["):
            self._pass(None)
        else:
            self._scalar()

    def finish(self) -> None:
        """Refuse anything behind the document."""
        if self.peek():
            raise self._invalid("something comes behind its end")

    def _number(self, name: bytes) -> int:
        value = self.value()
        if type(value) is not int or value < 0:
            raise CheckpointError(
                f"{self._decoded(name)!r} has id {json.dumps(value)[:60]}, expected a whole number of 0 or more",
                where=self._where,
            )
        return value

    def _scalar(self) -> Any:
        while True:
            found = _PLAIN.match(self._text, self._at)
            if found is None:
                raise self._invalid("a value is missing")
            if found.end() < len(self._text) or not self._more():
                break
        self._at = found.end()
        try:
            return json.loads(found[0])
        except ValueError:
            raise self._invalid(f"{found[0][:40].decode(errors='replace')} is not a value") from None

    def _pass(self, parts: list[bytes] | None) -> None:
        """Pass over an object or a list; its bytes are added to `parts`."""
        depth = held = 0
        while True:
            start = self._at
            if depth and (found := _FLAT.match(self._text, self._at)):
                self._at = found.end()
            elif (byte := self._text[self._at : self._at + 1]) in (b"{", b"["):
                self._at, depth = self._at + 1, depth + 1
            elif byte in (b"}", b"]"):
                self._at, depth = self._at + 1, depth - 1
            elif not self._more():
                raise self._invalid("it ends too early")
            else:
                continue
            if parts is not None:
                held += self._at - start
                self._check_size(held)
                parts.append(self._text[start : self._at])
            if not depth:
                return

    def _raw_string(self) -> bytes:
        if self.peek() != b'"':
            raise self._invalid("a text is missing")
        while (found := _STRING.match(self._text, self._at)) is None:
            if not self._more():
                raise self._invalid("it ends in a text")
        self._at = found.end()
        return found[1]

    def _decoded(self, raw: bytes) -> str:
        try:
            text: str = json.loads(b'"%s"' % raw, strict=False) if b"\\" in raw else raw.decode()
        except ValueError as error:
            raise self._invalid(f"{error}") from None
        if not is_text(text):
            raise self._invalid("a text holds half of a surrogate pair")
        return text

    def _goes_on(self, end: bytes) -> bool:
        """Whether another member or item follows, or the end."""
        byte = self.peek()
        if byte not in (b",", end):
            raise self._invalid(f"expected , or {end.decode()}")
        self._at += 1
        return byte == b","

    def _take(self, byte: bytes) -> None:
        if self.peek() != byte:
            raise self._invalid(f"expected {byte.decode()}")
        self._at += 1

    def _more(self) -> bool:
        """Read another piece; what was passed already is let go."""
        self._check_size(len(self._text) - self._at)
        piece = self._file.read(max(PIECE_BYTES, len(self._text) - self._at))
        self._read += len(piece)
        self._text, self._at = self._text[self._at :] + piece, 0
        return bool(piece)

    def _check_size(self, size: int) -> None:
        if size > MAX_TOKEN_BYTES:
            raise CheckpointError(f"holds a single value of more than {MAX_TOKEN_BYTES} bytes", where=self._where)

    def _invalid(self, reason: str) -> CheckpointError:
        at = self._read - len(self._text) + self._at
        return CheckpointError(f"is not valid JSON: {reason} (byte {at})", where=self._where)
