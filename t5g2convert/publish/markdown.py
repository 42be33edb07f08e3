"""Markdown that shows text from outside as code, so it cannot become a heading, a link or HTML."""

from collections.abc import Collection, Iterable, Sequence
from typing import Final

from t5g2convert.printable import printable

SHOWN_CHARACTERS: Final = 300
"""Maximum number of characters to show of one text from outside."""

LINE_CHARACTERS: Final = 1000
"""Maximum number of characters to show of one line in a code block."""

_ESCAPED: Final = {character: f"\\x{ord(character):02x}" for character in "`|<"}
"""Characters that would end the code or the table cell, or that a careless renderer would interpret as HTML."""


def code(text: object) -> str:
    """Return text from outside as inline code, on one line."""
    shown = "".join(_ESCAPED.get(character, character) for character in printable(_cut(str(text), SHOWN_CHARACTERS)))
    return f"`{shown}`" if shown.strip() else "(empty)"


def fenced(language: str, lines: Iterable[str]) -> str:
    """Return a code block; lines cannot end it early."""
    shown = [printable(_cut(line, LINE_CHARACTERS)) for line in lines]
    assert not any(line.lstrip().startswith("```") for line in shown), "a line would end the block"
    return "\n".join([f"```{language}", *shown, "```"])


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """Return a table; the columns with the numbers in `right` are right-aligned."""
    lines = [header, ["---:" if column in right else "---" for column in range(len(header))], *rows]
    assert all(len(line) == len(header) for line in lines), "every row has as many columns as the header"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
