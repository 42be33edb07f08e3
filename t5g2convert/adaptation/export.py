"""Export: trained values in the layout of the model they started from, written and checked before it appears.

Everything except the values comes from the model: names, dtypes, shards and their order, settings, tokenizer. Tensors
that were not trained are copied byte for byte; trained ones are rounded once. The manifest describes the training under
`adaptation`.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from t5g2convert.adaptation.train.checkpoint_manifest import check_files
from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from t5g2convert.adaptation.train.history import check_model, read_history
from t5g2convert.adaptation.train.metrics import read_metrics, tokens_until
from t5g2convert.adaptation.train.run_folder import EXPORT_FOLDER, METRICS_FILE, check_bytes
from t5g2convert.checkpoint.folder import open_checkpoint, some
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest
from t5g2convert.checkpoint.sources import Folders
from t5g2convert.conversion.convert import Conversion, execute
from t5g2convert.conversion.option_values import KEEP
from t5g2convert.conversion.options import Dtype, Judge, WriteOptions
from t5g2convert.conversion.output.ownership import is_intact, manifest_listing
from t5g2convert.conversion.output.path_rules import check_target, check_vacant
from t5g2convert.conversion.trained_model import plan_adapted
from t5g2convert.conversion.write.computed_tensors import TensorValues
from t5g2convert.errors import CheckpointError, OutputError, VerificationError
from t5g2convert.mapping.inspection import Inspection, inspect
from t5g2convert.progress import Progress


class TrainedValues(TensorValues, Protocol):
    """Trained values and the shapes of their tensors: a checkpoint, or the mean of several."""

    @property
    def names(self) -> Mapping[str, tuple[int, ...]]:
        """Shapes by published name."""


def export(
    model: Path,
    values: TrainedValues,
    output: Path,
    *,
    facts: Mapping[str, Any],
    dtype: Dtype = KEEP,
    overwrite: bool = False,
    flush: bool = True,
    progress: Progress | None = None,
    judge: Judge | None = None,
) -> Conversion:
    """Write a model with trained values; the output appears complete, by one rename, or not at all.

    ```python
    export(Path("t5gemma-2"), CheckpointReader(Path("run/checkpoints/step-00010000")), Path("trained"), facts=facts)
    ```

    Args:
        model: The T5Gemma 2 folder that was trained, in the published layout.
        values: The trained values.
        output: The folder to write. An empty folder is filled, and keeps its mode and owner.
        facts: What the manifest records of the training: `steps`, `checkpoints` (the steps averaged, or the one
            exported), `tokens`, `settings` (as in run.json), `settings_sha256` and `data_sha256`. No paths and no
            times, so that the same values give the same bytes.
        dtype: `keep` for the model's own dtypes, or `bfloat16`, `float16` or `float32` for all tensors.
        overwrite: Replace an existing output of this tool at the end; nothing else is ever replaced.
        flush: Wait until all bytes are on disk before the output appears.
        progress: Called with the number of bytes just written.
        judge: Called with the finished folder before the rename; if it raises, no output appears.

    Raises:
        CheckpointError: The model is damaged or in another layout; or a trained tensor is unknown, has another shape,
            belongs to the frozen vision tower, or contains NaN or infinity.
        OutputError: The output exists or cannot be written.
        UsageError: The dtype is unknown.
    """
    check_target(output, model, overwrite=overwrite)
    if not values.names:
        raise CheckpointError("nothing was trained, so nothing can be exported", where=model)
    plan = plan_adapted(open_checkpoint(model), values.names, facts, dtype=dtype)
    options = WriteOptions(overwrite=overwrite, flush=flush, progress=progress, judge=judge)
    return execute(plan, Folders(model), output, options, values=values)


@dataclass(frozen=True, slots=True)
class Exported:
    """The exported model of a run.

    Attributes:
        output: Its folder.
        inspection: Its config and headers.
        before: An earlier start of the run had exported it, and nothing was written now.
    """

    output: Path
    inspection: Inspection
    before: bool = False

    def to_json(self) -> dict[str, Any]:
        """Return the part that `t5g2 adapt --json` prints."""
        before = {"exported_before": True} if self.before else {}
        return {"output": str(self.output), "parameters": dict(self.inspection.parameters), **before}


def export_checkpoint(run: Path, checkpoint: Path, model: Path) -> Exported:
    """Export a checkpoint to RUN/model, which appears only if transformers loads it.

    If this checkpoint was exported before, nothing is written: the folder may hold files of the user by now.

    Args:
        run: The run's folder; an earlier export of this run in it is replaced if it was not modified.
        checkpoint: The checkpoint's folder.
        model: The model that was trained.

    Raises:
        CheckpointError: The checkpoint or the model is damaged, the model is not the trained one, or the
            result does not load.
        OutputError: The output cannot be written, or RUN/model is not an export of this run.
        VerificationError: The result has missing or unexpected tensors.
    """
    values, output, log = CheckpointReader(checkpoint), run / EXPORT_FOLDER, run / METRICS_FILE
    check_files(checkpoint, values.manifest)
    step = values.manifest.step
    history = read_history(run)
    check_model(history, model)
    facts = history.facts([step], tokens_until(read_metrics(log), step, log), model)
    if _is_exported(output, facts):
        return Exported(output, inspect(output), before=True)
    check_export_place(run)

    def judge(folder: Path) -> None:
        check_bytes(model, folder)
        check_whole(folder, output)
        check_loads(folder)

    export(model, values, output, facts=facts, overwrite=True, judge=judge)
    return Exported(output, inspect(output))


def check_export_place(run: Path) -> None:
    """Refuse to export into a run if RUN/model is not an earlier export of it.

    Raises:
        OutputError: RUN/model is something else, or has files of the user in it; they are listed.
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
        found, history = read_manifest(output).adaptation, read_history(run)
        own = {history.settings_sha256, *(leg.settings_sha256 for leg in history.earlier)}
        if found is None or found.settings_sha256 not in own or len(found.checkpoints) != 1:
            raise OutputError("is not an export of this run, and is not replaced", where=output, hint=hint)


