"""Markdown that holds text from outside: it is shown as code, in which nothing is a heading, a link or HTML."""

from collections.abc import Collection, Iterable, Sequence
from typing import Final

from t5g2convert.printable import printable

SHOWN_CHARACTERS: Final = 300
"""Characters of one text from outside that are shown."""

LINE_CHARACTERS: Final = 1000
"""Characters of a line of a block of code that are shown."""

_ESCAPED: Final = {character: f"\\x{ord(character):02x}" for character in "`|<"}
"""What would end the code, the cell of a table, or be HTML to a careless reader."""


def code(text: object) -> str:
    """Text from outside, on one line, as code."""
    shown = "".join(_ESCAPED.get(character, character) for character in printable(_cut(str(text), SHOWN_CHARACTERS)))
    return f"`{shown}`" if shown.strip() else "(empty)"


def fenced(language: str, lines: Iterable[str]) -> str:
    """A block of code; no line of it ends the block."""
    shown = [printable(_cut(line, LINE_CHARACTERS)) for line in lines]
    assert not any(line.lstrip().startswith("```") for line in shown), "a line would end the block"
    return "\n".join([f"```{language}", *shown, "```"])


def table(header: Sequence[str], rows: Iterable[Sequence[str]], *, right: Collection[int] = ()) -> str:
    """A table; the columns numbered in `right` hold numbers."""
    lines = [header, ["---:" if column in right else "---" for column in range(len(header))], *rows]
    assert all(len(line) == len(header) for line in lines), "every row has as many columns as the header"
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cut(text: str, limit: int) -> str:
    return text if len(text) <= limit else f"{text[:limit]}..."
