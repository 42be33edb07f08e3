"""`t5g2 verify`, and the verification at the end of `t5g2 convert --verify`."""

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from t5g2convert.checkpoint.atomic_write import check_replaceable, replace_file
from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, print_notes, table
from t5g2convert.cli.options import with_options
from t5g2convert.errors import CheckpointError, OutputError, UsageError, VerificationError
from t5g2convert.parity.options import VerifyOptions
from t5g2convert.printable import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from t5g2convert.checkpoint.hub.open_and_fetch import Origin
    from t5g2convert.parity.reports.report import Report

SHOWN_OFFENDERS: Final = 20
"""Maximum number of faults of one check to print."""


@with_options
def verify(
    output: Annotated[Path, typer.Argument(help="The folder to verify, written by t5g2 or trained elsewhere.")],
    *,
    source: Annotated[
        str | None,
        typer.Option(
            "--source",
            help="The folder or model it was converted or trained from.",
        ),
    ] = None,
    integrity_only: Annotated[
        bool,
        typer.Option(
            "--integrity-only",
            help="Check only the files, and that the model runs. Without --source and this option, the exit code is 6.",
        ),
    ] = False,
    options: VerifyOptions,
    junit: Annotated[Path | None, typer.Option("--junit", help="Write the checks as JUnit XML.")] = None,
    html: Annotated[Path | None, typer.Option("--html", help="Write a self-contained HTML page.")] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Judge a conversion: files, bytes, settings, and what both models compute. Exits 6 if anything is wrong."""
    from t5g2convert.parity.verify import verify as judge

    if integrity_only and source is not None:
        raise UsageError("--integrity-only and --source cannot be used together")
    _check_order(output, source)
    inputs = [output, source, options.decoder_from, options.vision_from, options.mapping, options.adapter]
    inputs += [options.text, options.image]
    # A verification takes minutes, so refuse a report that cannot be written before it starts.
    check_reports(junit, html, inputs)
    with shown_progress() as progress:
        report = judge(output, source, **dict(options.replace(progress=progress)))
    write_reports(report, junit, html)
    if as_json:
        emit_json(report.to_json())
    else:
        print_report(report, console())
    if not report.passed or not (report.complete or integrity_only):
        raise typer.Exit(VerificationError.exit_code)


def _check_order(output: Path, source: str | None) -> None:
    """Refuse the source in place of the output, and the output in place of the source.

    Raises:
        UsageError: The output is a Gemma without t5g2.json, and the source is a folder that t5g2 made of a Gemma.
    """
    from t5g2convert.checkpoint.folder import read_json_object
    from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest

    if source is None or (output / MANIFEST_FILE).exists() or not (Path(source) / MANIFEST_FILE).is_file():
        return
    try:
        kind = read_json_object(output / "config.json").get("model_type")
        made_from = read_manifest(Path(source)).source.family
    except CheckpointError:
        return  # the verification says what is wrong
    if isinstance(kind, str) and kind.removesuffix("_text") == made_from and not kind.startswith("t5gemma"):
        raise UsageError(
            f"the output and --source are swapped: {output} is a {kind}, and t5g2 made {source} from one",
            hint=shlex.join(["t5g2", "verify", source, "--source", str(output)]),
        )


def write_reports(report: "Report", junit: Path | None, html: Path | None) -> None:
    """Write the report as JUnit XML and as HTML, to the paths that are not None.

    Raises:
        OutputError: A file cannot be written.
    """
    from t5g2convert.parity.reports.html import html as as_html
    from t5g2convert.parity.reports.report import junit as as_junit

    for path, render in ((junit, as_junit), (html, as_html)):
        if path is not None:
            write_text(path, render(report))


def check_reports(junit: Path | None, html: Path | None, inputs: "Sequence[Origin | None]") -> None:
    """Refuse paths that a report cannot be written to, without touching existing files.

    Args:
        junit: The path of the JUnit XML, if any.
        html: The path of the HTML page, if any.
        inputs: Folders, files and models on the Hub that are read.

    Raises:
        OutputError: A file cannot be written, or is an input.
        UsageError: Both paths are the same file, or a loader would read one as a part of a model.
    """
    from t5g2convert.checkpoint.hub.open_and_fetch import parse_id
    from t5g2convert.conversion.output.path_rules import check_report
    from t5g2convert.parity.checks.integrity import READ_BY_LOADERS

    if junit is not None and html is not None and junit.resolve() == html.resolve():
        raise UsageError(f"--junit and --html are the same file, {junit}", hint="choose different file names")
    read = [Path(str(each)) for each in inputs if each is not None and parse_id(str(each)) is None]
    there = [path for path in read if os.path.exists(path)]  # noqa: PTH110 - no error for a name that is too long
    for path in (path for path in (junit, html) if path is not None):
        check_report(path, *there)
        target = path.resolve()
        if target.suffix.lower() in READ_BY_LOADERS and (target.parent / "config.json").exists():
            raise UsageError(
                f"{path} would be loaded as part of the model in that folder", hint="choose another file name"
            )
        if not _is_written_directly(path):
            with _as_output_error(path):
                check_replaceable(target)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically; write directly to a device or a pipe.

    Raises:
        OutputError: The file cannot be written.
    """
    data = text.encode()
    with _as_output_error(path):
        if _is_written_directly(path):
            path.write_bytes(data)
        else:
            replace_file(path.resolve(), data)


def _is_written_directly(path: Path) -> bool:
    """Return whether a path is a device or a pipe, or names an open file, like /dev/stdout."""
    named = path.absolute()
    if any(named.is_relative_to(folder) for folder in ("/dev", "/proc")):
        return True
    return path.exists() and not path.is_file() and not path.is_dir()


@contextmanager
def _as_output_error(path: Path) -> "Iterator[None]":
    try:
        yield
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=path) from None


def print_report(report: "Report", out: "Console") -> None:
    """Print the table of checks, the faults of failed checks, and the verdict."""
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
        verdict = Text("intact, but not compared with its source; pass it with --source", "bold yellow")
    if report.dtype is not None:
        verdict.append(f" in {report.dtype} on {report.device}", "not bold default")
    out.print(verdict)
    print_notes(report.remarks)


def require_passed(report: "Report", output: Path) -> None:
    """Refuse a report with a failed check.

    Raises:
        VerificationError: A check failed; the details name the failed checks.
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
    """Show progress in a line on stderr, if stderr is a terminal."""
    import sys

    if not sys.stderr.isatty():
        yield None
        return
    with console(stderr=True).status("verify") as status:
        yield lambda what: status.update(f"verify: {printable(what)}")
