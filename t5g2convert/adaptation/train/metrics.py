"""What a run tells of its steps: one line of JSON each, and the same for TensorBoard."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from t5g2convert.checkpoint.atomic_write import replace_file
from t5g2convert.checkpoint.file_store import regular_file
from t5g2convert.errors import CheckpointError, OutputError

LONGEST_LINE: Final = 1 << 16
MAX_BYTES: Final = 1 << 30
"""Largest log: millions of steps."""

HINT: Final = "restore the file, or begin a new run"

Count = Annotated[int, Field(ge=0, lt=2**63)]
TaskName = Annotated[str, Field(max_length=200)]


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

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    step: Count
    kind: Literal["text", "images"]
    loss: float
    tasks: Mapping[TaskName, float]
    labels: Mapping[TaskName, Count]
    grad_norm: float
    lr: float
    tokens: Count
    tokens_per_second: float

    @property
    def line(self) -> str:
        """For people."""
        tasks = ", ".join(f"{name} {loss:.3f}" for name, loss in self.tasks.items())
        return (
            f"step {self.step}  loss {self.loss:.4f}  ({tasks})  grad norm {self.grad_norm:.3f}  "
            f"lr {self.lr:.2e}  {self.tokens_per_second:,.0f} tokens/s"
        )


_METRICS: Final = TypeAdapter(Metrics)


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
            self._fd = os.open(metrics, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
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
        CheckpointError: It is missing or too large, or a line is not valid.
    """
    return [_parsed(line, number, path) for number, line in enumerate(_lines(path), 1)]


def _lines(path: Path) -> Iterator[bytes]:
    """The lines of a log with their ends, none of them longer than `LONGEST_LINE`."""
    try:
        with regular_file(path).open("rb") as file:
            number = 0
            while line := file.readline(LONGEST_LINE + 1):
                number += 1
                if len(line) > LONGEST_LINE or file.tell() > MAX_BYTES:
                    raise CheckpointError("is too long to be a log", where=f"{path}:{number}")
                yield line
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None


def _parsed(line: bytes, number: int, path: Path) -> Metrics:
    try:
        line.decode()
        step = _METRICS.validate_json(line)
    except UnicodeDecodeError as error:
        reason = f"is not UTF-8: {error.reason} at byte {error.start} of the line"
        raise CheckpointError(reason, where=f"{path}:{number}", hint=HINT) from None
    except ValidationError:
        raise CheckpointError("is not a valid log line", where=f"{path}:{number}", hint=HINT) from None
    if step.tasks.keys() != step.labels.keys():
        raise CheckpointError("is not a valid log line", where=f"{path}:{number}", hint=HINT)
    return step


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
    """Cut a log behind the line of a step: a run that goes on from there tells of the next ones again.

    The file is written anew: neither a link nor another name of the same file is written through.

    Raises:
        CheckpointError: A line before that step is not valid.
        OSError: It cannot be written.
    """
    if not os.path.lexists(path):
        return
    kept: list[bytes] = []
    for number, line in enumerate(_lines(path) if step else (), 1):
        if not line.endswith(b"\n"):
            break  # the line that was being written when the run died
        found = _parsed(line, number, path)
        if found.step > step:
            break
        kept.append(line)
        if found.step == step:
            break  # whatever is behind it is told of again
    replace_file(path, b"".join(kept))
