"""Output: tables for people and JSON for scripts, without control characters from outside."""

import json
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from t5g2convert.printable import printable

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

JsonOption = Annotated[bool, typer.Option("--json", help="Print only one JSON document on stdout.")]
DebugOption = Annotated[bool, typer.Option("--debug", help="Add the traceback to an error.")]

PLAIN_WIDTH: Final = 400
"""The width of tables that do not go to a terminal, enough for complete names."""

PART_STYLES: Final = {
    "embedding": "yellow", "encoder": "cyan", "decoder": "magenta", "vision": "green", "projector": "blue",
}  # fmt: skip


def emit_json(document: Mapping[str, Any]) -> None:
    """Print one JSON document on stdout."""
    json.dump(document, sys.stdout, indent=2)
    sys.stdout.write("\n")


def console(*, stderr: bool = False) -> "Console":
    """Return a rich console that honours NO_COLOR, ignores markup, and does not wrap tables in a pipe."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else PLAIN_WIDTH
    return Console(stderr=stderr, width=width, markup=False, highlight=False, emoji=False)


def table(*columns: str, title: str | None = None, right: Iterable[int] = ()) -> "Table":
    """Return an empty table; the columns with the numbers in `right` are right-aligned."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    result = Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, pad_edge=False)
    for position, column in enumerate(columns):
        result.add_column(column, justify="right" if position in set(right) else "left", overflow="fold")
    return result


def parameter_table(parameters: Mapping[str, int], title: str = "Parameters") -> "Table":
    """Return a table of parameters by part, with shares and bars."""
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
    """Return a number of bytes as text, in powers of 1000 like the Hub."""
    value = float(count)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if value < 1000 or unit == "TB":
            break
        value /= 1000
    return f"{count} B" if unit == "B" else f"{value:.2f} {unit}"


def print_notes(notes: Iterable[str]) -> None:
    """Print notes on stderr: stdout is for the result itself."""
    for note in notes:
        print(f"note: {printable(note)}", file=sys.stderr)  # noqa: T201
