"""What is made of a run's last checkpoint: a model in the published layout that transformers loads whole."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5g2convert.adaptation.export import export
from t5g2convert.adaptation.logs import Metrics
from t5g2convert.adaptation.models import quiet_transformers, refuse_incomplete
from t5g2convert.adaptation.settings import Settings
from t5g2convert.adaptation.trained import Trained
from t5g2convert.errors import VerificationError
from t5g2convert.mapping.inspection import Inspection, inspect


@dataclass(frozen=True, slots=True)
class Finished:
    """A model that was exported.

    Attributes:
        output: Its folder.
        inspection: What it is, by its config and headers.
    """

    output: Path
    inspection: Inspection

    def to_json(self) -> dict[str, Any]:
        """As `t5g2 adapt --json` tells of it."""
        return {"output": str(self.output), "parameters": dict(self.inspection.parameters)}


def finish(
    checkpoint: Path,
    model: Path,
    output: Path,
    *,
    settings: Settings,
    data_sha256: str,
    steps: Sequence[Metrics],
) -> Finished:
    """Export a checkpoint, and see whether it loads in transformers before it appears.

    Args:
        checkpoint: The folder of the checkpoint.
        model: The model that was trained.
        output: The folder to write; an earlier one is replaced.
        settings: The run's.
        data_sha256: The identity of its data.
        steps: The log.

    Raises:
        CheckpointError: The checkpoint is damaged, or does not load.
        OutputError: The output cannot be written.
        VerificationError: Tensors are missing in it, or left over.
    """
    trained = Trained(checkpoint)
    facts = {
        "steps": trained.step,
        "checkpoints": [trained.step],
        "tokens": sum(step.tokens for step in steps),
        "objective": settings.to_json()["mixture"]["tasks"],
        "settings_sha256": settings.sha256,
        "data_sha256": data_sha256,
        "kd_parent": settings.teacher,
    }
    export(model, trained, output, facts=facts, overwrite=True, judge=check_loads)
    inspection = inspect(output)
    if inspection.missing or inspection.unexpected:
        raise VerificationError(
            "was exported with tensors missing or left over",
            where=output,
            details=[*inspection.missing, *inspection.unexpected],
        )
    return Finished(output, inspection)


def check_loads(folder: Path) -> None:
    """Load a folder in transformers, with nothing missing and nothing left over.

    Raises:
        CheckpointError: Something is.
    """
    _, found = quiet_transformers().T5Gemma2ForConditionalGeneration.from_pretrained(
        folder, dtype="auto", output_loading_info=True, local_files_only=True
    )
    refuse_incomplete(found, folder)
