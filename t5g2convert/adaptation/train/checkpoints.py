"""Saving and loading checkpoints: safetensors shards by torch.distributed.checkpoint, complete or absent.

::

    RUN/checkpoints/step-00000100/     shard-00001-model-00001-of-00001.safetensors, ... (one set per process)
                    checkpoint.json    the step, hashes of the settings, and the sha256 of every other file
    RUN/checkpoints/.step-00000200.partial/    being written or removed, or left by a run that died

The tensors are `model.NAME` and `optimizer.NAME.{step,exp_avg,exp_avg_sq}`, float32, for trained tensors only and under
their published names. Any number of processes can load what any other number saved.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed
from torch.distributed.tensor import DTensor

from t5g2convert.adaptation.train.checkpoint_manifest import (
    CHECKPOINT_FILE,
    CHECKPOINTS_FOLDER,
    CheckpointManifest,
    checkpoint_path,
    complete_checkpoints,
    read_checkpoint_manifest,
    regular_checkpoints,
)
from t5g2convert.adaptation.train.checkpoint_reader import MODEL, OPTIMIZER, read_shards, shape_of
from t5g2convert.adaptation.train.checkpoint_writer import CheckpointWriter
from t5g2convert.adaptation.train.distributed import run_on_all_ranks
from t5g2convert.adaptation.train.machine_failures import machine_error
from t5g2convert.adaptation.train.run_settings import RunSettings
from t5g2convert.checkpoint.atomic_write import flush_folder, replace_file
from t5g2convert.checkpoint.manifest import encode_json
from t5g2convert.conversion.write.resources import check_space
from t5g2convert.errors import CheckpointError, Interrupted, OutputError, T5g2Error

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MOMENTS: Final = ("exp_avg", "exp_avg_sq")
"""AdamW's state of a tensor, in its shape; `step` is a scalar."""

PARAMETER_BYTES: Final = 3 * torch.float32.itemsize
"""Per trained parameter: its value and both moments."""

FILE_BYTES: Final = 1 << 30
"""Approximate size of a file: torch builds each one in memory before it is written."""

Result = TypeVar("Result")

_PARTIAL: Final = re.compile(r"\.step-\d{8,}\.partial")


@dataclass(frozen=True, slots=True)
class State:
    """The state of a run in memory.

    Attributes:
        parameters: Trained parameters by their published names.
        optimizer: Their optimizer.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer


def save(
    engine: "Fabric",
    run: Path,
    step: int,
    state: State,
    settings: RunSettings,
    *,
    keep: int,
    interim: bool = False,
    best: int | None = None,
) -> Path:
    """Stage a checkpoint, flush it, rename it into place, and remove checkpoints beyond `keep` and older interim ones.

    The checkpoint of step `best` is not removed.

    Raises:
        OutputError: The disk is full or fails; on other ranks than 0, `ReportedElsewhere`.
    """
    writer = _begin(engine, run, step, state, settings, keep=keep, interim=interim, best=best)
    target = checkpoint_path(run, step)
    run_on_all_ranks(engine, writing(target, lambda: save_distributed(_tree(state), storage_writer=writer)))
    return target


def save_in_background(
    engine: "Fabric",
    run: Path,
    step: int,
    state: State,
    settings: RunSettings,
    *,
    keep: int,
    interim: bool,
    best: int | None,
    group: torch.distributed.ProcessGroup,
) -> Future[object]:
    """Copy the state to host memory, and do all else that `save` does in another thread.

    The copy is torch's: a second set of the tensors that this process holds, freed when they are written.

    Args:
        engine: Fabric, launched.
        run: The run's folder.
        step: Completed steps.
        state: What is saved; it may change as soon as this function returns.
        settings: The run's settings.
        keep: Number of checkpoints of `--save-every` to keep.
        interim: Whether the checkpoint is an interim one.
        best: The step of a checkpoint that is not removed, if any.
        group: A process group on the CPU for this alone: two threads cannot share one.

    Returns:
        The save; once it is done the checkpoint is complete. Its error is for `writing`.

    Raises:
        OutputError: The disk has too little space, or the folder cannot be made.
    """
    writer = _begin(engine, run, step, state, settings, keep=keep, interim=interim, best=best)
    return cast(Future[object], async_save(_tree(state), storage_writer=writer, process_group=group))


def _begin(
    engine: "Fabric",
    run: Path,
    step: int,
    state: State,
    settings: RunSettings,
    *,
    keep: int,
    interim: bool,
    best: int | None,
) -> CheckpointWriter:
    """Make room and an empty staged folder, and return the writer that fills and commits it."""
    target = checkpoint_path(run, step)
    staged = target.with_name(f".{target.name}.partial")

    def begin() -> None:
        clear_partial(run)
        _prune(run, keep, best)
        check_space(staged, bytes_of(state))
        staged.mkdir(parents=True)

    def commit(digests: Mapping[str, str]) -> None:
        manifest = CheckpointManifest(
            step=step,
            settings_sha256=settings.sha256,
            objective_sha256=settings.objective_sha256,
            files=dict(digests),
            interim=interim,
        )
        replace_file(staged / CHECKPOINT_FILE, encode_json(manifest.model_dump()))
        flush_folder(staged)
        staged.rename(target)
        flush_folder(target.parent)
        _prune(run, keep, best)

    def wait() -> None:
        """Do nothing: rank 0 works."""

    run_on_all_ranks(engine, writing(target, begin if engine.global_rank == 0 else wait))
    return CheckpointWriter(staged, _file_numbers(_tree(state), FILE_BYTES * engine.world_size), commit)


def writing(target: Path, work: Callable[[], Result]) -> Callable[[], Result]:
    """Return the work with errors of the disk and of torch turned into OutputError."""

    def guarded() -> Result:
        try:
            return work()
        except CheckpointException as error:
            raise _cause(error, target) from error
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=target) from error

    return guarded


def _cause(error: CheckpointException, target: Path) -> T5g2Error:
    """Unwrap torch's error: a signal, or the first failure of the disk or the machine."""
    causes = [wrapped[0] for wrapped in error.failures.values()]
    stopped = next((cause for cause in causes if isinstance(cause, Interrupted)), None)
    if stopped is not None:
        return stopped
    first = causes[0] if causes else error
    own = first if isinstance(first, T5g2Error) else machine_error(first)
    if own is not None:
        return own
    reason = first.strerror if isinstance(first, OSError) and first.strerror else (str(first).splitlines() or [""])[0]
    return OutputError(f"cannot be written: {reason}", where=target)


