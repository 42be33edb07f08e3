"""What the checkpoints of a run say of themselves: which there are, what they belong to, and what their files are."""

import re
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from t5g2convert.checkpoint.digest import sha256_of
from t5g2convert.checkpoint.families.config_section import ConfigSection, parse_section
from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.checkpoint.manifest import Digest
from t5g2convert.errors import CheckpointError

FOLDER: Final = "checkpoints"
RECORD_FILE: Final = "checkpoint.json"
FORMAT: Final = 1
_COMPLETE: Final = re.compile(r"step-([0-9]{8,18})")

TABLE_FILE: Final = ".metadata"
"""The table of contents of a distributed checkpoint."""

FileName = Annotated[str, Field(pattern=r"^(\.metadata|__[0-9]+_[0-9]+\.distcp)$")]
"""What torch calls a file of a distributed checkpoint."""


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
    files: dict[FileName, Digest]

    @model_validator(mode="after")
    def _has_a_table(self) -> Self:
        if TABLE_FILE not in self.files:
            raise ValueError(f"files: {TABLE_FILE} is missing")
        return self


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
        items = list(folder.iterdir()) if folder.is_dir() else []
        names = [item.name for item in items if item.is_dir() and not item.is_symlink()]
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

    The distributed format has no checksums of its own.

    Raises:
        CheckpointError: Files are missing, left over, or are not what was written.
    """
    wrong = [f"{name} is not in {RECORD_FILE}" for name in _names(folder) if name not in record.files]
    wrong += _differing(folder, record, sorted(record.files)[part::parts])
    _refuse(folder, wrong)


def check_table(folder: Path, record: Record) -> None:
    """Compare a checkpoint's table of contents with its sha256, before it is read.

    Raises:
        CheckpointError: It is missing, or is not what was written.
    """
    _refuse(folder, _differing(folder, record, [TABLE_FILE]))


def _names(folder: Path) -> list[str]:
    """The names of all files but the record."""
    try:
        return sorted(item.name for item in folder.iterdir() if item.name != RECORD_FILE)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=folder) from None


def _differing(folder: Path, record: Record, names: Sequence[str]) -> list[str]:
    wrong = []
    for name in names:
        path = folder / name
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                wrong.append(f"{name} is a link or no file")
            elif sha256_of(path) != record.files[name]:
                wrong.append(f"{name} is not what was written: its sha256 differs")
        except OSError as error:
            wrong.append(f"{name} cannot be read: {error.strerror}")
    return wrong


def _refuse(folder: Path, wrong: Sequence[str]) -> None:
    if wrong:
        raise CheckpointError(
            f"is damaged: {wrong[0]}",
            where=folder,
            details=wrong,
            hint="remove it: t5g2 adapt --resume then goes on from the one before",
        )
