"""`t5g2 inspect`."""

from typing import TYPE_CHECKING, Annotated, Any

import typer

from t5g2convert.cli.console import (
    DebugOption,
    JsonOption,
    console,
    emit_json,
    parameter_table,
    print_notes,
    size_text,
    table,
)
from t5g2convert.printable import printable

if TYPE_CHECKING:
    from t5g2convert.mapping.inspection import Inspection


def inspect(
    source: Annotated[
        str,
        typer.Argument(help="A Gemma 2, Gemma 3, T5Gemma or T5Gemma 2 folder, or a model on the Hub."),
    ],
    tensors: Annotated[bool, typer.Option("--tensors", help="List every tensor.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what a checkpoint is: family, layout, parameters by part, dtypes, RoPE, windows."""
    from t5g2convert.mapping.inspection import inspect as inspect_source

    inspection = inspect_source(source)
    if as_json:
        emit_json(inspection.to_json(tensors=tensors))
        return
    show_inspection(inspection, tensors=tensors)


def show_inspection(inspection: "Inspection", *, tensors: bool = False) -> None:
    """Print an inspection for people."""
    out = console()
    files = table("", "", title=printable(inspection.title))
    files.show_header = False
    files.add_row("names", ", ".join(f"{root} as {spelling!r}" for root, spelling in inspection.layout.items()))
    files.add_row("dtypes", ", ".join(f"{dtype} ({count:,})" for dtype, count in inspection.dtypes.items()))
    total = sum(inspection.files.values())
    files.add_row("files", f"{len(inspection.files)} of together {size_text(total)}, {len(inspection.tensors)} tensors")
    for name, value in _fact_rows(inspection.facts):
        files.add_row(name, printable(value))
    out.print(files)
    out.print(parameter_table(inspection.parameters))
    for what, names in (("missing", inspection.missing), ("unexpected", inspection.unexpected)):
        for name in names:
            out.print(f"{what}: {printable(name)}")
    if tensors:
        listing = table("tensor", "part", "dtype", "shape", "file")
        for item in inspection.tensors:
            listing.add_row(printable(item.name), item.part, item.dtype, str(list(item.shape)), printable(item.file))
        out.print(listing)
    print_notes(inspection.notes)


def _fact_rows(facts: dict[str, Any] | Any, prefix: str = "") -> list[tuple[str, str]]:
    """Return settings as rows of a table; layer kinds are counted, not listed."""
    rows: list[tuple[str, str]] = []
    for name, value in facts.items():
        if isinstance(value, dict):
            rows += _fact_rows(value, f"{prefix}{name}.")
        elif name == "layer_types":
            kinds = {kind: value.count(kind) for kind in dict.fromkeys(value)}
            rows.append((prefix + name, ", ".join(f"{count} {kind}" for kind, count in kinds.items())))
        else:
            rows.append((prefix + name, str(value)))
    return rows
