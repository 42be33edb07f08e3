"""`t5g2 plan`."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from t5g2convert.checkpoint.roles import DECODER_FROM, SOURCE, VISION_FROM, Role
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
from t5g2convert.cli.options import (
    DecoderFromOption,
    DecoderLayersOption,
    DtypeOption,
    EmbeddingFromOption,
    EncoderLayersOption,
    MappingOption,
    PresetOption,
    ProjectorOption,
    RidgeOption,
    RopeOption,
    ShardOption,
    SourceArgument,
    VisionFromOption,
    WindowOption,
    parse_size,
)
from t5g2convert.printable import printable

if TYPE_CHECKING:
    from t5g2convert.conversion.plan import Plan

_GIVES: Final[Mapping[Role, str]] = {
    SOURCE: "",
    DECODER_FROM: "with the decoder of ",
    VISION_FROM: "with the tower of ",
}
"""What a checkpoint is to a plan, in front of its name."""


def plan(
    source: SourceArgument,
    output: Annotated[
        Path, typer.Option("--output", help="Where the output would go; its disk's free space is shown.")
    ] = Path(),
    mapping: MappingOption = None,
    decoder_from: DecoderFromOption = None,
    embedding_from: EmbeddingFromOption = "source",
    encoder_layers: EncoderLayersOption = None,
    decoder_layers: DecoderLayersOption = None,
    vision_from: VisionFromOption = None,
    projector: ProjectorOption = None,
    ridge: RidgeOption = 0.0,
    rope_scaling: RopeOption = "keep",
    sliding_window: WindowOption = None,
    preset: PresetOption = None,
    dtype: DtypeOption = "keep",
    max_shard_size: ShardOption = "5GB",
    tensors: Annotated[bool, typer.Option("--tensors", help="List every target tensor.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """What convert would do, from headers alone."""
    from t5g2convert.cli.drawing import draw_plan
    from t5g2convert.conversion.planner import build_plan
    from t5g2convert.conversion.staging import free_bytes
    from t5g2convert.conversion.writer import peak_memory

    made = build_plan(
        source,
        mapping=mapping,
        decoder_from=decoder_from,
        embedding_from=embedding_from,
        encoder_layers=encoder_layers,
        decoder_layers=decoder_layers,
        vision_from=vision_from,
        projector=projector,
        ridge=ridge,
        rope_scaling=rope_scaling,
        sliding_window=sliding_window,
        preset=preset,
        dtype=dtype,
        max_shard_bytes=parse_size(max_shard_size),
    )
    resources = {"disk_needed": made.nbytes, "disk_free": free_bytes(output), "peak_memory": peak_memory(made)}
    if as_json:
        emit_json(made.to_json() | resources)
        return
    out = console()
    title = " ".join(f"{_GIVES[role]}{printable(source.name)}" for role, source in made.sources.items())
    out.print(parameter_table(made.parameters, title=f"{title}: {made.source.family} to {made.config['model_type']}"))
    out.print(draw_plan(made), soft_wrap=True)
    files = table("file", "tensors", "size", right=(1, 2), title="Files")
    counts = Counter(tensor.shard for tensor in made.tensors)
    for shard in made.shards:
        files.add_row(shard.name, str(counts[shard.name]), size_text(shard.size))
    for file in made.files:
        how = f"made from {', '.join(file.reads)}" if file.how == "made" and file.reads else file.how
        files.add_row(printable(file.name), "", printable(how))
    out.print(files)
    out.print(
        f"needs {size_text(resources['disk_needed'])} of disk, {size_text(resources['disk_free'])} are free; "
        f"about {size_text(resources['peak_memory'])} of memory"
    )
    if tensors:
        _show_tensors(made)
    print_notes(made.notes)


def _show_tensors(made: "Plan") -> None:
    listing = table("target", "part", "dtype", "shape", "from", "bytes", "shard")
    for tensor in made.tensors:
        source = tensor.content.source
        origin = tensor.content.kind if tensor.origin is None else tensor.origin
        listing.add_row(
            tensor.name,
            tensor.part,
            tensor.dtype,
            str(list(tensor.shape)),
            printable(origin if tensor.content.kind == "copy" else f"{origin} ({tensor.content.kind})"),
            "" if source is None else f"{printable(source.file)}[{source.start}:{source.end}]",
            f"{tensor.shard}[{tensor.start}:{tensor.end}]",
        )
    console().print(listing)
