"""`t5g2 convert`."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, parameter_table, print_notes, size_text
from t5g2convert.cli.options import (
    DtypeOption,
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
from t5g2convert.cli.verify import print_report, require_passed, shown_progress
from t5g2convert.printable import printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from t5g2convert.parity.report import Report


def convert(
    source: SourceArgument,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    mapping: MappingOption = None,
    vision_from: VisionFromOption = None,
    projector: ProjectorOption = None,
    ridge: RidgeOption = 0.0,
    rope_scaling: RopeOption = "keep",
    sliding_window: WindowOption = None,
    preset: PresetOption = None,
    dtype: DtypeOption = "keep",
    max_shard_size: ShardOption = "5GB",
    hashing: Annotated[bool, typer.Option("--hash/--no-hash", help="Record sha256 of all files in t5g2.json.")] = True,
    flush: Annotated[
        bool, typer.Option("--flush/--no-flush", help="Wait until the disk has everything, against power loss.")
    ] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUTPUT, at the very end.")] = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the shards that an earlier run finished; leave them if stopped.")
    ] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Copy NaN and infinity as they are.")
    ] = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Judge the result before it appears; nothing is left if it fails.")
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert a Gemma 3 checkpoint into a T5Gemma 2 folder."""
    from t5g2convert.conversion.convert import execute
    from t5g2convert.conversion.planner import build_plan
    from t5g2convert.conversion.staging import check_target
    from t5g2convert.mapping.roles import Folders

    folders = Folders(source, vision_from=vision_from)
    check_target(output, *folders.all, overwrite=overwrite)
    plan = build_plan(
        source,
        mapping=mapping,
        vision_from=vision_from,
        projector=projector,
        ridge=ridge,
        rope_scaling=rope_scaling,
        sliding_window=sliding_window,
        preset=preset,
        dtype=dtype,
        max_shard_bytes=parse_size(max_shard_size),
    )
    reports: list[Report] = []

    def judge(folder: Path) -> None:
        from t5g2convert.parity.verify import verify as judge_folder

        bar.stop()
        with shown_progress() as told:
            reports.append(judge_folder(folder, source, vision_from=vision_from, mapping=mapping, progress=told))
        require_passed(reports[0], output)

    with ProgressBar(plan.nbytes) as bar:
        done = execute(
            plan,
            folders,
            output,
            overwrite=overwrite,
            hashing=hashing,
            flush=flush,
            resume=resume,
            allow_nonfinite=allow_nonfinite,
            progress=bar.advance,
            judge=judge if verify else None,
        )
    if as_json:
        document = done.to_json()
        if reports:
            document["verification"] = replace(reports[0], output=output).to_json()
        emit_json(document)
        return
    out = console()
    if reports:
        print_report(reports[0], out)
    out.print(parameter_table(done.parameters))
    out.print(
        f"wrote {done.tensors} tensors, {size_text(done.nbytes)} in {len(done.shards)} file(s), to "
        f"{printable(str(done.output))}",
        soft_wrap=True,
    )
    print_notes(done.notes)


class ProgressBar:
    """Bytes, rate and time left on stderr, if that is a terminal."""

    def __init__(self, total: int) -> None:
        import sys

        self._bar: Progress | None = None
        if sys.stderr.isatty():
            from rich import progress

            columns = (
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=console(stderr=True), transient=True)
            self._task = self._bar.add_task("convert", total=total)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def advance(self, count: int) -> None:
        """Show that so many bytes were written."""
        if self._bar is not None:
            self._bar.advance(self._task, count)

    def stop(self) -> None:
        """Give the line back; another display may follow."""
        if self._bar is not None:
            self._bar.stop()
