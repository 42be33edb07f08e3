"""`t5g2 convert`, and the common steps of all commands that write a planned folder."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, parameter_table, print_notes, size_text
from t5g2convert.cli.options import SourceArgument, with_options
from t5g2convert.cli.upload import PushOption, print_upload, push
from t5g2convert.cli.verify import print_report, require_passed, shown_progress
from t5g2convert.conversion.options import ConvertOptions
from t5g2convert.printable import printable

if TYPE_CHECKING:
    from rich.progress import Progress

    from t5g2convert.checkpoint.sources import Sources
    from t5g2convert.conversion.convert import Conversion
    from t5g2convert.conversion.plan.types import Plan
    from t5g2convert.parity.reports.report import Report
    from t5g2convert.publish.upload import Upload

VerifyOption = Annotated[
    bool, typer.Option("--verify", help="Verify the result before it appears; if this fails, nothing is written.")
]


@with_options(omit={"part"})
def convert(
    source: SourceArgument,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    options: ConvertOptions,
    verify: VerifyOption = False,
    push_to: PushOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert a Gemma 3 checkpoint into a T5Gemma 2 folder, or a Gemma 2 into a T5Gemma."""
    write_folder(source, output, options, verify=verify, push_to=push_to, as_json=as_json)


def write_folder(
    source: str, output: Path, options: ConvertOptions, *, verify: bool, push_to: str | None, as_json: bool
) -> None:
    """Plan, download, write, verify and upload, and print a summary; see `conversion.convert`."""
    from t5g2convert.conversion.convert import execute, prepare

    if push_to is not None:
        from t5g2convert.publish.repository import check_access

        check_access(push_to)
    with ExitStack() as shown:
        plan, sources = prepare(
            source,
            output,
            options,
            downloading=lambda total: shown.enter_context(ProgressBar(total, "download")).advance,
        )
    reports: list[Report] = []

    def judge(folder: Path) -> None:
        bar.stop()
        reports.append(_verified(folder, plan, sources, options.mapping))
        require_passed(reports[0], output)

    with ProgressBar(plan.work, "convert") as bar:
        options = options.replace(progress=bar.advance, judge=judge if verify else None)
        done = execute(plan, sources.folders, output, options)
    _print(done, reports, None if push_to is None else push(output, push_to, source), as_json=as_json)


def _verified(folder: Path, plan: "Plan", sources: "Sources", mapping: str | None) -> "Report":
    from t5g2convert.parity.verify import verify
    from t5g2convert.reference.options import PassDtype

    # The activations of a real model overflow float16; float32 judges its weights just as exactly.
    dtype: PassDtype | None = "float32" if plan.dtype == "float16" else None
    with shown_progress() as progress:
        return verify(folder, sources.origin, **sources.other_origins, mapping=mapping, dtype=dtype, progress=progress)


def _print(done: "Conversion", reports: "list[Report]", uploaded: "Upload | None", *, as_json: bool) -> None:
    if as_json:
        document = done.to_json()
        if reports:
            document["verification"] = replace(reports[0], output=done.output).to_json()
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
        """Advance the bar by a number of bytes."""
        if self._bar is not None:
            self._bar.advance(self._task, count)

    def stop(self) -> None:
        """Remove the bar, since another display may follow."""
        if self._bar is not None:
            self._bar.stop()
