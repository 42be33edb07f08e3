"""The folder of a training run, as far as what comes after training reads it: `run.json`, and the checkpoints."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import NonNegativeInt

from t5g2convert.checkpoint.config import ConfigSection, parse_section
from t5g2convert.checkpoint.folder import check_folder, read_json_object
from t5g2convert.checkpoint.manifest import Digest
from t5g2convert.errors import CheckpointError

RUN_FILE: Final = "run.json"
CHECKPOINTS: Final = "checkpoints"
_STEP: Final = re.compile(r"step-(\d{8,})")


class TrainedModel(ConfigSection):
    """The model that is trained: its folder, and the sha256 of its weight files and its config by their names."""

    path: str
    files: dict[str, Digest]


class Run(ConfigSection):
    """What `run.json` tells; settings that only the training reads are left alone.

    Attributes:
        model: The model that is trained.
        tokens_per_step: Tokens that a step reads.
        objective: The tasks of the mixture.
        settings_sha256: Of the settings.
        objective_sha256: Of what is trained for.
        data_sha256: Of the data.
        kd_parent: The name of the teacher; None without one.
    """

    format: Literal[1]
    model: TrainedModel
    tokens_per_step: NonNegativeInt
    objective: list[dict[str, Any]]
    settings_sha256: Digest
    objective_sha256: Digest
    data_sha256: Digest
    kd_parent: str | None

    def facts(self, steps: list[int]) -> Mapping[str, Any]:
        """What a manifest tells of the training up to the last of these checkpoints; see `export`."""
        return {
            "steps": steps[-1],
            "checkpoints": steps,
            "tokens": steps[-1] * self.tokens_per_step,
            "objective": self.objective,
            "settings_sha256": self.settings_sha256,
            "data_sha256": self.data_sha256,
            "kd_parent": self.kd_parent,
        }


def read_run(folder: Path) -> Run:
    """What `run.json` of a run tells.

    Raises:
        CheckpointError: There is none, or it tells something else.
    """
    check_folder(folder)
    path = folder / RUN_FILE
    return parse_section(Run, read_json_object(path), path)


def checkpoints_of(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, in the order of their steps.

    Raises:
        CheckpointError: There is no folder of them.
    """
    place = folder / CHECKPOINTS
    check_folder(place)
    try:
        found = {int(match[1]): item for item in place.iterdir() if (match := _STEP.fullmatch(item.name))}
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=place) from None
    return [found[step] for step in sorted(found)]
