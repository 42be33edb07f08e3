"""Resuming: where a run starts, from which checkpoint, and which settings change there."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from t5g2convert.adaptation.train import checkpoints
from t5g2convert.adaptation.train.checkpoint_manifest import check_files, read_checkpoint_manifest
from t5g2convert.adaptation.train.history import check_same, newest, read_history
from t5g2convert.adaptation.train.run_folder import check_own_files, check_vacant
from t5g2convert.adaptation.train.schedule import Leg
from t5g2convert.adaptation.train.settings import Settings, differences

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
    """

    step: int = 0
    folder: Path | None = None
    earlier: tuple[Leg, ...] = ()
    changes: tuple[str, ...] = ()
    is_new_leg: bool = False


def find_start(
    engine: "Fabric", run: Path, settings: Settings, description: Mapping[str, Any], *, resumes: bool, change: bool
) -> Start:
    """Return where a run starts, after all checks of its folder.

    Args:
        engine: Fabric, launched.
        run: The run's folder.
        settings: The run's settings.
        description: From `describe`.
        resumes: Whether there is a run to resume.
        change: Whether settings may change when it resumes.

    Raises:
        CheckpointError: run.json or the newest checkpoint is not valid or damaged.
        OutputError: The folder is not empty, or holds links in place of the run's files.
        UsageError: The model, the data, or settings that may not change differ.
    """
    if not resumes:
        if engine.global_rank == 0:
            check_vacant(run)
        return Start()
    check_own_files(run)
    earlier = check_same(run, description, change=change)
    history = read_history(run)
    changes = differences(history.settings.to_json(), settings.to_json())
    if engine.global_rank == 0:
        checkpoints.clear_partial(run)
    start, folder = newest(run, settings, earlier)
    if folder is not None:
        manifest = read_checkpoint_manifest(folder)
        check_files(folder, manifest, part=engine.global_rank, parts=engine.world_size)
    return Start(start, folder, earlier, tuple(changes), is_new_leg=bool(changes) or earlier != history.legs)
