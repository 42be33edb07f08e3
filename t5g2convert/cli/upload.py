"""`t5g2 upload`, and the upload at the end of `t5g2 convert --push-to`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, print_notes, size_text, table
from t5g2convert.printable import printable

if TYPE_CHECKING:
    from rich.console import Console

    from t5g2convert.publish.upload import Upload

PushOption = Annotated[
    str | None,
    typer.Option("--push-to", help="Upload the result to this model of the Hub: private, with a card.", metavar="REPO"),
]


def upload(
    output: Annotated[Path, typer.Argument(help="A folder that t5g2 wrote, or that was trained elsewhere.")],
    repo: Annotated[str, typer.Argument(help="The model of the Hub, as org/name; it is created if it is not there.")],
    public: Annotated[bool, typer.Option("--public", help="Create it public.", show_default="private")] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="The branch, made if it is not there; or refs/pr/1.", show_default="main"),
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Make a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Tell what would be sent, and send nothing.")] = False,
    card: Annotated[
        Literal["update", "replace", "keep"],
        typer.Option("--card", help="What becomes of a README.md: update adds to it, keep leaves it."),
    ] = "update",
    source_card: Annotated[
        Path | None,
        typer.Option("--source-card", help="README.md of the source, which has the license, if it was a folder."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--source", help="Of a folder trained elsewhere, which has no t5g2.json: the T5Gemma 2 that was trained."
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Upload a folder to the Hub: one commit of its files, compared by their checksums before and after."""
    from t5g2convert.publish.upload import upload as send

    theirs = None if source_card is None else _read(source_card)
    with _shown_steps() as told:
        done = send(
            output,
            repo,
            public=public,
            revision=revision,
            create_pr=create_pr,
            card=card,
            source_card=theirs,
            start=source,
            dry_run=dry_run,
            bars=told is not None,
            told=told,
        )
    if as_json:
        emit_json(done.to_json())
    else:
        print_upload(done, console())


def push(output: Path, repo: str, source: str) -> "Upload":
    """Upload what was just written of a source."""
    from t5g2convert.errors import HubError
    from t5g2convert.publish.upload import upload as send

    card = Path(source) / "README.md"
    beside = card.is_file()
    try:
        with _shown_steps() as told:
            return send(output, repo, source_card=_read(card) if beside else None, bars=told is not None, told=told)
    except HubError as error:
        # The folder is whole: only this step is to be repeated.
        again = f"t5g2 upload {output} {repo}" + (f" --source-card {card}" if beside else "")
        hint = f"{error.hint}; {output} is complete: {again}"
        raise HubError(error.message, where=error.where, hint=hint, details=error.details) from None


def _read(card: Path) -> str:
    from t5g2convert.errors import CheckpointError

    try:
        return card.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CheckpointError("is not UTF-8", where=card) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=card) from None


def print_upload(done: "Upload", out: "Console") -> None:
    """The table of files, and where they are."""
    plan = done.plan
    shown = table("", "file", "size", right=(2,))
    verb = "to send" if done.dry_run else "sent"
    for file in plan.files:
        shown.add_row(verb if file.name in plan.send else "there", printable(file.name), size_text(file.size))
    for name in plan.remove:
        shown.add_row("to remove" if done.dry_run else "removed", printable(name), "")
    out.print(shown)
    count = f"{len(plan.send)} of {len(plan.files)} files, {size_text(plan.nbytes)}"
    place = f"{plan.access.repo}, {plan.branch}"
    if done.dry_run:
        new = "" if plan.access.exists else ", which would be created"
        out.print(f"would send {count}, to {place}{new}", soft_wrap=True)
    elif plan.changes:
        kind = "" if plan.access.private is None else " (private)" if plan.access.private else " (public)"
        out.print(f"sent {count}, to {place}{kind}: {done.url}", soft_wrap=True)
    else:
        out.print(f"all {len(plan.files)} files are there: {done.url}", soft_wrap=True)
    print_notes(plan.notes)


@contextmanager
def _shown_steps() -> "Iterator[Callable[[str], None] | None]":
    """A line on stderr for each step, if that is a terminal; the Hub's client shows bars between them."""
    import sys

    if not sys.stderr.isatty():
        yield None
        return
    out = console(stderr=True)
    yield lambda what: out.print(f"upload: {printable(what)}", soft_wrap=True)
