"""What the checkpoints of a run say of themselves: which there are, what they belong to, and what their files are."""

import re
from pathlib import Path
from typing import Final, Literal

from pydantic import PositiveInt

from t5g2convert.checkpoint.config import ConfigSection, parse_section
from t5g2convert.checkpoint.digest import sha256_of
from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.checkpoint.manifest import Digest
from t5g2convert.errors import CheckpointError

FOLDER: Final = "checkpoints"
RECORD_FILE: Final = "checkpoint.json"
FORMAT: Final = 1
_COMPLETE: Final = re.compile(r"step-(\d{8,})")


class Record(ConfigSection, extra="forbid"):
    """checkpoint.json.

    Attributes:
        step: Steps that were done.
        settings_sha256: Of the settings of the run.
        objective_sha256: Of those that say what is learnt.
        files: sha256 by name of the other files.
    """

    format: Literal[1] = FORMAT
    step: PositiveInt
    settings_sha256: Digest
    objective_sha256: Digest
    files: dict[str, Digest]


def place_of(run: Path, step: int) -> Path:
    """Where the checkpoint of a step is."""
    return run / FOLDER / f"step-{step:08d}"


def complete(run: Path) -> dict[int, Path]:
    """The complete checkpoints of a run by their steps, the oldest first.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    folder = run / FOLDER
    try:
        names = [item.name for item in folder.iterdir() if item.is_dir()] if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=folder) from None
    found = {int(match[1]): folder / name for name in names if (match := _COMPLETE.fullmatch(name))}
    return dict(sorted(found.items()))


def read_record(folder: Path) -> Record:
    """What a checkpoint says of itself.

    Raises:
        CheckpointError: It has no record, or one that cannot be read, or that is of another step than its name tells.
    """
    path = folder / RECORD_FILE
    return parse_section(Record, read_json_object(path), path)


def check_files(folder: Path, record: Record, *, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a checkpoint with their sha256; `part` of `parts` looks at its share of them.

    The distributed format has no checksums of its own, and its table of contents is a pickle, which must not be opened
    before it is known to be ours.

    Raises:
        CheckpointError: Files are missing, or are not what was written.
    """
    wrong = []
    for name in sorted(record.files)[part::parts]:
        try:
            if sha256_of(folder / name) != record.files[name]:
                wrong.append(f"{name} is not what was written: its sha256 differs")
        except OSError as error:
            wrong.append(f"{name} cannot be read: {error.strerror}")
    if wrong:
        raise CheckpointError(
            f"is damaged: {wrong[0]}",
            where=folder,
            details=wrong,
            hint="remove it: t5g2 adapt --resume then goes on from the one before",
        )
