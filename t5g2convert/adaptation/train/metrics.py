"""Metrics of a run: metrics.jsonl with one line per step, the same for TensorBoard, and the plot of the losses."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from t5g2convert.adaptation.train.run_settings import Kind
from t5g2convert.checkpoint.atomic_write import replace_file
from t5g2convert.checkpoint.file_store import regular_file
from t5g2convert.errors import CheckpointError, OutputError

LONGEST_LINE: Final = 1 << 16
MAX_BYTES: Final = 1 << 30
"""Largest log: millions of steps."""

HINT: Final = "restore the file, or start a new run"

SMOOTHED: Final = 50
"""Approximate number of points of a line in the plot: each is the mean over a group of steps, weighted by labels."""

Count = Annotated[int, Field(ge=0, lt=2**63)]
TaskName = Annotated[str, Field(max_length=200)]


@dataclass(frozen=True, slots=True)
class Metrics:
    """The metrics of one step.

    Attributes:
        step: Completed steps, including this one.
        kind: What the samples of the step were made from.
        loss: Nats per label.
        tasks: The same by task, for the tasks in this step.
        labels: Number of labels by task.
        grad_norm: Norm of the whole gradient before clipping; None if it was not finite, and no update was made.
        lr: Learning rate.
        tokens: Encoder and decoder tokens, without padding.
        tokens_per_second: Over all processes.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    step: Count
    kind: Kind
    loss: float
    tasks: Mapping[TaskName, float]
    labels: Mapping[TaskName, Count]
    grad_norm: float | None
    lr: float
    tokens: Count
    tokens_per_second: float

    @property
    def line(self) -> str:
        """One line for the terminal."""
        tasks = ", ".join(f"{name} {loss:.3f}" for name, loss in self.tasks.items())
        norm = "not finite, no update" if self.grad_norm is None else f"{self.grad_norm:.3f}"
        return (
            f"step {self.step}  loss {self.loss:.4f}  ({tasks})  grad norm {norm}  "
            f"lr {self.lr:.2e}  {self.tokens_per_second:,.0f} tokens/s"
        )


_METRICS: Final = TypeAdapter(Metrics)


class Log:
    """Writer of metrics.jsonl, one write per line, and of a TensorBoard folder.

    Args:
        metrics: The file; lines after step `start` are cut off.
        tensorboard: The folder; its events after that step are purged.
        start: Steps completed before.
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
        """Append a step.

        Raises:
            OutputError: It cannot be written.
        """
        data = (json.dumps(asdict(step)) + "\n").encode()
        try:
            if os.write(self._fd, data) != len(data):
                raise OutputError("was written in part: the disk is full", where=self._path)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=self._path) from error
        scalars = {"loss": step.loss, "lr": step.lr}
        scalars |= {} if step.grad_norm is None else {"grad norm": step.grad_norm}
        scalars |= {"tokens a second": step.tokens_per_second, "labels": sum(step.labels.values())}
        scalars |= {f"task/{name}": loss for name, loss in step.tasks.items()}
        self.add_scalars(scalars, step.step)

    def add_scalars(self, scalars: Mapping[str, float], step: int) -> None:
        """Add values of a step to the TensorBoard folder."""
        for name, value in scalars.items():
            self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Wait until all lines are on disk: a checkpoint must not outlive the log of its steps.

        Raises:
            OutputError: It fails.
        """
        try:
            os.fsync(self._fd)
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=self._path) from error

    def close(self) -> None:
        """Close both."""
        self._board.close()
        os.close(self._fd)


@contextmanager
def open_log(metrics: Path, tensorboard: Path, *, start: int) -> Iterator[Log]:
    """Open a log as a context manager."""
    log = Log(metrics, tensorboard, start=start)
    try:
        yield log
    finally:
        log.close()


def read_metrics(path: Path) -> list[Metrics]:
    """Read all steps of metrics.jsonl.

    Raises:
        CheckpointError: The file is missing or too large, or a line is not valid.
    """
    return [_parse(line, number, path) for number, line in enumerate(log_lines(path), 1)]


def log_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a log with their line ends, each at most `LONGEST_LINE` long.

    Raises:
        CheckpointError: The file is missing, too large, or not a regular file.
    """
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


def _parse(line: bytes, number: int, path: Path) -> Metrics:
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
    """Return the number of tokens read up to and including a step.

    Args:
        steps: The log.
        last: The step.
        where: The log's file, for errors.

    Raises:
        CheckpointError: The log has no line for one of the steps.
    """
    counts = {step.step: step.tokens for step in steps}
    missing = next((step for step in range(1, last + 1) if step not in counts), None)
    if missing is not None:
        raise CheckpointError(f"has no line for step {missing}", where=where)
    return sum(count for step, count in counts.items() if step <= last)


def truncate(path: Path, step: int) -> None:
    """Cut a log after the line of a step: a run that resumes from there logs the following steps again.

    The file is replaced, not changed in place, so that neither a link nor another name of the same file is written
    through.

    Raises:
        CheckpointError: A line before that step is not valid.
        OSError: It cannot be written.
    """
    if not os.path.lexists(path):
        return
    kept: list[bytes] = []
    for number, line in enumerate(log_lines(path) if step else (), 1):
        if not line.endswith(b"\n"):
            break  # the line that was being written when the run died
        found = _parse(line, number, path)
        if found.step > step:
            break
        kept.append(line)
        if found.step == step:
            break  # the lines after it are logged again
    replace_file(path, b"".join(kept))


def plot_losses(steps: Sequence[Metrics], path: Path, *, held_out: Sequence[tuple[int, float]] = ()) -> None:
    """Draw the loss of each task over the steps as SVG; the same numbers give the same bytes.

    Args:
        steps: The log.
        path: The file.
        held_out: Steps and their held-out losses, drawn as one more line.

    Raises:
        OutputError: It cannot be written.
    """
    import matplotlib
    from matplotlib.figure import Figure

    # Without a salt the element ids are random, and without a fixed date the file has today's.
    with matplotlib.rc_context(
        {"svg.hashsalt": "t5g2", "svg.fonttype": "none", "font.family": ["sans-serif"], "text.parse_math": False}
    ):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        axes = figure.subplots()
        for name in dict.fromkeys(name for step in steps for name in step.tasks):
            axes.plot(*_smoothed(steps, name), label=name, linewidth=1.5)
        if held_out:
            axes.plot(*zip(*held_out, strict=True), label="held out", color="black", linewidth=1.5, linestyle="dashed")
        axes.set(xlabel="step", ylabel="loss, nats for each label")
        axes.grid(alpha=0.3)
        if steps:
            axes.legend(frameon=False, ncols=2)
        try:
            drawn = BytesIO()
            figure.savefig(drawn, format="svg", metadata={"Date": None})
            replace_file(path, drawn.getvalue())
        except OSError as error:
            raise OutputError(f"cannot be written: {error.strerror}", where=path) from error


def _smoothed(steps: Sequence[Metrics], name: str) -> tuple[list[float], list[float]]:
    """Return the mean step of each group of steps, and the task's mean loss in it."""
    size = max(1, len(steps) // SMOOTHED)
    places, means = [], []
    for start in range(0, len(steps), size):
        group = [step for step in steps[start : start + size] if name in step.tasks]
        labels = sum(step.labels[name] for step in group)
        if labels:
            places.append(sum(step.step for step in group) / len(group))
            means.append(sum(step.tasks[name] * step.labels[name] for step in group) / labels)
    return places, means
