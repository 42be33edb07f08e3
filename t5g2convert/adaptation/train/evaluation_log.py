"""The results of evaluations: which of them is the best, and evaluation.jsonl, which has them all."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from t5g2convert.adaptation.train.metrics import Count, TaskName, log_lines
from t5g2convert.checkpoint.atomic_write import replace_file
from t5g2convert.errors import CheckpointError, OutputError

if TYPE_CHECKING:
    from torch import Tensor

CorpusName = Annotated[str, Field(max_length=4096)]


@dataclass(frozen=True, slots=True)
class Scores:
    """Texts that a model generated, compared with their targets.

    Attributes:
        texts: Number of texts.
        exact: Share of texts that equal their target.
        chrf: chrF of all texts, 0 to 100.
        rouge_l: Mean ROUGE-L (F1) of the texts, 0 to 1.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    texts: Count
    exact: float
    chrf: float
    rouge_l: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """Held-out losses after a step, in nats per label.

    Attributes:
        step: Completed steps.
        tasks: The loss of each task.
        hidden: The loss of each task with the encoder hidden from the decoder.
        labels: Number of labels of each task.
        corpora: The loss of each corpus; empty if there is one.
        generated: What the model generates, compared with the targets; None if nothing was generated.
        data: The sha256 of what was evaluated; empty in files of earlier versions.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    step: Count
    tasks: Mapping[TaskName, float]
    hidden: Mapping[TaskName, float]
    labels: Mapping[TaskName, Count]
    corpora: Mapping[CorpusName, float] = field(default_factory=dict)
    generated: Scores | None = None
    data: str = ""

    @classmethod
    def of_sums(
        cls, step: int, names: Sequence[str], sums: "Tensor", corpora: Mapping[str, float] | None = None
    ) -> Self:
        """Return the mean losses of the tasks that have labels.

        Args:
            step: Completed steps.
            names: The names of the tasks.
            sums: float64 [3, tasks]: losses, losses with the encoder hidden, and numbers of labels.
            corpora: The mean loss of each corpus, if there are several.
        """
        columns = {name: column for name, column in zip(names, sums.T.tolist(), strict=True) if column[2]}
        return cls(
            step,
            {name: visible / count for name, (visible, _, count) in columns.items()},
            {name: hidden / count for name, (_, hidden, count) in columns.items()},
            {name: int(count) for name, (_, _, count) in columns.items()},
            corpora or {},
        )

    @property
    def loss(self) -> float:
        """Mean over all labels."""
        return self._mean(self.tasks)

    @property
    def hidden_loss(self) -> float:
        """Mean over all labels with the encoder hidden."""
        return self._mean(self.hidden)

    @property
    def gain(self) -> float:
        """The loss with the encoder hidden minus the loss with it visible."""
        return self.hidden_loss - self.loss

    def _mean(self, losses: Mapping[str, float]) -> float:
        return sum(losses[name] * count for name, count in self.labels.items()) / sum(self.labels.values())

    @property
    def scalars(self) -> dict[str, float]:
        """Values for TensorBoard."""
        tasks = {f"held out/{name}": loss for name, loss in self.tasks.items()}
        corpora = {f"held out corpus/{name}": loss for name, loss in self.corpora.items()}
        whole = {"held out/loss": self.loss, "held out/loss with the encoder hidden": self.hidden_loss}
        found = self.generated
        scores = {} if found is None else {"exact": found.exact, "chrF": found.chrf, "ROUGE-L": found.rouge_l}
        return {**whole, **tasks, **corpora, **{f"held out/{name}": score for name, score in scores.items()}}

    @property
    def line(self) -> str:
        """One line for the terminal."""
        kinds = [each for each in (self.tasks, self.corpora) if each]
        parts = "; ".join(", ".join(f"{name} {loss:.3f}" for name, loss in kind.items()) for kind in kinds)
        scores = ""
        if (found := self.generated) is not None:
            scores = f"  exact {found.exact:.1%}  chrF {found.chrf:.1f}  ROUGE-L {found.rouge_l:.3f}"
        return (
            f"held out after step {self.step}  loss {self.loss:.4f}  ({parts})  "
            f"with the encoder hidden {self.hidden_loss:.4f}{scores}"
        )


_EVALUATION: Final = TypeAdapter(Evaluation)


Measure = Literal["loss", "exact", "chrf", "rouge-l"]
"""The lowest loss, or the highest score of generated texts; the lower loss decides between equal scores."""


def best_of(evaluations: Sequence[Evaluation], by: Measure = "loss") -> Evaluation | None:
    """Return the best evaluation; the first of equal ones counts, and the one before the first step does not."""
    return min((each for each in evaluations if each.step), key=lambda each: _rank(each, by), default=None)


def _rank(evaluation: Evaluation, by: Measure) -> tuple[float, float]:
    loss = math.inf if math.isnan(evaluation.loss) else evaluation.loss
    if by == "loss":
        return loss, loss
    scores = evaluation.generated
    return math.inf if scores is None else -getattr(scores, by.replace("-", "_")), loss


def read_evaluations(path: Path) -> list[Evaluation]:
    """Read evaluation.jsonl; an absent file has no evaluations.

    Raises:
        CheckpointError: The file is too large or not a regular file, or a line is not valid.
    """
    if not os.path.lexists(path):
        return []
    try:
        return [_EVALUATION.validate_json(line) for line in log_lines(path)]
    except (ValidationError, UnicodeDecodeError):
        raise CheckpointError("has a line that is not an evaluation", where=path, hint="move it away") from None


def write_evaluations(path: Path, evaluations: Sequence[Evaluation]) -> None:
    """Write evaluation.jsonl, one line each.

    Raises:
        OutputError: It cannot be written.
    """
    try:
        replace_file(path, "".join(f"{json.dumps(_document(each))}\n" for each in evaluations).encode())
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=path) from error


def _document(evaluation: Evaluation) -> dict[str, Any]:
    return {name: value for name, value in asdict(evaluation).items() if name != "generated" or value is not None}


def overfitting(evaluations: Sequence[Evaluation]) -> str | None:
    """Return a note where the held-out loss has risen since its lowest value, over at least two evaluations."""
    if not evaluations:
        return None
    lowest = min(evaluations, key=lambda each: each.loss)
    last = evaluations[-1]
    if evaluations.index(lowest) >= len(evaluations) - 2:
        return None
    return (
        f"the held-out loss was lowest after step {lowest.step} ({lowest.loss:.4f}) and is now {last.loss:.4f}: "
        "the model overfits"
    )
