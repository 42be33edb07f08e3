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
    output: Annotated[Path, typer.Argument(help="A folder written by t5g2, or trained elsewhere.")],
    source_card: Annotated[
        Path | None,
        typer.Option("--source-card", help="The source's README.md, for the license."),
    ] = None,
    source: Annotated[
        Path | None,
        typer.Option(
            "--source", help="For a folder trained elsewhere (without t5g2.json): the T5Gemma 2 it was trained from."
        ),
    ] = None,
    repo: Annotated[str, typer.Option("--repo", help="The name on the Hub, org/name.")] = "",
    replace: Annotated[
        bool, typer.Option("--replace", help="Rewrite the whole README.md, not only the part that t5g2 wrote.")
    ] = False,
    write: Annotated[
        bool, typer.Option("--write", help="Save it in the folder as README.md; t5g2 verify ignores that file.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Print the model card of a folder, made from its t5g2.json: what it is, how it was made, which checks it passed.

    Works without network.
    """
    from t5g2convert.checkpoint.card_seal import CARD_FILE, is_sealed, sealed
    from t5g2convert.publish.card import model_card

    path = output / CARD_FILE
    source_text = None if source_card is None else _read(source_card, CheckpointError)
    existing = _read(path, OutputError) if os.path.lexists(path) else None
    mode = "replace" if replace else "update"
    text = model_card(output, repo=repo, source_card=source_text, existing=existing, mode=mode, start=source)
    assert text is not None, "only the mode keep returns none"
    if write:
        _write(path, sealed(text) if existing is not None and is_sealed(existing) else text)
        print(f"wrote {printable(str(path))}")  # noqa: T201
    else:
        sys.stdout.write(printable(text.replace("\r\n", "\n"), keep="\n"))


def _read(path: Path, error: type[T5g2Error]) -> str:
    """Read a card.

    Raises:
        T5g2Error: (`error`) The file is not a regular file, is too large, cannot be read or is not UTF-8.
    """
    from t5g2convert.publish.frontmatter import MAX_CHARACTERS

    try:
        with regular_file(path).open("rb") as file:
            data = file.read(4 * MAX_CHARACTERS + 1)
        if len(data) > 4 * MAX_CHARACTERS:
            raise error(f"is too large for a card: more than {4 * MAX_CHARACTERS:,} bytes", where=path)
        return data.decode()
    except CheckpointError as found:
        raise error(found.message, where=path) from None
    except OSError as found:
        raise error(f"cannot be read: {found.strerror}", where=path) from None
    except UnicodeDecodeError:
        raise error("is not UTF-8", where=path) from None


def _write(path: Path, text: str) -> None:
    """Write a card atomically.

    Raises:
        OutputError: The card cannot be written, or its path is a link.
    """
    if path.is_symlink():
        raise OutputError("is a link, expected a file or no file", where=path, hint="remove it, and run again")
    try:
        replace_file(path, text.encode())
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=path) from None
