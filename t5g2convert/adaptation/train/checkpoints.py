"""Checkpoints of a run: folders of distributed tensors under the published names, complete or absent.

::

    RUN/checkpoints/step-00000100/     torch.distributed.checkpoint: model.NAME, optimizer.NAME.exp_avg, ...
                    checkpoint.json    the step, what it belongs to, and the sha256 of every other file
    RUN/checkpoints/.step-00000200.partial/    one that is being written, or was when the run died

Any number of processes reads what another number wrote. Tensors are float32, each name once, trained ones only.
"""

import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as load_distributed
from torch.distributed.checkpoint.state_dict_saver import save as save_distributed

from t5g2convert.adaptation.train.checkpoint_manifest import FOLDER, RECORD_FILE, Record, complete, place_of
from t5g2convert.adaptation.train.dcp import Reader
from t5g2convert.adaptation.train.distributed import together
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.checkpoint.atomic_write import flush_folder, replace_file
from t5g2convert.checkpoint.digest import sha256_of
from t5g2convert.checkpoint.manifest import encode_json
from t5g2convert.errors import CheckpointError, Interrupted, OutputError, T5g2Error

if TYPE_CHECKING:
    from lightning_fabric import Fabric

MOMENTS: Final = ("exp_avg", "exp_avg_sq")
"""What AdamW keeps of a tensor, of its shape; and beside them how often it was trained, `step`."""

Result = TypeVar("Result")

_PARTIAL: Final = re.compile(r"\.step-\d{8,}\.partial")


@dataclass(frozen=True, slots=True)
class State:
    """What a run holds in memory.

    Attributes:
        parameters: Trained parameters by their published names.
        optimizer: That they are trained by.
    """

    parameters: Mapping[str, nn.Parameter]
    optimizer: torch.optim.Optimizer


def save(engine: "Fabric", run: Path, step: int, state: State, settings: Settings, *, keep: int) -> Path:
    """Write a checkpoint beside its place, flush it, put it there by one rename, and remove the oldest beyond `keep`.

    Raises:
        OutputError: It cannot be written; on all processes but the first `Quiet`.
    """
    target = place_of(run, step)
    staged = target.with_name(f".{target.name}.partial")
    first = engine.global_rank == 0

    def begin() -> None:
        clear_partial(run)
        staged.mkdir(parents=True)

    def put_in_place() -> None:
        record = Record(
            step=step, settings_sha256=settings.sha256, objective_sha256=settings.objective_sha256, files=digests
        )
        replace_file(staged / RECORD_FILE, encode_json(record.model_dump()))
        flush_folder(staged)
        staged.rename(target)
        flush_folder(target.parent)
        for old in list(complete(run).values())[:-keep]:
            _remove(old)

    def nothing() -> None:
        """The others wait for the first."""

    together(engine, _writing(target, begin if first else nothing))
    together(engine, _writing(target, lambda: save_distributed(_tree(state), storage_writer=_Writer(staged))))
    digests = _gathered(engine, together(engine, _writing(target, lambda: _digests(staged, engine.global_rank))))
    together(engine, _writing(target, put_in_place if first else nothing))
    return target


def _writing(target: Path, work: Callable[[], Result]) -> Callable[[], Result]:
    """The work, with an error of this tool's where it had one of the disk or of torch."""

    def told() -> Result:
        try:
            return work()
        except CheckpointException as error:
            raise _cause(error, target) from error
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=target) from error

    return told


class _Writer(FileSystemWriter):
    """Torch's writer of a checkpoint folder, whose errors say what the disk said.

    Torch's own stream raises "unexpected pos 704 vs 598" over the error of the disk, and drops that one when it sends
    its error to the other processes.
    """

    def write_data(self, *arguments: Any, **options: Any) -> Any:
        """Write as torch does."""
        try:
            return super().write_data(*arguments, **options)
        except (OSError, RuntimeError) as error:
            behind: BaseException | None = error
            while behind is not None and not (isinstance(behind, OSError) and behind.strerror):
                behind = behind.__cause__ or behind.__context__
            raise behind or error from None


def clear_partial(run: Path) -> None:
    """Remove what a run that died was writing or removing.

    Raises:
        OutputError: It cannot be removed.
    """
    try:
        for item in (run / FOLDER).glob(".step-*"):
            if _PARTIAL.fullmatch(item.name):
                shutil.rmtree(item)
    except OSError as error:
        raise OutputError(f"cannot be removed: {error.strerror}", where=error.filename) from error


