"""Averaging: the mean of a run's last checkpoints, written as a model.

T5Gemma 2 averages its last five checkpoints (arXiv 2512.14856). Values are summed in float64 over the checkpoints,
divided by their number and rounded once, to the stored dtype. A float64 sum of float32 values is exact unless
their magnitudes differ widely, so the mean of equal checkpoints is that checkpoint.
"""

import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from t5g2convert.adaptation.export import export
from t5g2convert.adaptation.options import AverageOptions
from t5g2convert.adaptation.train.checkpoint_manifest import (
    CHECKPOINTS_FOLDER,
    check_files,
    checkpoint_path,
    regular_checkpoints,
)
from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from t5g2convert.adaptation.train.history import History, check_model, read_history, settings_at
from t5g2convert.adaptation.train.metrics import read_metrics, tokens_until
from t5g2convert.adaptation.train.run_folder import METRICS_FILE, RUN_FILE, check_bytes, parts_of_run
from t5g2convert.checkpoint.families.registry import expected_tensors
from t5g2convert.checkpoint.families.t5gemma2 import MODEL_TYPE
from t5g2convert.checkpoint.families.t5gemma2_spellings import as_published
from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint, some
from t5g2convert.checkpoint.sources import Folders
from t5g2convert.command_options import takes_options
from t5g2convert.conversion.convert import Conversion, execute
from t5g2convert.conversion.options import WriteOptions
from t5g2convert.conversion.output.path_rules import check_target
from t5g2convert.conversion.trained_model import FROZEN, plan_adapted
from t5g2convert.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from t5g2convert.reference.weights import Weights

PIECE: Final = 1 << 20
"""Elements of a Trainer checkpoint read at once."""

_TRAINER_CHECKPOINT: Final = re.compile(r"checkpoint-(\d+)")


def average_checkpoints(run: Path, output: Path, options: AverageOptions) -> Conversion:
    """Write the mean of the last checkpoints of a run as a model in the published layout.

    Memory holds a few rows of one tensor, whatever the size of the model and the number of checkpoints. `average` is
    the same with the options as keyword arguments:

    ```python
    average(Path("run"), Path("t5gemma-2-averaged"), last=3)
    ```

    Args:
        run: The folder of a run, or of checkpoints of transformers' Trainer (`checkpoint-100`, ...); their mean
            is a model without a manifest. All checkpoints must share the run's settings and objective.
        output: The folder to write. An empty folder is filled, and keeps its mode and owner.
        options: The options of `t5g2 average`.

    Raises:
        CheckpointError: There are too few checkpoints; one is damaged or has other settings or tensors; or the model
            is not the trained one.
        OutputError: The output exists or cannot be written.
        UsageError: The model is needed and was not found.
    """
    last, overwrite = options.last, options.overwrite
    if not (run / RUN_FILE).exists() and (saved := trainer_checkpoints(run)):
        return _average_trainer(run, saved, output, options)
    history, found = read_history(run), regular_checkpoints(run)
    if history.settings.adapter is not None:
        raise UsageError(
            f"{run} trained a LoRA adapter, and the mean of products is not the product of means",
            hint="t5g2 merge MODEL RUN/adapter OUTPUT makes a model of it",
        )
    _check_count(len(found), last, run / CHECKPOINTS_FOLDER)
    model = Path(history.model_folder) if options.model is None else options.model
    if not os.path.isdir(model):  # noqa: PTH112 - Path.is_dir raises for names that are too long
        raise UsageError(f"{model} no longer exists", hint="pass the trained model with --model")
    check_target(output, model, *parts_of_run(run), overwrite=overwrite)
    check_model(history, model)
    checkpoints = [CheckpointReader(folder) for folder in list(found.values())[-last:]]
    _check_alike(run, history, checkpoints)
    steps = [checkpoint.manifest.step for checkpoint in checkpoints]
    log = run / METRICS_FILE
    return export(
        model,
        Mean(checkpoints),
        output,
        facts=history.facts(steps, tokens_until(read_metrics(log), steps[-1], log), model),
        dtype=options.dtype,
        overwrite=overwrite,
        progress=options.progress,
        judge=lambda folder: check_bytes(model, folder),
    )


average = takes_options(AverageOptions)(average_checkpoints)


def _check_count(found: int, last: int, where: Path) -> None:
    if found < last:
        raise CheckpointError(
            f"has {found} checkpoints, but --last is {last}",
            where=where,
            hint=f"--last {found} takes all" if found else None,
        )


def _check_alike(run: Path, history: History, checkpoints: Sequence[CheckpointReader]) -> None:
    """Refuse checkpoints of other runs or steps, with other tensors, or damaged."""
    first = checkpoints[0]
    for checkpoint in checkpoints:
        manifest = checkpoint.manifest
        made_with = settings_at(manifest.step, history.settings, history.legs)
        expected = {"settings_sha256": made_with.sha256, "objective_sha256": made_with.objective_sha256}
        for key, digest in expected.items():
            if getattr(manifest, key) != digest:
                raise CheckpointError(
                    f"has {key} {getattr(manifest, key)}, the run has {digest}",
                    where=checkpoint.folder,
                    hint="only checkpoints of one run can be averaged",
                )
        if checkpoint.folder != checkpoint_path(run, manifest.step):
            raise CheckpointError(f"is the checkpoint of step {manifest.step}, renamed", where=checkpoint.folder)
        names = checkpoint.names.keys() ^ first.names.keys()
        names |= {name for name in checkpoint.names if checkpoint.names[name] != first.names.get(name)}
        if names:
            raise CheckpointError(
                f"differs from {first.folder.name} in its tensors or shapes: {some(names)}", where=checkpoint.folder
            )
    for checkpoint in checkpoints:
        check_files(checkpoint.folder, checkpoint.manifest)


