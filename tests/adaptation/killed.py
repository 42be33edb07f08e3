"""`t5g2` with a SIGKILL at one moment of the step or the checkpoint of KILLED_AT; KILLED_IN names the moment."""

import os
import signal
import sys
from pathlib import Path
from typing import Any

from t5g2convert.adaptation.train import checkpoints, evaluation, loop
from t5g2convert.adaptation.train.checkpoint_writer import CheckpointWriter
from t5g2convert.cli.main import main

AT = int(os.environ["KILLED_AT"])
STAGED = f".step-{AT:08d}.partial"


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def in_step() -> None:
    """A step has its gradient, and makes no update."""
    update = loop._update

    def update_or_die(engine: Any, state: Any, settings: Any, step: int, *rest: Any, **options: Any) -> Any:
        if step + 1 == AT:
            die()
        return update(engine, state, settings, step, *rest, **options)

    loop._update = update_or_die


def in_files() -> None:
    """A process has written its files, and has not said so."""
    write = CheckpointWriter.write_data

    def write_and_die(self: CheckpointWriter, *rest: Any) -> Any:
        written = write(self, *rest)
        if Path(self.path).name == STAGED:
            die()
        return written

    CheckpointWriter.write_data = write_and_die  # type: ignore[method-assign]


def in_commit() -> None:
    """The worst moment: a checkpoint is written and flushed, but not yet renamed."""
    flush = checkpoints.flush_folder

    def flush_and_die(folder: Path) -> None:
        flush(folder)
        if folder.name == STAGED:
            die()

    checkpoints.flush_folder = flush_and_die


def in_evaluation() -> None:
    """An evaluation is computed, and not yet recorded."""
    call, evaluate, steps = evaluation.Evaluator.__call__, evaluation.evaluate, [0]

    def noted(self: evaluation.Evaluator, step: int) -> Any:
        steps.append(step)
        return call(self, step)

    def evaluate_and_die(*rest: Any, **options: Any) -> Any:
        found = evaluate(*rest, **options)
        if steps[-1] == AT:
            die()
        return found

    evaluation.Evaluator.__call__ = noted  # type: ignore[method-assign]
    evaluation.evaluate = evaluate_and_die


MOMENTS = {"step": in_step, "files": in_files, "commit": in_commit, "evaluation": in_evaluation}

if __name__ == "__main__":
    MOMENTS[os.environ["KILLED_IN"]]()
    main(sys.argv[1:])