def _is_exported(output: Path, facts: Mapping[str, Any]) -> bool:
    """Return whether a folder is the unmodified export of this training at this step."""
    try:
        adaptation = read_manifest(output).adaptation
    except CheckpointError:
        return False
    found = {} if adaptation is None else adaptation.document()
    same = json.dumps({key: found.get(key) for key in facts}, sort_keys=True) == json.dumps(facts, sort_keys=True)
    return same and is_intact(output, manifest_listing)


def check_whole(folder: Path, output: Path) -> None:
    """Refuse a folder if its tensors differ from the tensors that its config implies.

    Args:
        folder: The staged folder.
        output: Its later name, for errors.

    Raises:
        VerificationError: Tensors are missing or unexpected.
    """
    inspection = inspect(folder)
    if inspection.missing or inspection.unexpected:
        raise VerificationError(
            "would be exported with missing or unexpected tensors",
            where=output,
            details=[*inspection.missing, *inspection.unexpected],
        )


def check_loads(folder: Path) -> None:
    """Refuse a folder that transformers does not load completely.

    Raises:
        CheckpointError: Tensors are missing, unexpected or misshapen.
    """
    from t5g2convert.adaptation.train.model import quiet_transformers

    _, found = quiet_transformers().T5Gemma2ForConditionalGeneration.from_pretrained(
        folder, dtype="auto", output_loading_info=True, local_files_only=True
    )
    names = {what: {str(name) for name in found[f"{what}_keys"]} for what in ("missing", "unexpected", "mismatched")}
    if problems := [f"{what}: {some(which)}" for what, which in names.items() if which]:
        raise CheckpointError(f"does not load in transformers: {'; '.join(problems)}", where=folder)
