"""A strict YAML reader: plain mappings, lists and scalars, with the position of every node.

YAML as PyYAML reads it has traps: the last of two equal keys wins silently, `no` is a boolean, `12:30` is 750, `010` is
8, a tag builds an object, aliases grow exponentially. All of these are refused with `file:line:column` and a caret.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import yaml
from yaml.resolver import Resolver

from t5g2convert.errors import MappingError
from t5g2convert.printable import printable

MAX_BYTES: Final = 1 << 20
MAX_DEPTH: Final = 32
MAX_DIGITS: Final = 18
"""Maximum number of digits of a number, so that it fits into 64 bits."""

SHOWN_COLUMNS: Final = 200
"""Maximum number of columns of a line that an error shows."""

NodePath = tuple[str | int, ...]
"""The path of a node in the document: the keys and list positions from the top to it."""

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)\Z")
_FLOAT = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+([eE][-+]?[0-9]+)?|[eE][-+]?[0-9]+)\Z")
_WORDS: Final[dict[str, bool | None]] = {"true": True, "false": False, "null": None}
_RESOLVER: Final = Resolver()


@dataclass(frozen=True, slots=True)
class Position:
    """A place in the text, both counted from 0."""

    line: int
    column: int


@dataclass(frozen=True, slots=True)
class Document:
    """A parsed file: plain Python data, and the position of each node."""

    path: Path
    text: str
    data: Any
    positions: dict[NodePath, Position] = field(repr=False)

    def error(self, reason: str, at: NodePath = (), *, hint: str | None = None) -> MappingError:
        """Return an error that points at a node, or at the nearest enclosing node with a position."""
        while at and at not in self.positions:
            at = at[:-1]
        return _error(self.path, self.text, self.positions[at], reason, hint)


def load_yaml(path: Path, *, until: str | None = None) -> Document:
    """Read one YAML document.

    Args:
        path: The file.
        until: The top-level key at which to stop; the rest is not parsed.

    Raises:
        MappingError: The file cannot be read, is not plain YAML, or uses a feature that is refused.
    """
    try:
        if path.is_fifo():
            raise MappingError("is a pipe, expected a file", where=path)
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise MappingError(f"cannot be read: {error.strerror}", where=path) from None
    if len(raw) > MAX_BYTES:
        before = raw[:MAX_BYTES].decode(errors="replace")
        raise _error(path, before, _position(before, len(before)), "is larger than 1 MiB")
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        before = raw[: error.start].decode()
        raise _error(path, before, _position(before, len(before)), "a byte that is not UTF-8 text") from None
    return _Reader(path, text, until).read()


def _position(text: str, index: int) -> Position:
    """Return the line and column of a character."""
    line_start = text.rfind("\n", 0, index) + 1
    return Position(text.count("\n", 0, index), index - line_start)


def _error(path: Path, text: str, at: Position, reason: str, hint: str | None = None) -> MappingError:
    lines = text.splitlines()
    line = lines[at.line] if at.line < len(lines) else ""
    start = at.column - SHOWN_COLUMNS // 2 if at.column >= SHOWN_COLUMNS else 0
    shown = "".join(
        character if character.isprintable() or character == "\t" else "\N{REPLACEMENT CHARACTER}" for character in line
    )
    caret = f"\n  {shown[start : start + SHOWN_COLUMNS]}\n  {' ' * (at.column - start)}^"
    # An error contains no line ends except those of the excerpt.
    return MappingError(printable(reason) + caret, where=f"{path}:{at.line + 1}:{at.column + 1}", hint=hint)


class _Reader:
    """Builds data from PyYAML's events, which do not resolve tags, aliases or types."""

    def __init__(self, path: Path, text: str, until: str | None = None) -> None:
        self.path, self.text, self.until = path, text, until
        self.positions: dict[NodePath, Position] = {}
        self.events = yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        self.event: Any = None

    def read(self) -> Document:
        try:
            self._next()
            self._next()
            if isinstance(self.event, yaml.StreamEndEvent):
                raise _error(self.path, self.text, Position(0, 0), "is empty")
            self._next()
            data = self._node((), 0)
            if self.until is None:
                self._next()
                self._next()
                if not isinstance(self.event, yaml.StreamEndEvent):
                    raise self._refuse("a second document; expected one")
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            at = Position(mark.line, mark.column) if mark else Position(0, 0)
            raise _error(self.path, self.text, at, str(error.problem or error.context)) from None
        except yaml.reader.ReaderError as error:
            at = _position(self.text, len(self.text.encode()[: error.position].decode(errors="ignore")))
            raise _error(self.path, self.text, at, "a character that YAML does not allow") from None
        except yaml.YAMLError as error:
            raise MappingError(f"is not YAML: {error}".replace("\n", " "), where=self.path) from None
        return Document(self.path, self.text, data, self.positions)

    def _next(self) -> None:
        self.event = next(self.events)

    def _refuse(self, reason: str, hint: str | None = None) -> MappingError:
        mark = self.event.start_mark
        return _error(self.path, self.text, Position(mark.line, mark.column), reason, hint)

    def _node(self, at: NodePath, depth: int) -> Any:
        """Return the node that starts at the current event; afterwards the current event is the node's last."""
        event = self.event
        self.positions[at] = Position(event.start_mark.line, event.start_mark.column)
        if depth > MAX_DEPTH:
            raise self._refuse(f"nested more than {MAX_DEPTH} deep")
        if isinstance(event, yaml.AliasEvent):
            raise self._refuse("an alias is not allowed; write it out")
        if event.anchor is not None:
            raise self._refuse("an anchor is not allowed")
        if event.tag is not None:
            raise self._refuse(f"a tag is not allowed: {event.tag}")
        if isinstance(event, yaml.MappingStartEvent):
            return self._mapping(at, depth)
        if isinstance(event, yaml.SequenceStartEvent):
            return self._sequence(at, depth)
        return self._scalar()

    def _mapping(self, at: NodePath, depth: int) -> dict[str | int, Any]:
        result: dict[str | int, Any] = {}
        self._next()
        while not isinstance(self.event, yaml.MappingEndEvent):
            key_event = self.event
            key = self._node((*at, "<key>"), depth + 1)
            if type(key) not in (str, int):
                self.event = key_event
                raise self._refuse(f"the key {key!r} is not a name")
            if not at and key == self.until:
                break
            if key == "<<":
                raise self._refuse("a merge key is not allowed; write it out")
            if key in result:
                raise self._refuse(f"the key {key!r} is duplicated")
            key_position = self.positions.pop((*at, "<key>"))
            self._next()
            result[key] = self._node((*at, key), depth + 1)
            self.positions[(*at, key, "<key>")] = key_position
            self._next()
        return result

    def _sequence(self, at: NodePath, depth: int) -> list[Any]:
        result: list[Any] = []
        self._next()
        while not isinstance(self.event, yaml.SequenceEndEvent):
            result.append(self._node((*at, len(result)), depth + 1))
            self._next()
        return result

    def _scalar(self) -> str | int | float | bool | None:
        value: str = self.event.value
        if not self.event.implicit[0]:
            return value
        if value in _WORDS:
            return _WORDS[value]
        if _INTEGER.match(value):
            if len(value) > MAX_DIGITS:
                raise self._refuse(f"a number of more than {MAX_DIGITS} digits")
            return int(value)
        if _FLOAT.match(value):
            return float(value)
        tag: str = _RESOLVER.resolve(yaml.ScalarNode, value, (True, False))  # type: ignore[no-untyped-call]
        if tag != "tag:yaml.org,2002:str":
            kind = tag.rpartition(":")[2]
            raise self._refuse(f"{value!r}, which YAML may read as {kind}", hint="put it in quotes")
        return value
