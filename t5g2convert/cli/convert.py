"""`t5g2 convert`."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self, Unpack

import typer

from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, parameter_table, print_notes, size_text
from t5g2convert.cli.options import (
    DecoderFromOption,
    DecoderLayersOption,
    DropHeadsOption,
    DtypeOption,
    EmbeddingFromOption,
    EncoderLayersOption,
    KeepRowsOption,
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
from t5g2convert.cli.upload import PushOption, print_upload, push
from t5g2convert.cli.verify import print_report, require_passed, shown_progress
from t5g2convert.printable import printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from t5g2convert.conversion.options import PlanOptions
    from t5g2convert.parity.reports.report import Report


OverwriteOption = Annotated[
    bool,
    typer.Option(
        "--overwrite",
        help="Replace an output of t5g2 that is there, at the very end; a folder with anything else in it is refused.",
    ),
]
AllowNonfiniteOption = Annotated[bool, typer.Option("--allow-nonfinite", help="Copy NaN and infinity as they are.")]
VerifyOption = Annotated[
    bool, typer.Option("--verify", help="Judge the result before it appears; nothing is left if it fails.")
]


def convert(
    source: SourceArgument,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
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
    keep_rows: KeepRowsOption = False,
    drop_heads: DropHeadsOption = False,
    dtype: DtypeOption = "keep",
    max_shard_size: ShardOption = "5GB",
    hashing: Annotated[
        bool, typer.Option("--hash/--no-hash", help="Record sha256 of all files, and compare downloads with the Hub's.")
    ] = True,
    flush: Annotated[
        bool, typer.Option("--flush/--no-flush", help="Wait until the disk has everything, against power loss.")
    ] = True,
    overwrite: OverwriteOption = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the shards that an earlier run finished; leave them if stopped.")
    ] = False,
    allow_nonfinite: AllowNonfiniteOption = False,
    verify: VerifyOption = False,
    push_to: PushOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert a Gemma 3 checkpoint into a T5Gemma 2 folder, or a Gemma 2 into a T5Gemma."""
    write_folder(
        source,
        output,
        overwrite=overwrite,
        hashing=hashing,
        flush=flush,
        resume=resume,
        allow_nonfinite=allow_nonfinite,
        verify=verify,
        push_to=push_to,
        as_json=as_json,
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
        keep_rows=keep_rows,
        drop_heads=drop_heads,
        dtype=dtype,
        max_shard_bytes=parse_size(max_shard_size),
    )


def write_folder(
    source: str,
    output: Path,
    *,
    overwrite: bool,
    verify: bool,
    as_json: bool,
    push_to: str | None = None,
    hashing: bool = True,
    flush: bool = True,
    resume: bool = False,
    allow_nonfinite: bool = False,
    **options: "Unpack[PlanOptions]",
) -> None:
    """Plan, download, write, judge and upload if asked to, and print what was done; see `conversion.convert`."""
    from t5g2convert.conversion.convert import execute, prepare

    if push_to is not None:
        from t5g2convert.publish.repository import check_access

        check_access(push_to)
    with ExitStack() as shown:
        plan, sources = prepare(
            source,
            output,
            overwrite=overwrite,
            hashing=hashing,
            resume=resume,
            downloading=lambda total: shown.enter_context(ProgressBar(total, "download")).advance,
            **options,
        )
    folders = sources.folders
    reports: list[Report] = []

    def judge(folder: Path) -> None:
        from t5g2convert.parity.verify import verify as judge_folder

        bar.stop()
        with shown_progress() as told:
            mapping = options.get("mapping")
            # The activations of a real model overflow float16; its weights are judged in float32 as exactly.
            dtype = "float32" if plan.dtype == "float16" else None
            reports.append(
                judge_folder(
                    folder, sources.origin, **sources.other_origins, mapping=mapping, dtype=dtype, progress=told
                )
            )
        require_passed(reports[0], output)

    with ProgressBar(plan.work, "convert") as bar:
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
    uploaded = None if push_to is None else push(output, push_to, source)
    if as_json:
        document = done.to_json()
        if reports:
            document["verification"] = replace(reports[0], output=output).to_json()
        if uploaded is not None:
            document["upload"] = uploaded.to_json()
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
    if uploaded is not None:
        print_upload(uploaded, out)


class ProgressBar:
    """Bytes, rate and time left on stderr, if that is a terminal."""

    def __init__(self, total: int, what: str) -> None:
        import sys

        self._bar: Progress | None = None
        if sys.stderr.isatty():
            from rich import progress

            columns = (
                progress.TextColumn("{task.description}"),
                progress.BarColumn(),
                progress.DownloadColumn(),
                progress.TransferSpeedColumn(),
                progress.TimeRemainingColumn(),
            )
            self._bar = progress.Progress(*columns, console=console(stderr=True), transient=True)
            self._task = self._bar.add_task(what, total=total)

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