class Mean:
    """The mean of checkpoints with the same tensors."""

    def __init__(self, checkpoints: "Sequence[CheckpointReader | TrainerCheckpoint]") -> None:
        self._checkpoints = checkpoints
        self.names: Mapping[str, tuple[int, ...]] = checkpoints[0].names

    def pieces(self, name: str) -> "Iterator[NDArray[np.float64]]":
        """Compute the mean of a tensor, a few rows at a time."""
        import numpy as np

        for blocks in zip(*(checkpoint.pieces(name) for checkpoint in self._checkpoints), strict=True):
            total = np.zeros(blocks[0].shape, np.float64)
            for block in blocks:
                total += block
            total /= len(blocks)
            yield total


def trainer_checkpoints(run: Path) -> dict[int, Path]:
    """Return the `checkpoint-N` folders that transformers' Trainer saved, by step."""
    if not run.is_dir():
        return {}
    found = {path: _TRAINER_CHECKPOINT.fullmatch(path.name) for path in run.iterdir() if path.is_dir()}
    return dict(sorted((int(name[1]), path) for path, name in found.items() if name is not None))


def _average_trainer(run: Path, found: Mapping[int, Path], output: Path, options: AverageOptions) -> Conversion:
    """Write the mean of Trainer's checkpoints, without a manifest: nothing records how they were trained."""
    model, last = options.model, options.last
    _check_count(len(found), last, run)
    if model is None:
        raise UsageError(
            f"{run} has checkpoints of transformers' Trainer, which do not record what was trained",
            hint="pass the trained T5Gemma 2 with --model",
        )
    start = open_checkpoint(model)
    check_target(output, model, *found.values(), overwrite=options.overwrite)
    mean = Mean([TrainerCheckpoint(folder, start) for folder in list(found.values())[-last:]])
    return execute(
        plan_adapted(start, mean.names, None, dtype=options.dtype),
        Folders(model),
        output,
        WriteOptions(overwrite=options.overwrite, progress=options.progress),
        values=mean,
    )


class TrainerCheckpoint:
    """The values of one checkpoint of transformers' Trainer, which is a complete model folder.

    It holds all tensors, the frozen ones too, in whatever spelling and dtype transformers chose. Trainer's own state
    (optimizer.pt and others) is pickled and never opened.

    Attributes:
        folder: The checkpoint.
        names: Shapes of all tensors outside the vision tower by their published names.

    Args:
        folder: The checkpoint.
        model: The T5Gemma 2 that was trained.

    Raises:
        CheckpointError: The folder is not a T5Gemma 2 with exactly the model's tensors, or its vision tower changed.
    """

    def __init__(self, folder: Path, model: Checkpoint) -> None:
        from t5g2convert.reference.weights import DTYPES, Weights

        self.folder = folder
        raw = open_checkpoint(folder)
        if raw.config.get("model_type") != MODEL_TYPE:
            raise CheckpointError(f"is a {raw.config.get('model_type')}, expected {MODEL_TYPE}", where=folder)
        published = as_published(raw)
        self._weights = Weights(published.checkpoint)
        items = list(expected_tensors(model.config, model.path / "config.json"))
        faults = [f"{name} is not a tensor of the model" for name in (*published.unexpected, *published.heads)]
        for item in items:
            stored = published.checkpoint.tensors.get(item.name)
            if stored is None:
                faults.append(f"{item.name} is missing")
            elif stored.entry.shape != item.shape:
                faults.append(f"{item.name} has shape {list(stored.entry.shape)}, expected {list(item.shape)}")
            elif stored.entry.dtype not in DTYPES:
                faults.append(f"{item.name} has dtype {stored.entry.dtype}, expected one of {', '.join(DTYPES)}")
        if faults:
            message = f"{len(faults)} tensor(s) do not fit {model.name}"
            raise CheckpointError(message, where=folder, details=faults)
        changed = [item.name for item in items if item.part == FROZEN and self._differs(item.name, Weights(model))]
        if changed:
            raise CheckpointError(
                f"the vision tower was trained too, but average keeps it frozen: {some(changed)}",
                where=folder,
                hint=f"t5g2 verify {folder} --source {model.path} shows how far it moved",
            )
        self.names: Mapping[str, tuple[int, ...]] = {item.name: item.shape for item in items if item.part != FROZEN}

    def pieces(self, name: str) -> "Iterator[NDArray[np.float32]]":
        """Read a tensor a piece at a time.

        Raises:
            CheckpointError: A file cannot be read.
        """
        for piece in self._weights.pieces(name, PIECE):
            yield piece.float().numpy()

    def _differs(self, name: str, start: "Weights") -> bool:
        pairs = zip(start.pieces(name, PIECE), self._weights.pieces(name, PIECE), strict=True)
        return any(not bool((before.to(after.dtype) == after).all()) for before, after in pairs)
