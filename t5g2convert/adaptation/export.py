"""What is made of a run's last checkpoint: a model in the published layout that transformers loads whole."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5g2convert.adaptation.train.checkpoint_manifest import check_files
from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from t5g2convert.adaptation.train.metrics import read_metrics, tokens_until
from t5g2convert.adaptation.train.model import quiet_transformers, refuse_incomplete
from t5g2convert.adaptation.train.run_folder import EXPORT_FOLDER, METRICS_FILE, check_bytes, check_model, read_history
from t5g2convert.adaptation.trained_export import export
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest
from t5g2convert.conversion.write.output_path import check_vacant
from t5g2convert.conversion.write.ownership import is_intact, manifest_listing
from t5g2convert.errors import CheckpointError, OutputError, VerificationError
from t5g2convert.mapping.inspection import Inspection, inspect


@dataclass(frozen=True, slots=True)
class Finished:
    """A model that was exported.

    Attributes:
        output: Its folder.
        inspection: What it is, by its config and headers.
        before: Whether an earlier run had exported it, and nothing was written now.
    """

    output: Path
    inspection: Inspection
    before: bool = False

    def to_json(self) -> dict[str, Any]:
        """As `t5g2 adapt --json` tells of it."""
        before = {"exported_before": True} if self.before else {}
        return {"output": str(self.output), "parameters": dict(self.inspection.parameters), **before}


def finish(run: Path, checkpoint: Path, model: Path) -> Finished:
    """Export a checkpoint of a run, and see whether it loads in transformers before it appears.

    Where this very checkpoint was exported before, nothing is written: people may have put files there.

    Args:
        run: The run's folder, in which the export replaces an earlier one of this run, if nothing else is in it.
        checkpoint: The folder of the checkpoint.
        model: The model that was trained.

    Raises:
        CheckpointError: The checkpoint or the model is damaged, the model is not the one that was trained, or what
            came of both does not load.
        OutputError: The output cannot be written, or something is in its place that is not an export of this run.
        VerificationError: Tensors are missing in it, or left over.
    """
    trained, output, log = CheckpointReader(checkpoint), run / EXPORT_FOLDER, run / METRICS_FILE
    check_files(checkpoint, trained.manifest)
    step = trained.manifest.step
    history = read_history(run)
    check_model(history, model)
    facts = history.facts([step], tokens_until(read_metrics(log), step, log))
    if _is_exported(output, facts):
        return Finished(output, inspect(output), before=True)
    check_export_place(run)

    def judge(folder: Path) -> None:
        check_bytes(model, folder)
        check_whole(folder, output)
        check_loads(folder)

    export(model, trained, output, facts=facts, overwrite=True, judge=judge)
    return Finished(output, inspect(output))


def check_export_place(run: Path) -> None:
    """Refuse to export into a run where something else has the place of the model.

    Raises:
        OutputError: It has, or people's files lie in it; they are named.
    """
    output = run / EXPORT_FOLDER
    if not os.path.lexists(output):
        return
    hint = f"move it away; or t5g2 average {run} OUTPUT --last 1 writes the model elsewhere"
    try:
        check_vacant(output, overwrite=True)
    except OutputError as error:
        error.hint = hint
        raise
    if (output / MANIFEST_FILE).is_file():
        told = read_manifest(output).adaptation
        if told is None or told.settings_sha256 != read_history(run).settings_sha256 or len(told.checkpoints) != 1:
            raise OutputError("is not an export of this run, and is not replaced", where=output, hint=hint)


def _is_exported(output: Path, facts: Mapping[str, Any]) -> bool:
    """Whether a folder is the export of this training at this step, with every file as it was written."""
    try:
        adaptation = read_manifest(output).adaptation
    except CheckpointError:
        return False
    told = {} if adaptation is None else adaptation.document()
    same = json.dumps({key: told.get(key) for key in facts}, sort_keys=True) == json.dumps(facts, sort_keys=True)
    return same and is_intact(output, manifest_listing)


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
