"""`t5g2 convert`, and the common steps of all commands that write a planned folder."""

import shlex
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import typer

from t5g2convert.checkpoint.atomic_write import replace_file
from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, parameter_table, print_notes, size_text
from t5g2convert.cli.options import SourceArgument, with_options
from t5g2convert.cli.upload import PushOption, print_upload, push
from t5g2convert.cli.verify import print_report, require_passed, shown_progress
from t5g2convert.conversion.options import ConvertOptions
from t5g2convert.errors import OutputError, T5g2Error
from t5g2convert.printable import printable

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.progress import Progress

    from t5g2convert.checkpoint.sources import Sources
    from t5g2convert.conversion.convert import Conversion
    from t5g2convert.conversion.plan.types import Plan
    from t5g2convert.parity.reports.report import Report
    from t5g2convert.publish.upload import Upload

VERIFIED_BELOW = 500_000_000
"""Parameters. Smaller results are verified by default: that of Gemma 3 270M takes about a minute of one core."""

VerifyOption = Annotated[
    bool | None,
    typer.Option(
        "--verify/--no-verify",
        help="Verify the result before it appears; if this fails, nothing is written.",
        show_default="verify below 500 million parameters",
    ),
]
CardOption = Annotated[bool, typer.Option("--card/--no-card", help="Write a model card, README.md, into the result.")]


@with_options(omit={"part"})
def convert(
    source: SourceArgument,
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    options: ConvertOptions,
    verify: VerifyOption = None,
    card: CardOption = True,
    push_to: PushOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Convert a Gemma 3 checkpoint into a T5Gemma 2 folder, or a Gemma 2 into a T5Gemma."""
    write_folder(source, output, options, verify=verify, card=card, push_to=push_to, as_json=as_json)


def write_folder(
    source: str,
    output: Path,
    options: ConvertOptions,
    *,
    verify: bool | None,
    card: bool,
    push_to: str | None,
    as_json: bool,
) -> None:
    """Plan, download, write, verify and upload, and print a summary; see `conversion.convert`."""
    started = time.monotonic()
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
    notes: list[str] = []
    if verify is None:
        verify = plan.parameters["total"] < VERIFIED_BELOW and not options.allow_nonfinite and _has_torch(notes)

    def judge(folder: Path) -> None:
        bar.stop()
        if verify:
            reports.append(_verified(folder, plan, sources, options.mapping))
            require_passed(reports[0], output)
        if card:
            notes.extend(_write_card(folder, sources.source.path, flush=options.flush))

    with ProgressBar(plan.work, "convert") as bar:
        options = options.replace(progress=bar.advance, judge=judge)
        done = execute(plan, sources.folders, output, options)
    done = replace(done, notes=(*done.notes, *notes))
    seconds = time.monotonic() - started
    uploaded = None if push_to is None else push(output, push_to, source)
    _print(done, reports, uploaded, seconds, as_json=as_json)
    if not as_json and push_to is None:
        print(printable(f"next: {_next_command(source, output, options, verified=bool(reports))}"))  # noqa: T201


def _has_torch(notes: list[str]) -> bool:
    """Return whether torch can be imported; note it where it cannot."""
    try:
        import torch  # noqa: F401
    except Exception as error:  # noqa: BLE001 - a broken installation fails with errors of many kinds
        notes.append(f"not verified: torch cannot be imported ({type(error).__name__}); t5g2 doctor says more")
        return False
    return True


def _write_card(folder: Path, source: Path, *, flush: bool) -> "Iterator[str]":
    """Write the card of a finished folder, with the license of the source's card; yield a note if it cannot be made.

    Raises:
        OutputError: The card cannot be written.
    """
    from t5g2convert.checkpoint.card_seal import CARD_FILE, sealed
    from t5g2convert.publish.card import model_card
    from t5g2convert.publish.sent_files import local_card

    try:
        source_card = local_card(source)
    except T5g2Error:
        source_card = None
    try:
        text = model_card(folder, repo="", source_card=source_card, existing=None, mode="update")
    except T5g2Error as error:
        yield f"no model card was written: {error.message}"
        return
    path, data = folder / CARD_FILE, sealed(text or "").encode()
    try:
        if flush:
            replace_file(path, data)
        else:
            path.write_bytes(data)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=path) from error


def _next_command(source: str, output: Path, options: ConvertOptions, *, verified: bool) -> str:
    if verified and options.part is None and (output / "tokenizer.json").is_file():
        # Its decoder alone writes text before any training.
        words = ["--hide-encoder", "--decoder-prompt", "The capital of France is"]
        return shlex.join(["t5g2", "generate", str(output), *words])
    if verified:
        return shlex.join(["t5g2", "upload", str(output), f"your-name/{output.resolve().name}"])
    others = {
        "--decoder-from": options.decoder_from, "--vision-from": options.vision_from, "--mapping": options.mapping,
    }  # fmt: skip
    given = [word for option, value in others.items() if value is not None for word in (option, str(value))]
    return shlex.join(["t5g2", "verify", str(output), "--source", source, *given])


def _verified(folder: Path, plan: "Plan", sources: "Sources", mapping: str | None) -> "Report":
    from t5g2convert.parity.verify import verify
    from t5g2convert.reference.options import PassDtype

    # The activations of a real model overflow float16; float32 judges its weights just as exactly.
    dtype: PassDtype | None = "float32" if plan.dtype == "float16" else None
    with shown_progress() as progress:
        return verify(folder, sources.origin, **sources.other_origins, mapping=mapping, dtype=dtype, progress=progress)


def _print(
    done: "Conversion", reports: "list[Report]", uploaded: "Upload | None", seconds: float, *, as_json: bool
) -> None:
    if as_json:
        document = {**done.to_json(), "seconds": round(seconds, 3)}
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
        f"{printable(str(done.output))} in {seconds:.1f} s",
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
