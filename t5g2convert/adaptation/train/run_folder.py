"""A run's folder: what it is of, run.json, whether another start may go on with it, and what comes after may know."""

import hashlib
import json
import os
import stat
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import ValidatorFunctionWrapHandler, field_validator, model_validator

from t5g2convert.adaptation.train.checkpoint_manifest import (
    CHECKPOINTS_FOLDER,
    complete_checkpoints,
    read_checkpoint_manifest,
)
from t5g2convert.adaptation.train.settings import Settings, differences
from t5g2convert.checkpoint.atomic_write import replace_file
from t5g2convert.checkpoint.digest import sha256_of
from t5g2convert.checkpoint.families.config_section import ConfigSection, parse_section
from t5g2convert.checkpoint.folder import open_checkpoint, read_json_object
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, Digest, encode_json, read_manifest
from t5g2convert.errors import CheckpointError, OutputError, T5g2Error, UsageError
from t5g2convert.version import __version__

RUN_FILE: Final = "run.json"
METRICS_FILE: Final = "metrics.jsonl"
TENSORBOARD_FOLDER: Final = "tensorboard"
PLOT_FILE: Final = "loss.svg"
EXPORT_FOLDER: Final = "model"
FORMAT: Final = 1


def identity(folder: Path) -> str:
    """What tells a model from all others: its manifest's sha256, or one of the sha256 of its config and weights.

    A verification that was recorded in the manifest makes no other model of it. A manifest that has no sha256 of its
    files (`t5g2 convert --no-hash`) would be that of every model of this config.

    Raises:
        CheckpointError: Its files cannot be read.
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
    """run.json.

    Args:
        settings: The run's.
        model: The identity of the model that it starts from.
        model_folder: Where it is.
        data: The identity of the packed data.
        versions: Of the libraries that it was started with.
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
    """What run.json tells.

    Attributes:
        settings: The run's.
        settings_sha256: Of all of them.
        objective_sha256: Of those that say what is learnt.
        model: The identity of the model that is trained.
        model_folder: Where it was.
        data: The identity of the data.
    """

    format: Literal[1] = FORMAT
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
            raise ValueError(f"settings: one{part} was changed after the run wrote them: settings_sha256 does not fit")
        return self

    def facts(self, steps: Sequence[int], tokens: int) -> Mapping[str, Any]:
        """What a manifest tells of the training up to the last of these steps; see `export`."""
        return {
            "steps": steps[-1],
            "checkpoints": list(steps),
            "tokens": tokens,
            "settings": self.settings.to_json(),
            "settings_sha256": self.settings_sha256,
            "data_sha256": self.data,
        }


def read_history(run: Path) -> History:
    """What run.json of a run tells.

    Raises:
        CheckpointError: There is none, or it tells something else.
    """
    if not (run / RUN_FILE).exists():
        raise CheckpointError(f"has no {RUN_FILE}, expected the folder of a training run", where=run)
    path = run / RUN_FILE
    return parse_section(History, read_json_object(path), path)


def check_own_files(run: Path) -> None:
    """Refuse a run's folder in which something else has the place of what a run writes: nothing is written through it.

    Raises:
        OutputError: It is a link, a pipe, a folder in place of a file, or a file in place of a folder.
    """
    expected = {
        RUN_FILE: stat.S_ISREG, METRICS_FILE: stat.S_ISREG, PLOT_FILE: stat.S_ISREG,
        CHECKPOINTS_FOLDER: stat.S_ISDIR, TENSORBOARD_FOLDER: stat.S_ISDIR,
    }  # fmt: skip
    try:
        for name, is_right in expected.items():
            path = run / name
            if os.path.lexists(path) and not is_right(path.lstat().st_mode):
                kind = "folder" if is_right is stat.S_ISDIR else "file"
                raise OutputError(f"is not a {kind} of the run's own", where=path, hint="move it away, and start again")
        for name in (CHECKPOINTS_FOLDER, TENSORBOARD_FOLDER):
            linked = [item for item in (run / name).glob("*") if item.is_symlink()]
            if linked:
                raise OutputError("is a link, which a run has none of", where=linked[0], hint="move it away")
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=run) from None


def check_model(history: History, model: Path) -> None:
    """Refuse another model than the one that was trained, by what it tells of itself.

    Raises:
        CheckpointError: It is another, or was changed since.
    """
    if history.model != identity(model):
        raise CheckpointError(
            "is not the model that was trained", where=model, hint="an export needs that model, as the run found it"
        )


def check_bytes(model: Path, exported: Path) -> None:
    """Refuse an export for which other bytes were read than the model's own manifest tells of, if it has one.

    Raises:
        CheckpointError: They were others.
    """
    if not (model / MANIFEST_FILE).is_file():
        return
    told = read_manifest(model).files
    for name, file in read_manifest(exported).source.files.items():
        expected = told[name].sha256 if name in told else ""
        if expected is not None and file.sha256 != expected:
            raise CheckpointError(
                f"{name} is not what {MANIFEST_FILE} beside it tells of", where=model, hint="it was changed or damaged"
            )


def parts_of_run(run: Path) -> tuple[Path, ...]:
    """What no output may take the place of, in a run's folder; an export or a mean may stand beside them."""
    return tuple(run / name for name in (CHECKPOINTS_FOLDER, TENSORBOARD_FOLDER, RUN_FILE, METRICS_FILE))


def check_vacant(run: Path) -> None:
    """Refuse a folder that has something in it.

    Raises:
        OutputError: It has, or is no folder.
    """
    try:
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            raise OutputError(
                "exists and is not an empty folder", where=run, hint="--resume goes on with a run that stopped"
            )
    except OSError as error:
        raise OutputError(f"cannot be read: {error.strerror}", where=run) from None


def check_same(run: Path, description: Mapping[str, Any]) -> None:
    """Refuse to go on with another run: one of other settings, another model or other data.

    Raises:
        UsageError: The run is another; names what differs.
        CheckpointError: It has no run.json, or one that cannot be read.
    """
    path = run / RUN_FILE
    try:
        found = read_json_object(path)
    except T5g2Error as error:
        raise CheckpointError(f"{error.message}: no run to go on with", where=path) from None
    if found.get("format") != FORMAT or not isinstance(found.get("settings"), dict):
        raise CheckpointError(f"has format {found.get('format')!r}, expected {FORMAT}", where=path)
    wrong = differences(found["settings"], description["settings"])
    for name, what in (("model", "MODEL"), ("data", "DATA")):
        if found.get(name) != description[name]:
            wrong.append(f"{what} {str(found.get(name))[:16]}, now {description[name][:16]}")
    if wrong:
        raise UsageError(
            f"{run}: was started otherwise, so it cannot be resumed: {wrong[0]}",
            hint="give the same settings, or another folder",
        )
    if found.get("settings_sha256") != description["settings_sha256"]:
        raise CheckpointError("its settings_sha256 does not fit its settings", where=path)


def newest(run: Path, settings: Settings) -> tuple[int, Path | None]:
    """The step and the folder of the newest complete checkpoint; 0 and None where there is none yet.

    Raises:
        CheckpointError: It was written with other settings.
    """
    found = complete_checkpoints(run)
    if not found:
        return 0, None
    step, folder = max(found.items())
    record = read_checkpoint_manifest(folder)
    for name, expected in (("settings_sha256", settings.sha256), ("objective_sha256", settings.objective_sha256)):
        if getattr(record, name) != expected:
            raise CheckpointError(f"{name} is {getattr(record, name)[:16]}, the run's is {expected[:16]}", where=folder)
    if record.step != step:
        raise CheckpointError(f"says that it is of step {record.step}", where=folder)
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
