"""What a run tells of its steps: one line of JSON each, and the same for TensorBoard."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from t5g2convert.errors import CheckpointError, OutputError


@dataclass(frozen=True, slots=True)
class Metrics:
    """One step.

    Attributes:
        step: Steps done, this one included.
        kind: What its samples were.
        loss: Nats for each label.
        tasks: The same by task, of those that came in this step.
        labels: Labels by task.
        grad_norm: Of the whole gradient, before it was clipped.
        lr: The learning rate.
        tokens: Tokens of encoder and decoder, padding left out.
        tokens_per_second: The same for each second, of all processes together.
    """

    step: int
    kind: Literal["text", "images"]
    loss: float
    tasks: Mapping[str, float]
    labels: Mapping[str, int]
    grad_norm: float
    lr: float
    tokens: int
    tokens_per_second: float

    @property
    def line(self) -> str:
        """For people."""
        tasks = ", ".join(f"{name} {loss:.3f}" for name, loss in self.tasks.items())
        return (
            f"step {self.step}  loss {self.loss:.4f}  ({tasks})  grad norm {self.grad_norm:.3f}  "
            f"lr {self.lr:.2e}  {self.tokens_per_second:,.0f} tokens/s"
        )


class Log:
    """metrics.jsonl, a line in one write, and a TensorBoard folder.

    Args:
        metrics: The file; what it has after step `start` is cut off.
        tensorboard: The folder; what it has after that step is marked as void.
        start: Steps that were done before.
    """

    def __init__(self, metrics: Path, tensorboard: Path, *, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._path = metrics
        try:
            truncate(metrics, start)
            self._fd = os.open(metrics, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)
            self._board: Any = SummaryWriter(str(tensorboard), purge_step=start + 1)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=metrics) from error

    def add(self, step: Metrics) -> None:
        """Tell of a step.

        Raises:
            OutputError: It cannot be written.
        """
        data = (json.dumps(asdict(step)) + "\n").encode()
        try:
            if os.write(self._fd, data) != len(data):
                raise OutputError("was written in part: the disk is full", where=self._path)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=self._path) from error
        scalars = {"loss": step.loss, "grad norm": step.grad_norm, "lr": step.lr}
        scalars |= {"tokens a second": step.tokens_per_second, "labels": sum(step.labels.values())}
        scalars |= {f"task/{name}": loss for name, loss in step.tasks.items()}
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step.step)

    def flush(self) -> None:
        """Wait until the disk has every line: a checkpoint must not outlive the log of its steps.

        Raises:
            OutputError: It fails.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=self._path) from error

    def close(self) -> None:
        """Write what is left."""
        self._board.close()
        os.close(self._fd)


@contextmanager
def opened(metrics: Path, tensorboard: Path, *, start: int) -> Iterator[Log]:
    """A log as a context."""
    log = Log(metrics, tensorboard, start=start)
    try:
        yield log
    finally:
        log.close()


def read_metrics(path: Path) -> list[Metrics]:
    """All steps of a log.

    Raises:
        CheckpointError: It is missing, or a line is none of a log.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
    result = []
    for number, line in enumerate(lines, 1):
        try:
            result.append(Metrics(**json.loads(line)))
        except (ValueError, TypeError):
            raise CheckpointError("is no line of a log", where=f"{path}:{number}") from None
    return result


def tokens_until(steps: Sequence[Metrics], last: int, where: Path) -> int:
    """Tokens that were read up to and with a step.

    Args:
        steps: A log.
        last: The step.
        where: The log's file, for errors.

    Raises:
        CheckpointError: The log does not tell of every step.
    """
    counts = {step.step: step.tokens for step in steps}
    missing = next((step for step in range(1, last + 1) if step not in counts), None)
    if missing is not None:
        raise CheckpointError(f"does not tell of step {missing}", where=where)
    return sum(count for step, count in counts.items() if step <= last)


def truncate(path: Path, step: int) -> None:
    """Cut a log behind the line of a step: a run that goes on from there tells of the next ones again."""
    if not path.exists():
        return
    kept = 0
    with path.open("r+b") as file:
        for line in file:
            try:
                done = int(json.loads(line)["step"])
            except (ValueError, TypeError, KeyError):
                break  # the line that was being written when the run died
            if done > step or not line.endswith(b"\n"):
                break
            kept += len(line)
        file.truncate(kept)
