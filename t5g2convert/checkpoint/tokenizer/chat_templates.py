"""Additional chat templates: files in one folder that transformers loads with the tokenizer's own template."""

from collections.abc import Iterable
from typing import Final

from t5g2convert.checkpoint.file_store import is_there, listed
from t5g2convert.checkpoint.folder import Checkpoint, is_plain_name
from t5g2convert.checkpoint.strictjson import is_text
from t5g2convert.errors import CheckpointError

TEMPLATES_FOLDER: Final = "additional_chat_templates/"
SUFFIX: Final = ".jinja"


def is_output_name(name: str) -> bool:
    """Return whether an output may have a file of this name: a plain name, or a template in its folder."""
    return is_plain_name(name.removeprefix(TEMPLATES_FOLDER) if is_template(name) else name)


def is_template(name: str) -> bool:
    """Return whether a path is an additional chat template; its name may have any characters."""
    return name.startswith(TEMPLATES_FOLDER) and name.endswith(SUFFIX)


def templates_of(checkpoint: Checkpoint) -> tuple[str, ...]:
    """Return the paths of a checkpoint's additional chat templates, sorted.

    Raises:
        CheckpointError: A template is not a regular file, or has a name that an output cannot have.
    """
    names = sorted(filter(is_template, checkpoint.hub.files if checkpoint.hub is not None else _in_folder(checkpoint)))
    for name in names:
        own = name.removeprefix(TEMPLATES_FOLDER)
        if own.startswith(".") or not (is_plain_name(own) and own.isprintable() and is_text(own)):
            raise CheckpointError(
                f"{own!a} is not a valid name of a chat template",
                where=checkpoint.path / TEMPLATES_FOLDER,
                hint="rename it to letters, digits, dots, dashes and underscores",
            )
        if checkpoint.hub is None:
            is_there(checkpoint.path / name)
    return tuple(names)


def held(checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
    """Return the listed files that a checkpoint has; the folder of templates stands for the files in it."""
    found: list[str] = []
    for name in names:
        if name == TEMPLATES_FOLDER:
            found += templates_of(checkpoint)
        elif checkpoint.holds(name):
            found.append(name)
    return found


def _in_folder(checkpoint: Checkpoint) -> list[str]:
    folder = checkpoint.path / TEMPLATES_FOLDER
    try:
        if not folder.is_dir():
            return []
        # A folder with the name of a template is refused later: it is not a regular file.
        return [f"{TEMPLATES_FOLDER}{name.rstrip('/')}" for name in listed(folder)]
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=folder) from None
