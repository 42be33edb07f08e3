"""Resuming: where a run starts, from which checkpoint, and which settings change there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5g2convert.adaptation.train import checkpoints
from t5g2convert.adaptation.train.checkpoint_manifest import (
    check_files,
    complete_checkpoints,
    read_checkpoint_manifest,
    rename_abandoned,
    set_aside,
)
from t5g2convert.adaptation.train.history import check_same, newest, read_history
from t5g2convert.adaptation.train.metrics import read_metrics, tokens_until, truncate
from t5g2convert.adaptation.train.run_folder import (
    ADAPTER_FOLDER,
    EXPORT_FOLDER,
    METRICS_FILE,
    check_own_files,
    check_vacant,
)
from t5g2convert.adaptation.train.run_settings import RunSettings, differences
from t5g2convert.adaptation.train.schedule import Leg
from t5g2convert.checkpoint.file_names import ADAPTER_RECORD
from t5g2convert.checkpoint.manifest import MANIFEST_FILE
from t5g2convert.errors import OutputError, UsageError

if TYPE_CHECKING:
    from lightning_fabric import Fabric


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run starts.

    Attributes:
        step: Completed steps.
        folder: The checkpoint to resume from.
        earlier: The legs before the settings of this start.
        changes: The settings that change, with both values.
        is_new_leg: Whether run.json must name other legs or settings than it does.
        goes_back: Whether newer checkpoints are set aside.
        returned: The step that the run last went back to, for run.json.
    """

    step: int = 0
    folder: Path | None = None
    earlier: tuple[Leg, ...] = ()
    changes: tuple[str, ...] = ()
    is_new_leg: bool = False
    goes_back: bool = False
    returned: int | None = None


def find_start(
    engine: "Fabric",
    run: Path,
    settings: RunSettings,
    description: Mapping[str, Any],
    *,
    resumes: bool,
    change: bool,
    back_to: int | None = None,
) -> Start:
    """Return where a run starts, after all checks of its folder.

    A run goes back to a step once: the same command with the same settings then continues from the newest checkpoint,
    so that a job that is started again loses nothing.

    Args:
        engine: Fabric, launched.
        run: The run's folder.
        settings: The run's settings.
        description: From `describe`.
        resumes: Whether there is a run to resume.
        change: Whether settings may change when it resumes.
        back_to: The step of the checkpoint to resume from; None for the newest.

    Raises:
        CheckpointError: run.json, the log or the newest checkpoint is not valid or damaged.
        OutputError: The folder is not empty, or holds links in place of the run's files.
        UsageError: The model, the data, or settings that may not change differ, or there is no such checkpoint.
    """
    if not resumes:
        if back_to is not None:
            raise UsageError(f"--from {back_to}: there is no run to resume in {run}")
        if engine.global_rank == 0:
            check_vacant(run)
        return Start()
    check_own_files(run)
    if back_to is not None:
        before = read_history(run)
        if before.returned == back_to and not differences(before.settings.to_json(), settings.to_json()):
            back_to = None
    found = complete_checkpoints(run)
    if back_to is not None and back_to not in found:
        kept = ", ".join(map(str, found)) or "none"
        raise UsageError(f"--from {back_to}: {run} has no checkpoint of that step; it has {kept}")
    earlier = check_same(run, description, change=change, made=back_to)
    history = read_history(run)
    changes = differences(history.settings.to_json(), settings.to_json())
    if engine.global_rank == 0:
        checkpoints.clear_partial(run)
    start, folder = newest(run, settings, earlier, until=back_to)
    if folder is not None:
        manifest = read_checkpoint_manifest(folder)
        check_files(folder, manifest, part=engine.global_rank, parts=engine.world_size)
        if engine.global_rank == 0:
            # An export needs the log of all steps: refused now, not at the end.
            tokens_until(read_metrics(run / METRICS_FILE), start, run / METRICS_FILE)
    returned = back_to or history.returned
    return Start(
        start,
        folder,
        earlier,
        tuple(changes),
        is_new_leg=bool(changes) or (earlier, returned) != (history.legs, history.returned),
        goes_back=back_to is not None,
        returned=returned,
    )


def go_back(run: Path, step: int) -> None:
    """Set newer checkpoints and the model or adapter that was exported from one aside, and cut the log after a step.

    Raises:
        OutputError: It cannot be done.
    """
    set_aside(run, step)
    for exported, record in ((EXPORT_FOLDER, MANIFEST_FILE), (ADAPTER_FOLDER, ADAPTER_RECORD)):
        if (run / exported / record).is_file():
            rename_abandoned(run / exported)
    try:
        truncate(run / METRICS_FILE, step)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=run / METRICS_FILE) from error
