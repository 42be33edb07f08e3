"""When and how a run saves its checkpoints: at the end of a step, or in the background while training goes on."""

from concurrent.futures import Future, wait
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Final, cast

import torch

from t5g2convert.adaptation.train import checkpoints
from t5g2convert.adaptation.train.checkpoint_manifest import checkpoint_path
from t5g2convert.adaptation.train.checkpoints import State, bytes_here, writing
from t5g2convert.adaptation.train.distributed import run_on_all_ranks
from t5g2convert.adaptation.train.host_memory import free_memory
from t5g2convert.adaptation.train.run_settings import RunSettings

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

MARGIN: Final = 1.5
"""Free memory that a save in the background needs, as a multiple of the state that this machine holds: the copy of the
state, and the file that torch builds from it."""


class Saver(AbstractContextManager["Saver"]):
    """Saves the checkpoints of a run, one at a time.

    A save in the background is torch's `async_save`: the state is copied to host memory, and a thread writes the copy,
    commits it and removes older checkpoints, all in a process group of its own. A checkpoint is complete as soon as
    that thread has renamed it. The training thread only learns that the save is done, or failed, at the end of a step:
    all processes then call `finish`, because an error must end all of them in the same step.

    As a context manager it waits for the save that runs; its error is raised unless another one ends the run.

    Args:
        engine: Fabric, launched.
        run: The run's folder.
        state: The parameters and the optimizer.
        settings: The run's settings.
        keep: Number of checkpoints of `--save-every` to keep.
        background: Whether to save in the background; None for each time that memory allows it.
    """

    def __init__(
        self, engine: "Fabric", run: Path, state: State, settings: RunSettings, *, keep: int, background: bool | None
    ) -> None:
        self._engine, self._run, self._state, self._settings = engine, run, state, settings
        self._keep, self._background = keep, background
        # The collectives of two threads would mix in one group; and async_save needs one on the CPU.
        self._group = None if background is False else torch.distributed.new_group(backend="gloo")
        self._running: tuple[int, Future[object]] | None = None
        self.last: int | None = None
        """The step of the last checkpoint that was saved, or is being saved."""

    @property
    def is_written(self) -> bool:
        """Whether this process's part in the running save has ended; False if none runs."""
        return self._running is not None and self._running[1].done()

    def save(self, step: int, *, interim: bool, at_once: bool, best: int | None = None) -> None:
        """Save a checkpoint, after the one that is being saved.

        Args:
            step: Completed steps.
            interim: Whether it is an interim checkpoint.
            at_once: Whether to return only when it is complete.
            best: The step of a checkpoint that is not removed, if any.

        Raises:
            OutputError: This checkpoint, or the one before, cannot be written.
        """
        self.finish()
        self.last = step
        engine, run, state, settings, keep = self._engine, self._run, self._state, self._settings, self._keep
        if self._group is None or at_once or not self._may_copy():
            checkpoints.save(engine, run, step, state, settings, keep=keep, interim=interim, best=best)
            return
        saving = checkpoints.save_in_background(
            engine, run, step, state, settings, keep=keep, interim=interim, best=best, group=self._group
        )
        self._running = step, saving

    def finish(self) -> None:
        """Wait for the running save, on all ranks.

        Raises:
            OutputError: It failed.
        """
        if self._running is None:
            return
        (step, saving), self._running = self._running, None
        run_on_all_ranks(self._engine, writing(checkpoint_path(self._run, step), saving.result))

    def _may_copy(self) -> bool:
        """Return whether the state may be copied to host memory: as `background` says, or if every machine has room."""
        if self._background is not None:
            return self._background
        strategy = cast("ModelParallelStrategy", self._engine.strategy)
        here, free = bytes_here(self._state) * strategy.num_processes, free_memory()
        return strategy.reduce_boolean_decision(free is not None and free >= MARGIN * here)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.finish()
        elif self._running is not None:
            # No word with the other processes, which may be gone; the thread's own group fails if they are.
            wait([self._running[1]])
