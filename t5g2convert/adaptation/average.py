"""The mean of the last checkpoints of a run, as the paper of T5Gemma 2 ends its training, written as a model.

Every value is summed in float64 over the checkpoints, divided by their count, and rounded once, to the dtype that it is
stored in. A sum of float32 numbers of about one size is exact in float64, so that the mean of checkpoints which are all
the same is that checkpoint, and the order in which they are read plays no part but in the last bit.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from t5g2convert.adaptation.train.checkpoint_manifest import (
    CHECKPOINTS_FOLDER,
    check_files,
    checkpoint_path,
    complete_checkpoints,
)
from t5g2convert.adaptation.train.metrics import read_metrics, tokens_until
from t5g2convert.adaptation.train.run_folder import (
    METRICS_FILE,
    RUN_FILE,
    History,
    check_bytes,
    check_model,
    parts_of_run,
    read_history,
)
from t5g2convert.adaptation.trained_export import export
from t5g2convert.checkpoint.folder import open_checkpoint, some
from t5g2convert.checkpoint.inputs import Folders
from t5g2convert.conversion.convert import Conversion, execute
from t5g2convert.conversion.options import KEEP, Dtype, WriteOptions
from t5g2convert.conversion.trained_model import plan_adapted
from t5g2convert.conversion.write.copy import Progress
from t5g2convert.conversion.write.output_path import check_target
from t5g2convert.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
    from t5g2convert.adaptation.trainer_checkpoints import Saved

LAST: Final = 5
"""Checkpoints that the paper averages."""


def average(
    run: Path,
    last: int,
    output: Path,
    *,
    model: Path | None = None,
    dtype: Dtype = KEEP,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write the mean of the last checkpoints of a run as a model in the published layout.

    Memory holds a few rows of one tensor, in float64, however large the model and however many the checkpoints.

    Args:
        run: The folder of the run; or one with checkpoints of transformers' Trainer (`checkpoint-100`, ...), of which
            the mean is a model without a manifest, trained elsewhere.
        last: How many checkpoints, counted from the last; all must be of the run's settings and objective.
        output: The folder to write. One that is empty is filled, and keeps its mode, owner and place.
        model: The model that was trained, where it is no longer where it was, or Trainer saved the checkpoints.
        dtype: `keep` for the model's own dtypes, or `bfloat16`, `float16` or `float32` for all tensors.
        overwrite: Replace an output of this tool that is there, at the end; nothing else is ever replaced.
        progress: Called with the bytes just written.

    Raises:
        CheckpointError: There are fewer checkpoints; one is damaged, of other settings, another objective, or has
            other tensors; or the model is not the one that was trained.
        OutputError: The output exists or cannot be written.
        UsageError: The number of checkpoints has no meaning.
    """
    if last < 1:
        raise UsageError(f"the mean of {last} checkpoints has no meaning", hint="1 or more")
    if not (run / RUN_FILE).exists() and (saved := _saved(run)):
        return _average_saved(
            run, saved, last, output, model=model, dtype=dtype, overwrite=overwrite, progress=progress
        )
    history, found = read_history(run), complete_checkpoints(run)
    if len(found) < last:
        raise CheckpointError(
            f"has {len(found)} checkpoints, {last} were asked for",
            where=run / CHECKPOINTS_FOLDER,
            hint=f"--last {len(found)} takes all" if found else None,
        )
    model = Path(history.model_folder) if model is None else model
    if not os.path.isdir(model):  # noqa: PTH112 - Path.is_dir raises for names that are too long
        raise UsageError(f"{model} is not there any more", hint="--model says where the model is that was trained")
    check_target(output, model, *parts_of_run(run), overwrite=overwrite)
    check_model(history, model)
    from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader

    checkpoints = [CheckpointReader(folder) for folder in list(found.values())[-last:]]
    _check_alike(run, history, checkpoints)
    steps = [checkpoint.manifest.step for checkpoint in checkpoints]
    log = run / METRICS_FILE
    return export(
        model,
        Mean(checkpoints),
        output,
        facts=history.facts(steps, tokens_until(read_metrics(log), steps[-1], log)),
        dtype=dtype,
        overwrite=overwrite,
        progress=progress,
        judge=lambda folder: check_bytes(model, folder),
    )


