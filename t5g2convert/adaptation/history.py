"""What a training run tells of itself, for what comes after it: run.json, its checkpoints, its log, and its model."""

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from t5g2convert.checkpoint.config import ConfigSection, parse_section
from t5g2convert.checkpoint.digest import sha256_of
from t5g2convert.checkpoint.folder import check_folder, open_checkpoint, read_json_object
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, SEAL, Digest, encode_json, read_manifest
from t5g2convert.checkpoint.place import regular_file
from t5g2convert.errors import CheckpointError

RUN_FILE: Final = "run.json"
METRICS_FILE: Final = "metrics.jsonl"
CHECKPOINTS: Final = "checkpoints"
_STEP: Final = re.compile(r"step-(\d{8,})")


class _Mixture(ConfigSection):
    tasks: list[dict[str, Any]]


class _Settings(ConfigSection):
    mixture: _Mixture
    teacher: str | None = None


class History(ConfigSection):
    """What run.json tells; settings that only the training reads are left alone.

    Attributes:
        settings: The tasks, and the identity of a teacher.
        settings_sha256: Of all settings.
        objective_sha256: Of those that say what is learnt.
        model: The identity of the model that is trained.
        data: The identity of the data.
    """

    format: Literal[1]
    settings: _Settings
    settings_sha256: Digest
    objective_sha256: Digest
    model: Digest
    data: Digest

    def facts(self, steps: Sequence[int], tokens: int) -> Mapping[str, Any]:
        """What a manifest tells of the training up to the last of these steps; see `export`."""
        return {
            "steps": steps[-1],
            "checkpoints": list(steps),
            "tokens": tokens,
            "objective": self.settings.mixture.tasks,
            "settings_sha256": self.settings_sha256,
            "data_sha256": self.data,
            "kd_parent": self.settings.teacher,
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


def checkpoints_of(run: Path) -> list[Path]:
    """The finished checkpoints of a run, in the order of their steps.

    Raises:
        CheckpointError: There is no folder of them.
    """
    place = run / CHECKPOINTS
    check_folder(place)
    try:
        found = {int(match[1]): item for item in place.iterdir() if (match := _STEP.fullmatch(item.name))}
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=place) from None
    return [found[step] for step in sorted(found)]


def tokens_until(run: Path, last: int) -> int:
    """Tokens that were read up to and with a step, as the log counts them.

    Raises:
        CheckpointError: The log cannot be read, or does not tell of every step.
    """
    path, counts = run / METRICS_FILE, dict[int, int]()
    try:
        with regular_file(path).open(encoding="utf-8") as file:
            for line in file:
                told = json.loads(line)
                counts[int(told["step"])] = int(told["tokens"])
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
    except (ValueError, TypeError, LookupError):
        raise CheckpointError("has a line that is none of a log", where=path) from None
    missing = [step for step in range(1, last + 1) if step not in counts]
    if missing:
        raise CheckpointError(f"does not tell of step {missing[0]}", where=path)
    return sum(count for step, count in counts.items() if step <= last)


def check_model(history: History, model: Path) -> None:
    """Refuse another model than the one that was trained, by what it tells of itself.

    A verification that was recorded in its manifest since then makes no other model of it.

    Raises:
        CheckpointError: It is another, or cannot be read.
    """
    if history.model not in _identities(model):
        raise CheckpointError("is not the model that was trained", where=model, hint=f"see {RUN_FILE} of the run")


def _identities(model: Path) -> set[str]:
    """The sha256 of the manifest, with and without a recorded verification; without one that of the files' sha256."""
    if (model / MANIFEST_FILE).is_file():
        manifest = read_manifest(model)
        unverified = {key: value for key, value in manifest.items() if key not in ("verification", SEAL)}
        return {str(manifest[SEAL]), hashlib.sha256(encode_json(unverified)).hexdigest()}
    files = open_checkpoint(model).files
    try:
        digests = {name: sha256_of(model / name) for name in ["config.json", *sorted(files)]}
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=model) from None
    return {hashlib.sha256(json.dumps(digests, sort_keys=True).encode()).hexdigest()}


def check_bytes(model: Path, exported: Path) -> None:
    """Refuse an export for which other bytes were read than the model's own manifest tells of, if it has one.

    Raises:
        CheckpointError: The model's files are not its manifest's.
    """
    if not (model / MANIFEST_FILE).is_file():
        return
    told = read_manifest(model)["files"]
    for name, facts in read_manifest(exported)["source"]["files"].items():
        expected = told.get(name, {"sha256": ""})["sha256"]
        if expected is not None and facts["sha256"] != expected:
            raise CheckpointError(
                f"{name} is not what {MANIFEST_FILE} beside it tells of", where=model, hint="it was changed or damaged"
            )
