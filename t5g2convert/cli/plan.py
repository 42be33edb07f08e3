"""`t5g2 plan`."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from t5g2convert.checkpoint.sources import DECODER_FROM, SOURCE, VISION_FROM, Role, plain_name, role_in
from t5g2convert.cli.console import (
    PART_STYLES,
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
    from rich.text import Text

    from t5g2convert.conversion.assets.aux_files import PlannedFile
    from t5g2convert.conversion.plan.types import Plan, PlannedTensor


_INPUTS: Final[Mapping[Role, str]] = {
    SOURCE: "",
    DECODER_FROM: "with the decoder of ",
    VISION_FROM: "with the tower of ",
}
"""What the plan reads from each checkpoint, as a prefix of its name in the title."""


@with_options
def plan(
    source: SourceArgument,
    *,
    output: Annotated[
        Path, typer.Option("--output", help="Planned output folder; shows the free space of its disk.")
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
    """Describe how a file is made, with the names of the checkpoints that it is made from."""
    if file.how != "made" or not file.reads:
        return file.how
    reads = (f"{plain_name(name)} of {made.sources[role_in(name)].name}" for name in file.reads)
    return f"made from {', '.join(reads if len(made.sources) > 1 else file.reads)}"


def _from(tensor: "PlannedTensor") -> str:
    """Describe the source of a target tensor, and the operation if it is not a copy."""
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


_ROLES = {
    "t5gemma": {
        "embedding": "one matrix per stack, and one for an untied softmax",
        "encoder": "bidirectional attention",
        "decoder": "cross-attention is initialized from self-attention",
    },
    "t5gemma2": {
        "embedding": "one matrix: encoder input, decoder input and softmax",
        "encoder": "bidirectional attention",
        "decoder": "merged attention over [decoder states; encoder output]",
        "vision": "feeds the encoder only",
        "projector": "from image features to the encoder's width",
    },
}
"""What each part does, by the target's `model_type`."""


_OWNERS: dict[Role, str] = {DECODER_FROM: "the other parent's", VISION_FROM: "the donor's"}


def draw_plan(plan: "Plan") -> "Text":
    """Draw a line for each part of the target, joined to the source tensors that fill it."""
    from rich.text import Text

    parts_of: dict[str | None, set[str]] = {}
    for tensor in plan.tensors:
        parts_of.setdefault(tensor.origin, set()).add(tensor.part)
    sources: dict[tuple[Role, tuple[str, ...]], tuple[int, int]] = {}
    computed: Counter[tuple[str, str]] = Counter()
    counts: Counter[str] = Counter()
    for tensor in plan.tensors:
        counts[tensor.part] += 1
        if tensor.content.kind in ("copy", "cast") and tensor.content.source is not None:
            parts = tuple(sorted(parts_of[tensor.origin], key=list(PART_STYLES).index))
            span = tensor.content.source
            number, size = sources.get(key := (role_in(span.file), parts), (0, 0))
            if tensor.part == parts[0]:
                sources[key] = (number + 1, size + span.end - span.start)
        else:
            computed[tensor.part, tensor.content.kind] += 1
    roles = _ROLES.get(plan.config["model_type"], {})
    drawing = Text()
    for (role, parts), (number, size) in sources.items():
        left = f"{number} tensor{'s' if number > 1 else ''}, {size_text(size)}"
        for position, part in enumerate(parts):
            fork = "───" if len(parts) == 1 else "─┬─" if position == 0 else " └─"
            drawing.append(f"  {left if position == 0 else '':<24}")
            drawing.append(f"{fork}────▶ ", PART_STYLES[part])
            drawing.append(f"{part:<10}", f"bold {PART_STYLES[part]}")
            owner = f"{_OWNERS[role]}: " if role in _OWNERS else ""
            drawing.append(f"{counts[part]:>5} tensors   {owner}{roles.get(part, '')}\n")
    for (part, kind), number in computed.items():
        drawing.append(f"  {'computed':<24}")
        drawing.append("───────▶ ", PART_STYLES[part])
        drawing.append(f"{part:<10}", f"bold {PART_STYLES[part]}")
        drawing.append(f"{number:>5} of them    {_computed_role(part, kind, plan)}\n")
    return drawing


def _computed_role(part: str, kind: str, plan: "Plan") -> str:
    if part == "embedding":
        return "the end-of-image row, scaled"
    if kind == "filled":
        return "the final norm, one factor"
    if kind == "aligned":
        return "the donor's, mapped to the source's width by least squares"
    return "zeros, to be trained" if VISION_FROM in plan.sources else "stub of a model without images"