def _saved(run: Path) -> dict[int, Path]:
    """What transformers' Trainer saved in a folder."""
    from t5g2convert.adaptation.trainer_checkpoints import saved_checkpoints

    return saved_checkpoints(run)


def _average_saved(
    run: Path,
    found: Mapping[int, Path],
    last: int,
    output: Path,
    *,
    model: Path | None,
    dtype: Dtype,
    overwrite: bool,
    progress: Progress | None,
) -> Conversion:
    """Write the mean of checkpoints that transformers' Trainer saved.

    Nothing tells how they were trained, so the mean has no t5g2.json either: it is a model that was trained elsewhere.

    Raises:
        CheckpointError: There are fewer checkpoints, or one is not of the model.
        OutputError: The output exists or cannot be written.
        UsageError: The model is not given.
    """
    from t5g2convert.adaptation.trainer_checkpoints import Saved

    if len(found) < last:
        raise CheckpointError(
            f"has {len(found)} checkpoints, {last} were asked for", where=run, hint=f"--last {len(found)} takes all"
        )
    if model is None:
        raise UsageError(
            f"{run} has checkpoints of transformers' Trainer, which do not tell what was trained",
            hint="give the T5Gemma 2 that was trained with --model",
        )
    start = open_checkpoint(model)
    check_target(output, model, *found.values(), overwrite=overwrite)
    mean = Mean([Saved(folder, start) for folder in list(found.values())[-last:]])
    return execute(
        plan_adapted(start, mean.names, None, dtype=dtype),
        Folders(model),
        output,
        WriteOptions(overwrite=overwrite, progress=progress),
        given=mean,
    )


class Mean:
    """The mean of checkpoints that have the same tensors."""

    def __init__(self, checkpoints: "Sequence[CheckpointReader | Saved]") -> None:
        self._checkpoints = checkpoints
        self.names: Mapping[str, tuple[int, ...]] = checkpoints[0].names

    def pieces(self, name: str) -> "Iterator[NDArray[np.float64]]":
        """The mean of a tensor, a few rows at a time."""
        import numpy as np

        for blocks in zip(*(checkpoint.pieces(name) for checkpoint in self._checkpoints), strict=True):
            total = np.zeros(blocks[0].shape, np.float64)
            for block in blocks:
                total += block
            total /= len(blocks)
            yield total


def _check_alike(run: Path, history: History, checkpoints: "Sequence[CheckpointReader]") -> None:
    """All are of one training, of one set of tensors, of the steps that their names tell, and undamaged."""
    first = checkpoints[0]
    for checkpoint in checkpoints:
        record = checkpoint.manifest
        for what in ("settings_sha256", "objective_sha256"):
            if getattr(record, what) != getattr(history, what):
                raise CheckpointError(
                    f"has {what} {getattr(record, what)}, the run has {getattr(history, what)}",
                    where=checkpoint.folder,
                    hint="only checkpoints of one training can be averaged",
                )
        if checkpoint.folder != checkpoint_path(run, record.step):
            raise CheckpointError(f"is of step {record.step}, not what its name says", where=checkpoint.folder)
        names = checkpoint.names.keys() ^ first.names.keys()
        names |= {name for name in checkpoint.names if checkpoint.names[name] != first.names.get(name)}
        if names:
            raise CheckpointError(
                f"has not the tensors and shapes of {first.folder.name}: {some(names)}", where=checkpoint.folder
            )
    for checkpoint in checkpoints:
        check_files(checkpoint.folder, checkpoint.manifest)
