"""How results are shown: tables for people, JSON for scripts, and nothing from outside that a terminal would obey."""

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from t5g2convert.printable import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else on stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Add the traceback to an error.")]

PLAIN_WIDTH: Final = 400
"""Columns at most of a table that does not go to a terminal: enough for every name to stand whole."""

PART_STYLES: Final = {
    "embedding": "yellow", "encoder": "cyan", "decoder": "magenta", "vision": "green", "projector": "blue",
}  # fmt: skip


def emit_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout."""
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")


def console(*, stderr: bool = False) -> "Console":
    """A rich console that honours NO_COLOR, reads no markup, and does not fold tables in a pipe."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def table(*columns: str, title: str | None = None, right: Iterable[int] = ()) -> "Table":
    """An empty table; the columns numbered in `right` hold numbers."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    result = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        result.add_column(column, justify="right" if position in set(right) else "left", overflow="fold")
    return result


def parameter_table(parameters: Mapping[str, int], title: str = "Parameters") -> "Table":
    """Parameters by part, with their share and a bar."""
    from rich.text import Text

    result = table("part", "parameters", "share", "", title=title, right=(1, 2))
    total = parameters["total"] or 1
    for part, count in parameters.items():
        share = count / total
        style = PART_STYLES.get(part, "bold")
        bar = "" if part == "total" else "█" * max(round(share * 40), 1 if count else 0)
        result.add_row(
            Text(part, style), f"{count:,}", f"{share:.1%}", Text(bar, style), end_section=part == list(parameters)[-2]
        )
    return result


def size_text(count: int) -> str:
    """Bytes as people read them, in powers of 1000 as the Hub counts."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"


def print_notes(notes: Iterable[str]) -> None:
    """Notes on stderr: they are about the result, not the result."""
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)  # noqa: T201
