"""run.json, which identifies a run: its model, data and settings, and every change of the settings.

A run that is resumed must have all of them in common with the run that was started.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal, Self

from pydantic import Field, PositiveInt, model_validator

from t5g2convert.adaptation.data.corpora import Corpora
from t5g2convert.adaptation.objectives import AnySettings, read_settings
from t5g2convert.adaptation.train.checkpoint_manifest import complete_checkpoints, read_checkpoint_manifest
from t5g2convert.adaptation.train.run_folder import RUN_FILE
from t5g2convert.adaptation.train.run_settings import RunSettings, differences, step_range
from t5g2convert.adaptation.train.schedule import Leg
from t5g2convert.checkpoint.atomic_write import replace_file
from t5g2convert.checkpoint.families.config_section import ConfigSection, parse_section
from t5g2convert.checkpoint.file_store import sha256_of
from t5g2convert.checkpoint.folder import open_checkpoint, read_json_object
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, encode_json, read_manifest
from t5g2convert.checkpoint.manifest_section import Digest
from t5g2convert.errors import CheckpointError, OutputError, T5g2Error, UsageError
from t5g2convert.version import __version__

FORMAT: Final = 3
"""Format 1 read eight adjacent texts for every block of samples (t5g2convert 0.1.0); in format 2, an image step had as
many documents as a text step has samples."""


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
    settings: RunSettings, *, model: str, model_folder: Path, corpora: Corpora, versions: Mapping[str, str]
) -> dict[str, Any]:
    """Return the document for run.json.

    Args:
        settings: The run's settings.
        model: Identity of the model that it starts from.
        model_folder: Folder of that model.
        corpora: The data.
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
        "data": corpora.sha256,
        "corpora": corpora.to_json(),
        "versions": dict(versions),
    }


class EarlierLeg(ConfigSection, extra="forbid"):
    """The steps of a run until its settings were changed, and the settings until then."""

    until: PositiveInt
    settings: AnySettings
    settings_sha256: Digest


class CorpusRecord(ConfigSection):
    """A corpus of a run: its name in the list, the sha256 of its index, and its weight."""

    data: str
    sha256: Digest
    weight: float


class History(ConfigSection):
    """run.json.

    Attributes:
        settings: The run's settings; after a change, the new ones.
        settings_sha256: sha256 of all settings.
        objective_sha256: sha256 of the settings of the objective.
        model: Identity of the model that is trained.
        model_folder: Folder of that model at the start.
        data: Identity of the data: of all corpora with their shares.
        corpora: The corpora.
        earlier: The steps before each change of the settings.
        returned: The step that the run last went back to, with `--from`; None for never.
    """

    format: Literal[3] = FORMAT
    settings: AnySettings
    settings_sha256: Digest
    objective_sha256: Digest
    model: Digest
    model_folder: str
    data: Digest
    corpora: list[CorpusRecord] = Field(min_length=1)
    earlier: list[EarlierLeg] = Field(default_factory=list)
    returned: PositiveInt | None = None

    @property
    def legs(self) -> tuple[Leg, ...]:
        """The legs before the last change of settings."""
        return tuple(Leg(leg.until, leg.settings) for leg in self.earlier)

    @model_validator(mode="after")
    def _settings_are_those_of_the_digest(self) -> Self:
        if self.settings.sha256 != self.settings_sha256:
            part = "" if self.settings.objective_sha256 == self.objective_sha256 else " of the objective"
            raise ValueError(
                f"settings: one{part} was modified after the run wrote them: settings_sha256 does not match"
            )
        before = 0
        for leg in self.earlier:
            if leg.until <= before:
                raise ValueError(f"earlier: a leg until step {leg.until} follows one until step {before}")
            if leg.settings.sha256 != leg.settings_sha256:
                raise ValueError("earlier: settings were modified after the run wrote them")
            if leg.settings.objective_sha256 != self.objective_sha256:
                raise ValueError("earlier: a leg has another objective")
            before = leg.until
        return self

    def facts(self, steps: Sequence[int], tokens: int, model: Path) -> Mapping[str, Any]:
        """Return what a manifest records of the training of a model up to the last of these steps; see `export`."""
        return {
            "steps": steps[-1],
            "checkpoints": list(steps),
            "tokens": tokens,
            "settings": self.settings.to_json(),
            "settings_sha256": self.settings_sha256,
            "data_sha256": self.data,
            **({"earlier": documents_of(self.legs)} if self.earlier else {}),
            **_made_from(model),
        }


def _made_from(model: Path) -> Mapping[str, Any]:
    """Return the training that a model had, and the adapter that was merged into it, as a manifest records them."""
    if not (model / MANIFEST_FILE).is_file():
        return {}
    found = read_manifest(model)
    sections = {"before": found.adaptation, "merged": found.merged}
    return {name: section.document() for name, section in sections.items() if section is not None}


def documents_of(legs: Sequence[Leg]) -> list[dict[str, Any]]:
    """Return legs as in run.json and in manifests."""
    return [
        {"until": leg.until, "settings": leg.settings.to_json(), "settings_sha256": leg.settings.sha256} for leg in legs
    ]


