"""What is made of a run's last checkpoint: a model in the published layout that transformers loads whole."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5g2convert.adaptation.export import export
from t5g2convert.adaptation.logs import read_metrics, tokens_until
from t5g2convert.adaptation.models import quiet_transformers, refuse_incomplete
from t5g2convert.adaptation.record import check_files
from t5g2convert.adaptation.run import EXPORT_FOLDER, METRICS_FILE, check_bytes, check_model, read_history
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


def finish(run: Path, checkpoint: Path, model: Path) -> Finished:
    """Export a checkpoint of a run, and see whether it loads in transformers before it appears.

    Args:
        run: The run's folder, in which the export replaces an earlier one.
        checkpoint: The folder of the checkpoint.
        model: The model that was trained.

    Raises:
        CheckpointError: The checkpoint or the model is damaged, the model is not the one that was trained, or what
            came of both does not load.
        OutputError: The output cannot be written.
        VerificationError: Tensors are missing in it, or left over.
    """
    trained, output, log = Trained(checkpoint), run / EXPORT_FOLDER, run / METRICS_FILE
    check_files(checkpoint, trained.record)
    step = trained.record.step
    history = read_history(run)
    check_model(history, model)
    facts = history.facts([step], tokens_until(read_metrics(log), step, log))

    def judge(folder: Path) -> None:
        check_bytes(model, folder)
        check_whole(folder, output)
        check_loads(folder)

    export(model, trained, output, facts=facts, overwrite=True, judge=judge)
    return Finished(output, inspect(output))


def check_whole(folder: Path, output: Path) -> None:
    """See whether a folder has the tensors that its config implies, and no others.

    Args:
        folder: The folder.
        output: What it will be called.

    Raises:
        VerificationError: It has not.
    """
    inspection = inspect(folder)
    if inspection.missing or inspection.unexpected:
        raise VerificationError(
            "would be exported with tensors missing or left over",
            where=output,
            details=[*inspection.missing, *inspection.unexpected],
        )


def check_loads(folder: Path) -> None:
    """Load a folder in transformers, with nothing missing and nothing left over.

    Raises:
        CheckpointError: Something is.
    """
    _, found = quiet_transformers().T5Gemma2ForConditionalGeneration.from_pretrained(
        folder, dtype="auto", output_loading_info=True, local_files_only=True
    )
    refuse_incomplete(found, folder)