def _remove(folder: Path) -> None:
    """Remove a checkpoint, which is complete or away at every moment of it."""
    away = folder.with_name(f".{folder.name}.partial")
    folder.rename(away)
    shutil.rmtree(away)


def load(folder: Path, state: State) -> None:
    """Read a checkpoint into parameters and optimizer, each process its own part.

    Raises:
        CheckpointError: It holds other tensors, or tensors of other shapes; or its table of contents is no such table.
    """
    reader = Reader(folder, beside=frozenset({RECORD_FILE}))
    stored = {
        name: tuple(entry.size)
        for name, entry in reader.read_metadata().state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    _refuse_other_tensors(folder, stored, state)
    tree: dict[str, Any] = {"model": {}, "optimizer": {}}
    for name, parameter in state.parameters.items():
        tree["model"][name] = parameter.detach()
        if f"optimizer.{name}.step" in stored:
            moments: dict[str, Tensor] = {moment: torch.zeros_like(parameter.detach()) for moment in MOMENTS}
            tree["optimizer"][name] = {"step": torch.zeros(()), **moments}
    try:
        load_distributed(tree, storage_reader=reader)
    except CheckpointException as error:
        causes = [wrapped[0] for wrapped in error.failures.values()]
        ours = next((cause for cause in causes if isinstance(cause, T5g2Error)), None)
        first = (str(causes[0]).splitlines() or [""])[0] if causes else ""
        raise ours or CheckpointError(f"cannot be loaded: {first}", where=folder) from None
    for name, moments in tree["optimizer"].items():
        state.optimizer.state[state.parameters[name]] = moments


def _refuse_other_tensors(folder: Path, stored: Mapping[str, tuple[int, ...]], state: State) -> None:
    shapes = {f"model.{name}": tuple(parameter.shape) for name, parameter in state.parameters.items()}
    found = {name: shape for name, shape in stored.items() if name.startswith("model.")}
    if found == shapes:
        return
    wrong = [f"{name} is missing" for name in shapes.keys() - found.keys()]
    wrong += [f"{name} is not trained" for name in found.keys() - shapes.keys()]
    wrong += [
        f"{name} is {found[name]}, expected {shapes[name]}"
        for name in shapes.keys() & found.keys()
        if shapes[name] != found[name]
    ]
    raise CheckpointError(f"is of another model: {sorted(wrong)[0]}", where=folder, details=sorted(wrong))


def _tree(state: State) -> dict[str, Any]:
    """What is saved; a tensor that was not trained yet has no moments."""
    optimizer = {
        name: dict(state.optimizer.state[parameter])
        for name, parameter in state.parameters.items()
        if parameter in state.optimizer.state
    }
    return {
        "model": {name: parameter.detach() for name, parameter in state.parameters.items()},
        "optimizer": optimizer,
    }


def _digests(folder: Path, rank: int) -> dict[str, str]:
    """sha256 of the files that a process wrote; the first wrote the table of contents too."""
    ours = [path for path in sorted(folder.iterdir()) if _writer(path.name) == rank]
    return {path.name: sha256_of(path) for path in ours}


def _gathered(engine: "Fabric", digests: dict[str, str]) -> dict[str, str]:
    """The sha256 of all files, from all processes."""
    if engine.world_size == 1:
        return digests
    everybodys: list[Any] = [None] * engine.world_size
    torch.distributed.all_gather_object(everybodys, digests)
    return {name: digest for each in everybodys for name, digest in sorted(each.items())}


def _writer(name: str) -> int:
    """The process that wrote a file: torch calls them `__RANK_NUMBER.distcp`, and the table `.metadata`."""
    match = re.fullmatch(r"__(\d+)_\d+\.distcp", name)
    return 0 if match is None else int(match[1])


def _cause(error: CheckpointException, target: Path) -> T5g2Error:
    """What torch wrapped up: a disk that failed, or a signal that came meanwhile."""
    causes = [wrapped[0] for wrapped in error.failures.values()]
    stopped = next((cause for cause in causes if isinstance(cause, Interrupted)), None)
    if stopped is not None:
        return stopped
    first = causes[0] if causes else error
    reason = first.strerror if isinstance(first, OSError) and first.strerror else (str(first).splitlines() or [""])[0]
    return OutputError(f"cannot be written: {reason}", where=target)
