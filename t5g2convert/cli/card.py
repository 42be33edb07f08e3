"""`t5g2 card`."""

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from t5g2convert.checkpoint.atomic_write import replace_file
from t5g2convert.checkpoint.file_store import regular_file
from t5g2convert.cli.console import DebugOption
from t5g2convert.errors import CheckpointError, OutputError, T5g2Error
from t5g2convert.printable import printable


def card(
    output: Annotated[Path, typer.Argument(help="A folder that t5g2 wrote, or that was trained elsewhere.")],
    source_card: Annotated[
        Path | None,
        typer.Option("--source-card", help="The README.md of the source, from which the license is taken."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--source", help="Of a folder trained elsewhere, which has no t5g2.json: the T5Gemma 2 that was trained."
        ),
    ] = None,
    repo: Annotated[str, typer.Option("--repo", help="What the folder is called on the Hub, org/name.")] = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Write a README.md that is there all anew, instead of what is ours in it.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Put it into the folder as README.md, which t5g2 verify lets stand.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """The model card of a folder, from its t5g2.json: what it is, how it was made, what was proved. No network."""
    from t5g2convert.publish.card import CARD_FILE, model_card

    path = output / CARD_FILE
    theirs = None if source_card is None else _read(source_card, CheckpointError)
    existing = _read(path, OutputError) if os.path.lexists(path) else None
    mode = "replace" if replace else "update"
    made = model_card(output, repo=repo, source_card=theirs, existing=existing, mode=mode, start=source)
    assert made is not None, "only keeping a card makes none"
    if write:
        _write(path, made)
        print(f"wrote {printable(str(path))}")  # noqa: T201
    else:
        sys.stdout.write(printable(made.replace("\r\n", "\n"), keep="\n"))


def _read(path: Path, error: type[T5g2Error]) -> str:
    """A card that is there.

    Raises:
        T5g2Error: `error`: it is not a file, is too large, cannot be read or is not text.
    """
    from t5g2convert.publish.frontmatter import MAX_CHARACTERS

    try:
        with regular_file(path).open("rb") as file:
            data = file.read(4 * MAX_CHARACTERS + 1)
        if len(data) > 4 * MAX_CHARACTERS:
            raise error(f"has more than {4 * MAX_CHARACTERS:,} bytes, expected a card", where=path)
        return data.decode()
    except CheckpointError as found:
        raise error(found.message, where=path) from None
    except OSError as found:
        raise error(f"cannot be read: {found.strerror}", where=path) from None
    except UnicodeDecodeError:
        raise error("is no UTF-8 text", where=path) from None


def _write(path: Path, text: str) -> None:
    """Put a card in place, by one rename.

    Raises:
        OutputError: It cannot be written, or a link is in its place.
    """
    if path.is_symlink():
        raise OutputError("is a link, expected a file or nothing", where=path, hint="remove it, and start again")
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=path) from None
