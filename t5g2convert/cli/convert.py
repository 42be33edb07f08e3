"""`t5g2 convert`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from t5g2convert.cli.console import (
    DebugOption,
    JsonOption,
    console,
    emit_json,
    parameter_table,
    print_notes,
    printable,
    size_text,
)
from t5g2convert.cli.options import DtypeOption, MappingOption, ShardOption, SourceArgument, parse_size

if TYPE_CHECKING:
    from t5g2convert.conversion.copying import Progress


def convert(
    source: SourceArgument,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    mapping: MappingOption = None,
    dtype: DtypeOption = "keep",
    max_shard_size: ShardOption = "5GB",
    hashing: Annotated[bool, typer.Option("--hash/--no-hash", help="Record sha256 of all files in t5g2.json.")] = True,
    flush: Annotated[
        bool, typer.Option("--flush/--no-flush", help="Wait until the disk has everything, against power loss.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT, at the very end.")] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert a Gemma 3 checkpoint into a T5Gemma 2 folder."""
    from t5g2convert.conversion.convert import execute
    from t5g2convert.conversion.planner import build_plan
    from t5g2convert.conversion.staging import check_target

    check_target(output, source, overwrite=overwrite)
    plan = build_plan(source, mapping=mapping, dtype=dtype, max_shard_bytes=parse_size(max_shard_size))
    with _progress_bar(plan.nbytes) as progress:
        done = execute(plan, source, output, overwrite=overwrite, hashing=hashing, flush=flush, progress=progress)
    if as_json:
        emit_json(done.to_json())
        return
    out = console()
    out.print(parameter_table(done.parameters))
    out.print(
        f"wrote {done.tensors} tensors, {size_text(done.nbytes)} in {len(done.shards)} file(s), to "
        f"{printable(str(done.output))}",
        soft_wrap=True,
    )
    print_notes(done.notes)


@contextmanager
def _progress_bar(total: int) -> "Iterator[Progress | None]":
    """Bytes, rate and time left on stderr, if that is a terminal."""
    import sys

    if not sys.stderr.isatty():
        yield None
        return
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console(stderr=True), transient=True) as bar:
        task = bar.add_task("convert", total=total)
        yield lambda count: bar.advance(task, count)
