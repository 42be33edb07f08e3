"""`t5g2 plan`."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from t5g2convert.checkpoint.sources import DECODER_FROM, SOURCE, VISION_FROM, Role, plain_name, role_in
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
from t5g2convert.cli.options import SourceArgument, with_options
from t5g2convert.conversion.options import PlanOptions
from t5g2convert.printable import printable

if TYPE_CHECKING:
    from t5g2convert.conversion.assets.aux_files import PlannedFile
    from t5g2convert.conversion.plan.types import Plan, PlannedTensor

_INPUTS: Final[Mapping[Role, str]] = {
    SOURCE: "",
    DECODER_FROM: "with the decoder of ",
    VISION_FROM: "with the tower of ",
}
"""What the plan reads each checkpoint for, as a prefix of its name in the title."""


@with_options
def plan(
    source: SourceArgument,
    *,
    output: Annotated[
        Path, typer.Option("--output", help="Where the output would go; its disk's free space is shown.")
    ] = Path(),
    options: PlanOptions,
    tensors: Annotated[bool, typer.Option("--tensors", help="List every target tensor.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Show what convert would do, from headers and small files; a tokenizer.json on the Hub is downloaded if needed."""
    from t5g2convert.conversion.plan.builder import build_plan, open_sources
    from t5g2convert.conversion.write.resources import disk_space, free_bytes, peak_memory

    sources = open_sources(source, options)
    made = build_plan(sources, options)
    needed = disk_space(made, sources, output)
    resources = {
        "disk_needed": needed.output,
        "disk_free": free_bytes(output),
        "download": needed.download,
        "peak_memory": peak_memory(made),
    }
    if as_json:
        emit_json(made.to_json() | resources)
        return
    _show_plan(made)
    _show_resources(**resources)
    if tensors:
        _show_tensors(made)
    print_notes(made.notes)


def _show_plan(made: "Plan") -> None:
    """Print the parameters, the drawing, and the files."""
    from t5g2convert.cli.drawing import draw_plan

    out = console()
    title = " ".join(f"{_INPUTS[role]}{printable(source.name)}" for role, source in made.sources.items())
    out.print(parameter_table(made.parameters, title=f"{title}: {made.source.family} to {made.config['model_type']}"))
    out.print(draw_plan(made), soft_wrap=True)
    files = table("file", "tensors", "size", right=(1, 2), title="Files")
    counts = Counter(tensor.shard for tensor in made.tensors)
    for shard in made.shards:
        files.add_row(shard.name, str(counts[shard.name]), size_text(shard.size))
    for file in made.files:
        files.add_row(printable(file.name), "", printable(_how(file, made)))
    out.print(files)


def _show_resources(disk_needed: int, disk_free: int, download: int, peak_memory: int) -> None:
    first = f"; downloads {size_text(download)} first" if download else ""
    console().print(
        f"needs {size_text(disk_needed)} of disk, {size_text(disk_free)} are free; "
        f"about {size_text(peak_memory)} of memory{first}",
        soft_wrap=True,
    )


def _how(file: "PlannedFile", made: "Plan") -> str:
    """Return how a file is made, with the names of the checkpoints that it is made from."""
    if file.how != "made" or not file.reads:
        return file.how
    reads = (f"{plain_name(name)} of {made.sources[role_in(name)].name}" for name in file.reads)
    return f"made from {', '.join(reads if len(made.sources) > 1 else file.reads)}"


def _from(tensor: "PlannedTensor") -> str:
    """Return the source of a target tensor, and the operation if it is not a copy."""
    kind = tensor.content.kind
    if tensor.origin is None or tensor.content.source is None:
        return kind
    return tensor.origin if kind == "copy" else f"{tensor.origin} ({kind})"


def _show_tensors(made: "Plan") -> None:
    listing = table("target", "part", "dtype", "shape", "from", "bytes", "shard")
    for tensor in made.tensors:
        source = tensor.content.source
        listing.add_row(
            tensor.name,
            tensor.part,
            tensor.dtype,
            str(list(tensor.shape)),
            printable(_from(tensor)),
            "" if source is None else f"{printable(source.file)}[{source.start}:{source.end}]",
            f"{tensor.shard}[{tensor.start}:{tensor.end}]",
        )
    console().print(listing)
