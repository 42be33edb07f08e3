"""`t5g2 verify`, and the verification at the end of `t5g2 convert --verify`."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, print_notes, table
from t5g2convert.cli.options import (
    DecoderParentOption,
    DeviceOption,
    ImageOption,
    PassDtypeOption,
    TextOption,
    TowerDonorOption,
)
from t5g2convert.errors import OutputError, VerificationError
from t5g2convert.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable

    from rich.console import Console

    from t5g2convert.parity.report import Report

SHOWN_OFFENDERS: Final = 20
"""Offenders of one check that are printed."""


def verify(
    output: Annotated[Path, typer.Argument(help="The converted folder to judge.")],
    source: Annotated[
        str | None,
        typer.Option("--source", help="The folder or model it was made of; without it little can be checked."),
    ] = None,
    decoder_from: DecoderParentOption = None,
    vision_from: TowerDonorOption = None,
    mapping: Annotated[
        str | None,
        typer.Option(
            "--mapping", help="The map it was made with.", show_default="the shipped one for the source's model_type"
        ),
    ] = None,
    dtype: PassDtypeOption = None,
    device: DeviceOption = "cpu",
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Largest difference that passes, as a part of the largest value.")
    ] = 0.0,
    text: TextOption = None,
    image: ImageOption = None,
    frozen: Annotated[
        list[str] | None,
        typer.Option(
            "--frozen",
            help="Of a folder trained elsewhere: a part or layer that was frozen on purpose (encoder, decoder, "
            "embedding, projector, encoder.layers.0), or none where the vision tower was trained too. May be repeated.",
            metavar="PART",
            show_default="vision",
        ),
    ] = None,
    record: Annotated[bool, typer.Option("--record/--no-record", help="Write the result into t5g2.json.")] = True,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write the checks as JUnit XML.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a self-contained HTML page.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Judge a conversion: files, bytes, settings, and what both models compute. Exits 6 if anything is wrong."""
    from t5g2convert.parity.verify import verify as judge

    for path in (junit, html):
        # A verification takes minutes; a place that cannot be written is told before.
        if path is not None:
            write_text(path, "")
    with shown_progress() as progress:
        report = judge(
            output,
            source,
            decoder_from=decoder_from,
            vision_from=vision_from,
            mapping=mapping,
            dtype=dtype,
            device=device,
            tolerance=tolerance,
            text=text,
            image=image,
            frozen=tuple(frozen or ()),
            record=record,
            progress=progress,
        )
    write_reports(report, junit, html)
    if as_json:
        emit_json(report.to_json())
    else:
        print_report(report, console())
    if not report.passed:
        raise typer.Exit(VerificationError.exit_code)


def write_reports(report: "Report", junit: Path | None, html: Path | None) -> None:
    """Write the report's files that were asked for.

    Raises:
        OutputError: A file cannot be written.
    """
    from t5g2convert.parity.junit import junit as as_junit
    from t5g2convert.parity.page import page

    for path, render in ((junit, as_junit), (html, page)):
        if path is not None:
            write_text(path, render(report))


def write_text(path: Path, text: str) -> None:
    """Write a file.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=path) from None


def print_report(report: "Report", out: "Console") -> None:
    """The table of checks, what failed in full, and the verdict."""
    from rich.text import Text

    shown = table("", "check", "what was compared and found")
    for check in report.checks:
        mark = Text("passed", "green") if check.passed else Text("FAILED", "bold red")
        shown.add_row(mark, check.name, printable(check.detail))
    for name, because in report.skipped.items():
        shown.add_row(Text("not made", "dim"), name, printable(because))
    out.print(shown)
    for check in report.failed:
        if len(check.offenders) > 1:
            out.print(f"{check.name}:")
            for offender in check.offenders[:SHOWN_OFFENDERS]:
                out.print(f"  {printable(offender)}", soft_wrap=True)
            if len(check.offenders) > SHOWN_OFFENDERS:
                out.print(f"  and {len(check.offenders) - SHOWN_OFFENDERS} more; --json and --html list all")
    if not report.passed:
        verdict = Text("not verified", "bold red")
    elif report.complete:
        verdict = Text("verified", "bold green")
    else:
        verdict = Text("intact, but not compared with its source: give it with --source", "bold yellow")
    if report.dtype is not None:
        verdict.append(f" in {report.dtype} on {report.device}", "not bold default")
    out.print(verdict)
    print_notes(report.remarks)


def require_passed(report: "Report", output: Path) -> None:
    """Go on if a report passed.

    Raises:
        VerificationError: It did not; the details are the checks that failed.
    """
    if not report.passed:
        names = ", ".join(check.name for check in report.failed)
        raise VerificationError(
            f"verification failed: {names}",
            where=output,
            details=[f"{check.name}: {check.detail}" for check in report.failed],
        )


@contextmanager
def shown_progress() -> "Iterator[Callable[[str], None] | None]":
    """A line on stderr that says what is being done, if that is a terminal."""
    import sys

    if not sys.stderr.isatty():
        yield None
        return
    with console(stderr=True).status("verify") as status:
        yield lambda what: status.update(f"verify: {printable(what)}")
