"""`t5g2 mappings`: list, show and check weight maps, and print their JSON Schema."""

from typing import Annotated

import typer

from t5g2convert.cli.command import Command, Commands
from t5g2convert.cli.console import PART_STYLES, DebugOption, JsonOption, console, emit_json, table
from t5g2convert.cli.options import map_names
from t5g2convert.printable import printable

app = typer.Typer(
    name="mappings",
    cls=Commands,
    help="List, show and check weight maps, and print their JSON Schema.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
)

NameArgument = Annotated[
    str, typer.Argument(help="Name of a shipped mapping, or path of a file.", autocompletion=map_names)
]


@app.command("list", cls=Command)
def list_mappings(as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """List the shipped mappings."""
    from t5g2convert.mapping.library import shipped_maps

    maps = shipped_maps()
    if as_json:
        rows = [
            {
                "name": item.map.name,
                "title": item.map.title,
                "source": item.map.source.model_type,
                "target": ", ".join(item.map.target.model_types),
                "sha256": item.sha256,
            }
            for item in maps
        ]
        emit_json({"mappings": rows})
        return
    listing = table("name", "converts", "into", "title")
    for item in maps:
        listing.add_row(
            item.map.name, ", ".join(item.map.source.model_type), ", ".join(item.map.target.model_types), item.map.title
        )
    console().print(listing)


@app.command("show", cls=Command)
def show_mapping(name: NameArgument, as_json: JsonOption = False, debug: DebugOption = False) -> None:
    """Show a mapping as a table."""
    from rich.text import Text

    from t5g2convert.mapping.library import find_map
    from t5g2convert.mapping.operations import Copy
    from t5g2convert.mapping.problems import flag

    weight_map = find_map(name).map
    if as_json:
        emit_json(weight_map.model_dump(mode="json", by_alias=True))
        return
    out = console()
    rows = table("from", "shape", "", "to", title=f"{weight_map.name}: {printable(weight_map.title)}")
    for row in weight_map.weights:
        marks = [] if isinstance(row.op, Copy) else [f"{key} {value}" for key, value in row.op.model_dump().items()]
        marks += ["merged attention"] if row.merged_attention else []
        marks += [f"if {row.when.replace('_', ' ')}"] if row.when else []
        targets = Text("\n").join(
            Text(f"{part}: {printable(target)}", PART_STYLES[part]) for part, target in row.targets
        )
        for tied in row.tied:
            targets.append(f"\ntied: {printable(tied)}", "dim")
        rows.add_row(printable(row.from_ or "-"), ", ".join(map(str, row.shape)), "\n".join(marks), targets)
    out.print(rows)
    drops = table("dropped", "because", "must equal")
    for drop in weight_map.drop:
        because = drop.because if drop.option is None else f"{drop.because}, with {flag(drop.option)} only"
        drops.add_row("\n".join(map(printable, drop.patterns)), printable(because), printable(drop.must_equal or ""))
    out.print(drops)
    roots = table("root", "spellings")
    for root, spellings in weight_map.roots.items():
        roots.add_row(f"{{{printable(root)}}}", "  ".join(map(repr, spellings)))
    out.print(roots)


@app.command("check", cls=Command)
def check_mapping(
    name: NameArgument,
    against: Annotated[
        str | None, typer.Option("--against", help="Also plan the conversion of this folder or Hub model.")
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Check a mapping, alone or against the headers of a checkpoint."""
    from t5g2convert.conversion.plan.builder import plan
    from t5g2convert.mapping.library import find_map

    loaded = find_map(name)
    tensors = None if against is None else len(plan(against, mapping=name).tensors)
    if as_json:
        emit_json(
            {"mapping": loaded.map.name, "sha256": loaded.sha256, "rows": len(loaded.map.weights), "tensors": tensors}
        )
        return
    text = f"{printable(name)} is valid: {len(loaded.map.weights)} rows, {len(loaded.map.drop)} drops"
    if against is not None:
        text += f"; it makes {tensors} tensors of {printable(against)}"
    console().print(text, soft_wrap=True)


@app.command("schema", cls=Command)
def show_schema(debug: DebugOption = False) -> None:
    """Print the JSON Schema of mappings, for editors."""
    from t5g2convert.mapping.schema import WeightMap

    schema = WeightMap.model_json_schema(by_alias=True)
    emit_json({"$schema": "https://json-schema.org/draft/2020-12/schema", **schema})
