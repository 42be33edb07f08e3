"""The folder of a run: run.json, which identifies the run, and the checks before it is resumed or exported."""

import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import ValidatorFunctionWrapHandler, field_validator, model_validator

from t5g2convert.adaptation.train.checkpoint_manifest import (
    CHECKPOINTS_FOLDER,
    complete_checkpoints,
    read_checkpoint_manifest,
)
from t5g2convert.adaptation.train.settings import Settings, differences
from t5g2convert.checkpoint.atomic_write import lock_folder, replace_file
from t5g2convert.checkpoint.families.config_section import ConfigSection, parse_section
from t5g2convert.checkpoint.file_store import sha256_of
from t5g2convert.checkpoint.folder import open_checkpoint, read_json_object
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, Digest, encode_json, read_manifest
from t5g2convert.errors import CheckpointError, OutputError, T5g2Error, UsageError
from t5g2convert.version import __version__

RUN_FILE: Final = "run.json"
METRICS_FILE: Final = "metrics.jsonl"
EVALUATION_FILE: Final = "evaluation.jsonl"
TENSORBOARD_FOLDER: Final = "tensorboard"
PLOT_FILE: Final = "loss.svg"
EXPORT_FOLDER: Final = "model"
LOG_ENDINGS: Final = (".log", ".out", ".err")
"""Endings of the files that batch systems write, often into the folder of the run."""
FORMAT: Final = 2
"""1 read eight texts next to each other for every block of samples (t5g2convert 0.1.0)."""


def identity(folder: Path) -> str:
    """Return the identity of a model: the sha256 of its manifest, or a hash over its config and weights.

    A verification recorded in the manifest does not change the identity. A manifest without sha256 of the files (from
    `t5g2 convert --no-hash`) does not identify a model, so its files are hashed.

    Raises:
        CheckpointError: A file cannot be read.
    """
    manifest = read_manifest(folder) if (folder / MANIFEST_FILE).is_file() else None
    if manifest is not None and manifest.hashed:
        return hashlib.sha256(encode_json(manifest.unverified())).hexdigest()
    checkpoint = open_checkpoint(folder)
    try:
        digests = {name: sha256_of(folder / name) for name in ["config.json", *sorted(checkpoint.files)]}
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=folder) from None
    return hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()


def describe(
    settings: Settings, *, model: str, model_folder: Path, data: str, versions: Mapping[str, str]
) -> dict[str, Any]:
    """Return the document for run.json.

    Args:
        settings: The run's settings.
        model: Identity of the model that it starts from.
        model_folder: Folder of that model.
        data: Identity of the packed data.
        versions: Versions of the libraries at the start.
    """
    return {
        "format": FORMAT,
        "tool": {"name": "t5g2convert", "version": __version__},
        "settings": settings.to_json(),
        "settings_sha256": settings.sha256,
        "objective_sha256": settings.objective_sha256,
        "model": model,
        "model_folder": str(model_folder.resolve()),
        "data": data,
        "versions": dict(versions),
    }


class History(ConfigSection):
    """run.json.

    Attributes:
        settings: The run's settings.
        settings_sha256: sha256 of all settings.
        objective_sha256: sha256 of the settings of the objective.
        model: Identity of the model that is trained.
        model_folder: Folder of that model at the start.
        data: Identity of the data.
    """

    format: Literal[2] = FORMAT
    settings: Settings
    settings_sha256: Digest
    objective_sha256: Digest
    model: Digest
    model_folder: str
    data: Digest

    @field_validator("settings", mode="wrap")
    @classmethod
    def _settings_are_valid(cls, value: Any, handler: ValidatorFunctionWrapHandler) -> Settings:
        try:
            settings: Settings = handler(value)
        except UsageError as error:
            raise ValueError(error.message) from None
        return settings

    @model_validator(mode="after")
    def _settings_are_those_of_the_digest(self) -> Self:
        if self.settings.sha256 != self.settings_sha256:
            part = "" if self.settings.objective_sha256 == self.objective_sha256 else " of the objective"
            raise ValueError(
                f"settings: one{part} was modified after the run wrote them: settings_sha256 does not match"
            )
        return self

    def facts(self, steps: Sequence[int], tokens: int) -> Mapping[str, Any]:
        """Return what a manifest records of the training up to the last of these steps; see `export`."""
        return {
            "steps": steps[-1],
            "checkpoints": list(steps),
            "tokens": tokens,
            "settings": self.settings.to_json(),
            "settings_sha256": self.settings_sha256,
            "data_sha256": self.data,
        }


def read_history(run: Path) -> History:
    """Read run.json.

    Raises:
        CheckpointError: It is missing or not valid.
    """
    if not (run / RUN_FILE).exists():
        raise CheckpointError(f"has no {RUN_FILE}, expected the folder of a training run", where=run)
    path = run / RUN_FILE
    document = read_json_object(path)
    _check_format(document, path)
    return parse_section(History, document, path)


def _check_format(document: Mapping[str, Any], path: Path) -> None:
    found = document.get("format")
    if type(found) is not int or found != FORMAT:
        old = type(found) is int and found == 1
        raise CheckpointError(
            f"has format {found!r}{' (t5g2convert 0.1.0)' if old else ''}, expected {FORMAT}",
            where=path,
            hint="finish this run with t5g2convert 0.1.0, or start a new one" if old else None,
        )


