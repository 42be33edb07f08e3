"""The checkpoints of a run: which are complete, and checkpoint.json, which holds the sha256 of every file."""

import os
import re
import stat
from collections.abc import Sequence
from itertools import count
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field, PositiveInt

from t5g2convert.checkpoint.atomic_write import flush_folder
from t5g2convert.checkpoint.families.config_section import ConfigSection, parse_section
from t5g2convert.checkpoint.file_store import sha256_of
from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.checkpoint.manifest_section import Digest
from t5g2convert.errors import CheckpointError, OutputError

CHECKPOINTS_FOLDER: Final = "checkpoints"
CHECKPOINT_FILE: Final = "checkpoint.json"
FORMAT: Final = 2
_COMPLETE: Final = re.compile(r"step-([0-9]{8,18})")

ShardName = Annotated[str, Field(pattern=r"^shard-[0-9]{5}-model-[0-9]{5}-of-[0-9]{5}\.safetensors$")]
"""The name that torch gives a file: the number of the process (from 1), and of its file."""


class CheckpointManifest(ConfigSection, extra="forbid"):
    """checkpoint.json.

    Attributes:
        step: Completed training steps.
        settings_sha256: Hash of all settings of the run.
        objective_sha256: Hash of the settings that define the training objective.
        files: sha256 of every other file, by name.
        interim: Whether it was written between the checkpoints of `--save-every`, to lose little if the run ends.
    """

    format: Literal[2] = FORMAT
    step: PositiveInt
    settings_sha256: Digest
    objective_sha256: Digest
    files: Annotated[dict[ShardName, Digest], Field(min_length=1)]
    interim: bool = False


def checkpoint_path(run: Path, step: int) -> Path:
    """Return the folder of a step's checkpoint."""
    return run / CHECKPOINTS_FOLDER / f"step-{step:08d}"


def complete_checkpoints(run: Path) -> dict[int, Path]:
    """Return the complete checkpoints of a run by step, oldest first.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    folder = run / CHECKPOINTS_FOLDER
    try:
        items = list(folder.iterdir()) if folder.is_dir() else []
        names = [item.name for item in items if item.is_dir() and not item.is_symlink()]
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=folder) from None
    found = {int(match[1]): folder / name for name in names if (match := _COMPLETE.fullmatch(name))}
    return dict(sorted(found.items()))


def set_aside(run: Path, step: int) -> None:
    """Rename the checkpoints after a step to `step-00000060.abandoned`, newest first; see `rename_abandoned`.

    They are not read, counted or removed any more. A run that dies in between can go back again.

    Raises:
        CheckpointError: The folder cannot be read.
        OutputError: They cannot be renamed.
    """
    for made, folder in reversed(complete_checkpoints(run).items()):
        if made <= step:
            return
        rename_abandoned(folder)


def rename_abandoned(folder: Path) -> None:
    """Rename a folder to `NAME.abandoned`, or -2, -3, ... if that exists.

    Raises:
        OutputError: It cannot be renamed.
    """
    names = (f"{folder.name}.abandoned{'' if number == 1 else f'-{number}'}" for number in count(1))
    try:
        folder.rename(next(path for path in map(folder.with_name, names) if not os.path.lexists(path)))
        flush_folder(folder.parent)
    except OSError as error:
        raise OutputError(f"cannot be renamed: {error.strerror}", where=folder) from error


def regular_checkpoints(run: Path) -> dict[int, Path]:
    """Return the complete checkpoints of `--save-every` by step, oldest first, including unreadable ones.

    Raises:
        CheckpointError: The folder cannot be read.
    """
    return {step: folder for step, folder in complete_checkpoints(run).items() if not _is_interim(folder)}


def _is_interim(folder: Path) -> bool:
    try:
        return read_checkpoint_manifest(folder).interim
    except CheckpointError:
        return False


def read_checkpoint_manifest(folder: Path) -> CheckpointManifest:
    """Read checkpoint.json.

    Raises:
        CheckpointError: It is missing, invalid, or in the format of t5g2convert 0.1.0.
    """
    path = folder / CHECKPOINT_FILE
    document = read_json_object(path)
    if type(document.get("format")) is int and document["format"] == 1:
        raise CheckpointError(
            f"has format 1 (t5g2convert 0.1.0), expected format {FORMAT}",
            where=path,
            hint="finish this run with t5g2convert 0.1.0, or start a new one",
        )
    return parse_section(CheckpointManifest, document, path)


def check_files(folder: Path, manifest: CheckpointManifest, *, part: int = 0, parts: int = 1) -> None:
    """Compare the files of a checkpoint with their sha256; with `parts`, only this part's share of them.

    Raises:
        CheckpointError: A file is missing, unlisted or modified.
    """
    wrong = [f"{name} is not in {CHECKPOINT_FILE}" for name in _names(folder) if name not in manifest.files]
    wrong += _differing(folder, manifest, sorted(manifest.files)[part::parts])
    if wrong:
        raise CheckpointError(
            f"is damaged: {wrong[0]}",
            where=folder,
            details=wrong,
            hint="remove it: t5g2 adapt --resume then continues from the checkpoint before",
        )


def _names(folder: Path) -> list[str]:
    try:
        return sorted(item.name for item in folder.iterdir() if item.name != CHECKPOINT_FILE)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=folder) from None


def _differing(folder: Path, manifest: CheckpointManifest, names: Sequence[str]) -> list[str]:
    wrong = []
    for name in names:
        path = folder / name
        try:
            if not stat.S_ISREG(path.lstat().st_mode):
                wrong.append(f"{name} is a link or not a regular file")
            elif sha256_of(path) != manifest.files[name]:
                wrong.append(f"{name} was modified: its sha256 differs")
        except OSError as error:
            wrong.append(f"{name} cannot be read: {error.strerror}")
    return wrong
