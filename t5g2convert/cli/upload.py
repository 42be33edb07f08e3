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
    typer.Option(
        "--push-to", help="Upload the result to this model on the Hub, private and with a card.", metavar="REPO"
    ),
]


def upload(
    output: Annotated[Path, typer.Argument(help="A folder written by t5g2, or trained elsewhere.")],
    repo: Annotated[str, typer.Argument(help="The model on the Hub, org/name; created if it does not exist.")],
    public: Annotated[bool, typer.Option("--public", help="Create the model public.", show_default="private")] = False,
    revision: Annotated[
        str | None,
        typer.Option("--revision", help="The branch, created if it does not exist; or refs/pr/1.", show_default="main"),
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead of committing.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the files that would be sent; send nothing.")
    ] = False,
    card: Annotated[
        Literal["update", "replace", "keep"],
        typer.Option("--card", help="How to write README.md: update our part of it, replace it, or keep it."),
    ] = "update",
    source_card: Annotated[
        Path | None,
        typer.Option(
            "--source-card",
            help="The README.md of a source that is a local folder, for the license.",
        ),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--source", help="For a folder trained elsewhere (without t5g2.json): the T5Gemma 2 it was trained from."
        ),
    ] = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Upload a folder to the Hub in one commit, and compare the checksums before and after."""
    from t5g2convert.publish.upload import upload as send

    source_text = None if source_card is None else _read(source_card)
    with _shown_steps() as report:
        done = send(
            output,
            repo,
            public=public,
            revision=revision,
            create_pr=create_pr,
            card=card,
            source_card=source_text,
            start=source,
            dry_run=dry_run,
            bars=report is not None,
            report=report,
        )
    if as_json:
        emit_json(done.to_json())
    else:
        print_upload(done, console())


def push(output: Path, repo: str, source: str) -> "Upload":
    """Upload a folder that was just written; the license comes from a card in the source's folder."""
    from t5g2convert.errors import HubError
    from t5g2convert.publish.upload import upload as send

    card = Path(source) / "README.md"
    has_card = card.is_file()
    try:
        with _shown_steps() as report:
            source_text = _read(card) if has_card else None
            return send(output, repo, source_card=source_text, bars=report is not None, report=report)
    except HubError as error:
        # The folder is complete, so only the upload must be repeated.
        again = f"t5g2 upload {output} {repo}" + (f" --source-card {card}" if has_card else "")
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
    """Print the files and the address of an upload."""
    plan = done.plan
    shown = table("", "file", "size", right=(2,))
    verb = "to send" if done.dry_run else "sent"
    for file in plan.files:
        shown.add_row(verb if file.name in plan.send else "unchanged", printable(file.name), size_text(file.size))
    for name in plan.remove:
        shown.add_row("to remove" if done.dry_run else "removed", printable(name), "")
    out.print(shown)
    count = f"{len(plan.send)} of {len(plan.files)} files, {size_text(plan.nbytes)}"
    target = f"{plan.access.repo}, {plan.branch}"
    if done.dry_run:
        new = "" if plan.access.exists else ", which would be created"
        out.print(f"would send {count}, to {target}{new}", soft_wrap=True)
    elif plan.changes:
        kind = "" if plan.access.private is None else " (private)" if plan.access.private else " (public)"
        out.print(f"sent {count}, to {target}{kind}: {done.url}", soft_wrap=True)
    else:
        out.print(f"all {len(plan.files)} files are already on the Hub: {done.url}", soft_wrap=True)
    print_notes(plan.notes)


@contextmanager
def _shown_steps() -> "Iterator[Callable[[str], None] | None]":
    """Print a line for each step on stderr if it is a terminal; the Hub's client shows its bars in between."""
    import sys

    if not sys.stderr.isatty():
        yield None
        return
    out = console(stderr=True)
    yield lambda step: out.print(f"upload: {printable(step)}", soft_wrap=True)