def check_own_files(run: Path) -> None:
    """Refuse a run's folder with links, pipes or other things in place of the run's files: nothing is written through.

    Raises:
        OutputError: A file of the run is not a regular file, or a folder is not a folder.
    """
    expected = {
        RUN_FILE: stat.S_ISREG, METRICS_FILE: stat.S_ISREG, EVALUATION_FILE: stat.S_ISREG, PLOT_FILE: stat.S_ISREG,
        CHECKPOINTS_FOLDER: stat.S_ISDIR, TENSORBOARD_FOLDER: stat.S_ISDIR,
    }  # fmt: skip
    try:
        for name, is_right in expected.items():
            path = run / name
            if os.path.lexists(path) and not is_right(path.lstat().st_mode):
                kind = "folder" if is_right is stat.S_ISDIR else "file"
                raise OutputError(
                    f"is not a {kind} of the run's own", where=path, hint="move it away, then start again"
                )
        for name in (CHECKPOINTS_FOLDER, TENSORBOARD_FOLDER):
            linked = [item for item in (run / name).glob("*") if item.is_symlink()]
            if linked:
                raise OutputError("is a link, but a run contains none", where=linked[0], hint="move it away")
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=run) from None


def check_model(history: History, model: Path) -> None:
    """Refuse a model that is not the one that was trained.

    Raises:
        CheckpointError: It is another model, or was modified since.
    """
    if history.model != identity(model):
        raise CheckpointError(
            "is not the model that was trained", where=model, hint="an export needs that model, unmodified"
        )


def check_bytes(model: Path, exported: Path) -> None:
    """Refuse an export if the bytes read from the model differ from the model's manifest, if it has one.

    Raises:
        CheckpointError: They differ.
    """
    if not (model / MANIFEST_FILE).is_file():
        return
    recorded = read_manifest(model).files
    for name, file in read_manifest(exported).source.files.items():
        expected = recorded[name].sha256 if name in recorded else ""
        if expected is not None and file.sha256 != expected:
            raise CheckpointError(
                f"{name} differs from its sha256 in {MANIFEST_FILE}", where=model, hint="it was modified or damaged"
            )


def parts_of_run(run: Path) -> tuple[Path, ...]:
    """Return the parts of a run's folder that no output may replace."""
    return tuple(
        run / name for name in (CHECKPOINTS_FOLDER, TENSORBOARD_FOLDER, RUN_FILE, METRICS_FILE, EVALUATION_FILE)
    )


def check_vacant(run: Path) -> None:
    """Refuse a folder that is not empty; the log files of a batch system may be there already.

    Raises:
        OutputError: It is not empty, or not a folder.
    """
    try:
        if run.exists() and (not run.is_dir() or any(item.suffix not in LOG_ENDINGS for item in run.iterdir())):
            raise OutputError(
                "exists and is not an empty folder", where=run, hint="--resume continues a run that stopped"
            )
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=run) from None


def check_same(run: Path, description: Mapping[str, Any]) -> None:
    """Refuse to resume a run with other settings, another model or other data.

    Raises:
        UsageError: Something differs; the message names it.
        CheckpointError: run.json is missing or not valid.
    """
    path = run / RUN_FILE
    try:
        found = read_json_object(path)
    except T5g2Error as error:
        raise CheckpointError(f"{error.message}: nothing to resume", where=path) from None
    _check_format(found, path)
    if not isinstance(found.get("settings"), dict):
        raise CheckpointError("has no settings", where=path)
    wrong = differences(found["settings"], description["settings"])
    for name, what in (("model", "MODEL"), ("data", "DATA")):
        if found.get(name) != description[name]:
            wrong.append(f"{what} {str(found.get(name))[:16]}, now {description[name][:16]}")
    if wrong:
        raise UsageError(
            f"{run} cannot be resumed with these options: {wrong[0]}",
            hint="use the options of the first start, or another folder",
        )
    if found.get("settings_sha256") != description["settings_sha256"]:
        raise CheckpointError("settings_sha256 does not match the settings", where=path)


def newest(run: Path, settings: Settings) -> tuple[int, Path | None]:
    """Return the step and the folder of the newest complete checkpoint; 0 and None without one.

    Raises:
        CheckpointError: It was written with other settings.
    """
    found = complete_checkpoints(run)
    if not found:
        return 0, None
    step, folder = max(found.items())
    manifest = read_checkpoint_manifest(folder)
    for name, expected in (("settings_sha256", settings.sha256), ("objective_sha256", settings.objective_sha256)):
        if getattr(manifest, name) != expected:
            raise CheckpointError(
                f"{name} is {getattr(manifest, name)[:16]}, but the run has {expected[:16]}", where=folder
            )
    if manifest.step != step:
        raise CheckpointError(f"is the checkpoint of step {manifest.step}, renamed", where=folder)
    return step, folder


def write_description(run: Path, description: Mapping[str, Any]) -> None:
    """Write run.json.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        replace_file(run / RUN_FILE, encode_json(description))
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=run / RUN_FILE) from error


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold a run's folder, made if there is none, for as long as the block runs; what stayed empty is removed then.

    The lock is on the folder itself and goes with the process that holds it, or with the last of its data workers. It
    is seen on other machines too, if their file system has locks.

    Raises:
        OutputError: Another process holds it, or it is no folder that can be made and locked.
    """
    made: list[Path] = []
    try:
        fd = _lock(run, made)
    except OSError as error:
        raise OutputError(f"cannot be locked: {error.strerror}", where=run) from error
    try:
        yield
    finally:
        # Removed while it is held: whoever waits for it sees that it is another than the one of that name.
        for folder in made:
            with suppress(OSError):
                folder.rmdir()
        os.close(fd)


def _lock(run: Path, made: list[Path]) -> int:
    while True:
        for folder in (*reversed(run.parents), run):
            if not folder.exists():
                folder.mkdir(exist_ok=True)
                made.insert(0, folder)
        try:
            fd = lock_folder(run)
        except BlockingIOError:
            raise OutputError(
                "another process is training in this folder", where=run, hint="stop it first, or choose another folder"
            ) from None
        if fd is not None:
            return fd