def settings_at(step: int, settings: RunSettings, earlier: Sequence[Leg]) -> RunSettings:
    """Return the settings with which the checkpoint of a step was made."""
    return next((leg.settings for leg in earlier if step <= leg.until), settings)


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
        old = type(found) is int and 0 < found < FORMAT
        raise CheckpointError(
            f"has format {found!r}, expected {FORMAT}",
            where=path,
            hint="finish this run with the version of t5g2convert that started it, or start a new one" if old else None,
        )


def check_model(history: History, model: Path) -> None:
    """Refuse a model other than the trained one.

    Raises:
        CheckpointError: It is another model, or was modified since.
    """
    if history.model != identity(model):
        raise CheckpointError(
            "is not the model that was trained", where=model, hint="an export needs that model, unmodified"
        )


def check_same(
    run: Path, description: Mapping[str, Any], *, change: bool = False, made: int | None = None
) -> tuple[Leg, ...]:
    """Refuse to resume a run with another model, other data, or settings that may not change.

    Args:
        run: The run's folder.
        description: From `describe`, for the run as it is to be resumed.
        change: Whether settings may change; more steps may always be made, and more data be skipped.
        made: Steps of the checkpoint to resume from; None for the newest.

    Returns:
        The legs before the settings of `description`.

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
    wrong = []
    if found.get("model") != description["model"]:
        wrong.append(f"MODEL {str(found.get('model'))[:16]}, now {description['model'][:16]}")
    if found.get("data") != description["data"]:
        wrong.append(f"DATA {_corpora_text(found)}, now {_corpora_text(description)}")
    changed = differences(found["settings"], description["settings"])
    names = {difference.partition(" ")[0] for difference in changed}
    changeable = {*read_settings(description["settings"]).changeable}
    allowed = names <= changeable and (
        not names or change or _is_more(read_history(run).settings, description["settings"], names)
    )
    if wrong or not allowed:
        fixed = [*wrong, *(text for text in changed if text.partition(" ")[0] not in changeable)]
        raise UsageError(
            f"{run} cannot be resumed with these options: {[*fixed, *changed][0]}",
            hint="use the options of the first start, or another folder"
            if fixed
            else "--change lets it hold from the newest checkpoint on",
        )
    if not changed and found.get("settings_sha256") != description["settings_sha256"]:
        raise CheckpointError("settings_sha256 does not match the settings", where=path)
    made = max(complete_checkpoints(run), default=0) if made is None else made
    if changed and description["settings"]["steps"] < made:
        raise UsageError(f"--steps is {description['settings']['steps']}, but the run has made {made}")
    history = read_history(run)
    _check_skipped(made, history.settings, description["settings"])
    return _legs_until(made, history, description["settings"])


def _is_more(before: RunSettings, now: Mapping[str, Any], names: set[str]) -> bool:
    """Return whether only steps are added, of the run or of those whose data is skipped."""
    more_steps = "steps" not in names or now["steps"] > before.steps
    return names <= {"steps", "skip_steps"} and more_steps and {*before.skip_steps} <= {*now["skip_steps"]}


def _check_skipped(made: int, before: RunSettings, now: Mapping[str, Any]) -> None:
    """Refuse another skip in the steps that were made.

    Raises:
        UsageError: One begins there.
    """
    wrong = [each for each in sorted({*before.skip_steps} ^ {*now["skip_steps"]}) if step_range(each)[0] <= made]
    if wrong:
        raise UsageError(
            f"--skip-steps {wrong[0]} differs, but the run has made {made} steps",
            hint="--from STEP goes back to an earlier checkpoint",
        )


def _corpora_text(document: Mapping[str, Any]) -> str:
    """Return the data of a run in a few words: its sha256, or those of several corpora with their weights."""
    corpora = document.get("corpora")
    if not isinstance(corpora, list) or len(corpora) < 2 or not all(isinstance(corpus, dict) for corpus in corpora):
        return str(document.get("data"))[:16]
    return " + ".join(f"{corpus.get('weight')!r} of {str(corpus.get('sha256'))[:16]}" for corpus in corpora)


def _legs_until(made: int, history: History, settings: Mapping[str, Any]) -> tuple[Leg, ...]:
    """Return the legs of the first `made` steps, before other settings; checkpoints after these steps may be gone."""
    legs = [leg for leg in history.legs if leg.until < made]
    last = settings_at(made, history.settings, history.legs)
    return (*legs, Leg(made, last)) if made and last.to_json() != settings else tuple(legs)


def newest(
    run: Path, settings: RunSettings, earlier: Sequence[Leg] = (), *, until: int | None = None
) -> tuple[int, Path | None]:
    """Return the step and the folder of the newest complete checkpoint; 0 and None without one.

    Args:
        run: The run's folder.
        settings: The run's settings.
        earlier: The legs before them.
        until: The last step that counts; None for all.

    Raises:
        CheckpointError: It was written with other settings.
    """
    found = {step: folder for step, folder in complete_checkpoints(run).items() if until is None or step <= until}
    if not found:
        return 0, None
    step, folder = max(found.items())
    settings = settings_at(step, settings, earlier)
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
