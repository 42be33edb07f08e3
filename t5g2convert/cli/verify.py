"""`t5g2 verify`, and the verification at the end of `t5g2 convert --verify`."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from t5g2convert.checkpoint.atomic_write import check_replaceable, replace_file
from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, print_notes, table
from t5g2convert.cli.options import (
    DecoderParentOption,
    DeviceOption,
    ImageOption,
    PassDtypeOption,
    TextOption,
    TowerDonorOption,
)
from t5g2convert.errors import OutputError, UsageError, VerificationError
from t5g2convert.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from t5g2convert.parity.reports.report import Report

SHOWN_OFFENDERS: Final = 20
"""Offenders of one check that are printed."""


def verify(
    output: Annotated[
        Path, typer.Argument(help="The folder to judge, which t5g2 wrote or which was trained elsewhere.")
    ],
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            help="The folder or model that it was made of, or trained from; without it little can be checked.",
        ),
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

    # A verification takes minutes; a report that cannot be written is refused before.
    check_reports(junit, html, [output, source, decoder_from, vision_from, mapping, text, image])
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
    from t5g2convert.parity.reports.html import html as as_html
    from t5g2convert.parity.reports.junit import junit as as_junit

    for path, render in ((junit, as_junit), (html, as_html)):
        if path is not None:
            write_text(path, render(report))


def check_reports(junit: Path | None, html: Path | None, inputs: "Sequence[Path | str | None]") -> None:
    """Refuse files that no report can be written to; those that are there stay as they are.

    Args:
        junit: The one report, if it is asked for.
        html: The other.
        inputs: What is read: folders, files, and models of the Hub.

    Raises:
        OutputError: A file cannot be written, or is read.
        UsageError: Both are the same file, or one would be a part of a model.
    """
    from t5g2convert.checkpoint.hub.model import parse_id
    from t5g2convert.conversion.write.output_path import check_report
    from t5g2convert.parity.checks.integrity import READ_BY_LOADERS

    if junit is not None and html is not None and junit.resolve() == html.resolve():
        raise UsageError(f"--junit and --html are the same file, {junit}", hint="give each a name of its own")
    read = [Path(given) for given in inputs if given is not None and parse_id(str(given)) is None]
    there = [path for path in read if os.path.exists(path)]  # noqa: PTH110 - no error for a name that is too long
    for path in (path for path in (junit, html) if path is not None):
        check_report(path, *there)
        target = path.resolve()
        if target.suffix.lower() in READ_BY_LOADERS and (target.parent / "config.json").exists():
            raise UsageError(f"{path} would be read as a part of the model in that folder", hint="name it otherwise")
        if not _is_written_directly(path):
            with _told(path):
                check_replaceable(target)


def write_text(path: Path, text: str) -> None:
    """Write a file whole, or leave it as it was; a device or a pipe is written as it is.

    Raises:
        OutputError: It cannot be written.
    """
    data = text.encode()
    with _told(path):
        if _is_written_directly(path):
            path.write_bytes(data)
        else:
            replace_file(path.resolve(), data)


def _is_written_directly(path: Path) -> bool:
    """Whether a path is a device or a pipe, or another name of an open file, as /dev/stdout is."""
    named = path.absolute()
    if any(named.is_relative_to(folder) for folder in ("/dev", "/proc")):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def _told(path: Path) -> "Iterator[None]":
    try:
        yield
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
