"""The metadata of a model card: YAML between two lines of dashes, edited key by key.

Other keys stay the same byte for byte: loading the YAML and dumping it again would turn the language `no` into `false`
and lose comments.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import yaml

from t5g2convert.checkpoint.strictjson import is_text
from t5g2convert.errors import T5g2Error

MAX_CHARACTERS: Final = 1 << 20
MAX_DEPTH: Final = 32

Value = str | tuple[str, ...] | None
"""Text, a list of texts, or nothing."""

# The Hub finds the metadata at the start of the card: dashes, YAML, dashes. A byte order mark may come first.
_BLOCK: Final = re.compile(r"[\s\ufeff]*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)", re.DOTALL)
_LINE: Final = re.compile(r"[^\r\n\x85\u2028\u2029]*(?:\r\n|[\r\n\x85\u2028\u2029]|$)")
_NOTHING: Final = {"", "~", "null", "Null", "NULL"}


@dataclass(frozen=True, slots=True)
class Entry:
    """A key of the metadata.

    Attributes:
        value: Its value, if that is readable.
        readable: Whether the value is text, a list of texts or empty; mappings, nested lists, tags and aliases are not
            readable.
        start: The number of its first line.
        end: The number of the line after its last line.
    """

    value: Value
    readable: bool
    start: int
    end: int

    @property
    def empty(self) -> bool:
        """Whether the key has no value."""
        return self.readable and self.value is None


@dataclass(frozen=True, slots=True)
class Card:
    """A parsed card.

    Attributes:
        lines: The lines of the YAML, with their line ends.
        entries: The keys of the YAML.
        indent: The spaces in front of the keys.
        body: The text after the metadata.
        newline: The line end of the card.
    """

    lines: tuple[str, ...]
    entries: Mapping[str, Entry]
    indent: str
    body: str
    newline: str

    def joined(self, changes: Mapping[str, str | None], body: str) -> str:
        """Return the text of the card with another body and changed metadata.

        Args:
            changes: The new YAML of each key; None removes the key.
            body: The new body.
        """
        replaced = {self.entries[key].start: key for key in changes if key in self.entries}
        kept: list[str] = []
        at = 0
        while at < len(self.lines):
            key = replaced.get(at)
            if key is None:
                kept.append(self._ended(self.lines[at]))
                at += 1
            else:
                kept += self._indented(changes[key])
                at = self.entries[key].end
        for key, text in changes.items():
            if key not in self.entries:
                kept += self._indented(text)
        dashes = f"---{self.newline}"
        return f"{dashes}{''.join(kept)}{dashes}{body}" if kept else body

    def _indented(self, text: str | None) -> list[str]:
        return [f"{self.indent}{line}{self.newline}" for line in (text or "").splitlines()]

    def _ended(self, line: str) -> str:
        return line if line[-1:] in ("\r", "\n", "\x85", "\u2028", "\u2029") else line + self.newline


def parse_card(text: str, *, error: type[T5g2Error], where: str, hint: str | None = None) -> Card:
    """Parse a card.

    Args:
        text: The card, with or without metadata.
        error: The type of error to raise.
        where: The name of the card, for errors.
        hint: The hint of an error.

    Raises:
        T5g2Error: (`error`) The metadata is not YAML that the Hub can read, or is written in braces.
    """
    if len(text) > MAX_CHARACTERS:
        raise error(f"has {len(text):,} characters, expected at most {MAX_CHARACTERS:,}", where=where, hint=hint)
    if not is_text(text):
        raise error("contains half of a surrogate pair", where=where, hint=hint)
    newline = "\r\n" if "\r\n" in text else "\n"
    block = _BLOCK.match(text)
    if block is None:
        return Card((), {}, "", text.removeprefix("\ufeff"), newline)
    lines = tuple(found[0] for found in _LINE.finditer(block[1]) if found[0])
    try:
        entries, indent = _EventParser(lines).read()
    except yaml.MarkedYAMLError as found:
        mark = found.problem_mark or found.context_mark
        line = "" if mark is None else f", line {mark.line + 2}"
        raise error(f"metadata are not valid YAML: {found.problem}{line}", where=where, hint=hint) from None
    except yaml.YAMLError:
        raise error("metadata contain a character that YAML does not allow", where=where, hint=hint) from None
    except _RefusedError as found:
        raise error(f"metadata {found}", where=where, hint=hint) from None
    return Card(lines, entries, indent, text[block.end() :], newline)


class _RefusedError(Exception):
    """Valid YAML that is refused as metadata."""


class _EventParser:
    """Reads the top-level keys from PyYAML's events, which do not resolve tags, aliases or types."""

    def __init__(self, lines: tuple[str, ...]) -> None:
        self.lines, self.indent = lines, 0
        self.events: Iterator[Any] = yaml.parse("".join(lines), Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))

    def read(self) -> tuple[dict[str, Entry], str]:
        """Return the entries and the spaces in front of their keys."""
        next(self.events)
        if isinstance(next(self.events), yaml.StreamEndEvent):
            return {}, ""
        top = next(self.events)
        if isinstance(top, yaml.ScalarEvent) and top.value in _NOTHING:
            return {}, ""
        if not isinstance(top, yaml.MappingStartEvent):
            raise _RefusedError("are not a mapping")
        if top.flow_style:
            raise _RefusedError("are in braces, expected one key per line")
        found: dict[str, tuple[Value, bool]] = {}
        starts: list[int] = []
        self.indent = _start(top).column
        while not isinstance(event := next(self.events), yaml.MappingEndEvent):
            if not isinstance(event, yaml.ScalarEvent):
                raise _RefusedError("have a key that is not text")
            if event.value in found:
                raise _RefusedError(f"have the key {event.value!r} twice")
            starts.append(_start(event).line)
            found[event.value] = self._value(next(self.events))
        next(self.events)
        if not isinstance(next(self.events), yaml.StreamEndEvent):
            raise _RefusedError("have several documents")
        ends = [self._end(start, end) for start, end in zip(starts, [*starts[1:], len(self.lines)], strict=True)]
        entries = {key: Entry(*found[key], *place) for key, *place in zip(found, starts, ends, strict=True)}
        return entries, " " * self.indent

    def _value(self, event: Any) -> tuple[Value, bool]:
        """Return the value that starts at an event, and whether it is readable."""
        if isinstance(event, yaml.ScalarEvent):
            nothing = event.tag is not None or (event.implicit[0] and event.value in _NOTHING)
            return (None if nothing else str(event.value)), event.tag is None
        if isinstance(event, yaml.AliasEvent):
            return None, False
        texts, readable, depth = [], isinstance(event, yaml.SequenceStartEvent) and event.tag is None, 1
        while depth:
            event = next(self.events)
            if isinstance(event, yaml.CollectionStartEvent):
                depth, readable = depth + 1, False
            elif isinstance(event, yaml.CollectionEndEvent):
                depth -= 1
            elif isinstance(event, yaml.ScalarEvent) and event.tag is None:
                texts.append(str(event.value))
            else:
                readable = False
            if depth > MAX_DEPTH:
                raise _RefusedError(f"are nested more than {MAX_DEPTH} levels deep")
        return (tuple(texts) if readable else None), readable

    def _end(self, start: int, end: int) -> int:
        """Return the end of a key, without blank lines and comments before the next; those in values are indented."""
        while end > start + 1:
            line = self.lines[end - 1]
            if line.strip() and not line[: self.indent + 1].lstrip().startswith("#"):
                break
            end -= 1
        return end


def _start(event: Any) -> Any:
    """Return the start mark of an event; events parsed from text always have one."""
    return event.start_mark
