"""Tables and sentences in Markdown."""

import re
from collections.abc import Iterable


def table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table, with bars in cells escaped."""
    lines = [head, tuple("---" for _ in head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def first_sentence(text: str | None) -> str:
    """Return the first sentence of a text."""
    return re.split(r"(?<=\.)\s", " ".join((text or "").split()), maxsplit=1)[0]