def _tree(state: State) -> dict[str, dict[str, Any]]:
    """Return what is saved; a tensor that was not trained yet has no moments."""
    parameters, moments = state.parameters, state.optimizer.state
    return {
        "model": {name: parameter.detach() for name, parameter in parameters.items()},
        "optimizer": {name: dict(moments[parameter]) for name, parameter in parameters.items() if parameter in moments},
    }


def _file_numbers(tree: Mapping[str, Mapping[str, Any]], size: int) -> dict[str, int]:
    """Assign each tensor to a file, numbered from 1; `size` is the bytes of a file over all processes."""
    tensors = {MODEL + name: tensor for name, tensor in tree["model"].items()}
    tensors |= {
        f"{OPTIMIZER}{name}.{key}": tensor
        for name, moments in tree["optimizer"].items()
        for key, tensor in moments.items()
    }
    numbers, number, used = {}, 1, 0
    for name, tensor in tensors.items():
        nbytes = tensor.numel() * tensor.element_size()
        if used and used + nbytes > size:
            number, used = number + 1, 0
        numbers[name], used = number, used + nbytes
    return numbers


def clear_partial(run: Path) -> None:
    """Remove what a run that died was writing or removing.

    Raises:
        OutputError: It cannot be removed.
    """
    try:
        for item in (run / CHECKPOINTS_FOLDER).glob(".step-*"):
            if _PARTIAL.fullmatch(item.name):
                shutil.rmtree(item)
    except OSError as error:
        raise OutputError(f"cannot be removed: {error.strerror}", where=error.filename) from error


def bytes_of(state: State) -> int:
    """Return the bytes of a checkpoint."""
    return PARAMETER_BYTES * sum(parameter.numel() for parameter in state.parameters.values())


def bytes_here(state: State) -> int:
    """Return the bytes of this process's part: with `--shard-size`, each group of processes holds everything."""
    held = (
        parameter.to_local() if isinstance(parameter, DTensor) else parameter for parameter in state.parameters.values()
    )
    return PARAMETER_BYTES * sum(part.numel() for part in held)


def _prune(run: Path, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the newest, the best, and the newest `keep` of `--save-every`."""
    found = complete_checkpoints(run)
    kept = {*list(found)[-1:], *list(regular_checkpoints(run))[-keep:], best}
    for step, folder in found.items():
        if step not in kept:
            _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a checkpoint; rename it first, so that it is complete or absent at every moment."""
    away = folder.with_name(f".{folder.name}.partial")
    folder.rename(away)
    shutil.rmtree(away)


def load(folder: Path, state: State) -> None:
    """Load a checkpoint into parameters and optimizer, each process its own part.

    Raises:
        CheckpointError: The checkpoint is invalid, or has other tensors or shapes than the state.
    """
    stored = {name: shape_of(shards) for name, shards in read_shards(folder, read_checkpoint_manifest(folder)).items()}
    _check_tensors(folder, stored, state)
    tree: dict[str, Any] = {"model": {}, "optimizer": {}}
    for name, parameter in state.parameters.items():
        tree["model"][name] = parameter.detach()
        if f"{OPTIMIZER}{name}.step" in stored:
            moments: dict[str, Tensor] = {moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS}
            # The fused AdamW counts steps on the parameter's device.
            tree["optimizer"][name] = {"step": torch.zeros((), device=parameter.device), **moments}
    try:
        load_distributed(tree, storage_reader=HuggingFaceStorageReader(str(folder)))
    except CheckpointException as error:
        causes = [str(wrapped[0]).splitlines() or [""] for wrapped in error.failures.values()]
        raise CheckpointError(f"cannot be loaded: {causes[0][0] if causes else ''}", where=folder) from None
    for name, moments in tree["optimizer"].items():
        state.optimizer.state[state.parameters[name]] = moments


def _check_tensors(folder: Path, stored: Mapping[str, tuple[int, ...]], state: State) -> None:
    """Refuse missing, unknown or misshapen tensors; a checkpoint has all moments of a tensor or none."""
    expected: dict[str, tuple[int, ...]] = {}
    for name, parameter in state.parameters.items():
        shape = tuple(parameter.shape)
        expected[MODEL + name] = shape
        moments = {f"{OPTIMIZER}{name}.step": (), **{f"{OPTIMIZER}{name}.{moment}": shape for moment in MOMENTS}}
        if moments.keys() & stored.keys():
            expected |= moments
    wrong = [f"{name} is missing" for name in expected.keys() - stored.keys()]
    wrong += [f"{name} is not trained" for name in stored.keys() - expected.keys()]
    wrong += [
        f"{name} has shape {stored[name]}, expected {expected[name]}"
        for name in expected.keys() & stored.keys()
        if expected[name] != stored[name]
    ]
    if wrong:
        raise CheckpointError(f"does not fit the model: {sorted(wrong)[0]}", where=folder, details=sorted(wrong))
