"""Held-out losses during a run, by task: with the encoder visible to the decoder, and hidden from it.

Their difference is what the encoder is worth. A converted model that was not trained predicts better with the encoder
hidden; a model that has learnt to use its encoder predicts worse.
"""

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Self

import torch
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from torch import Tensor, nn

from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.train.dataset import Batch, Samples, load_batches
from t5g2convert.adaptation.train.distributed import raise_first_error, run_on_all_ranks
from t5g2convert.adaptation.train.metrics import Count, TaskName, log_lines
from t5g2convert.adaptation.train.micro_batches import MicroBatch
from t5g2convert.checkpoint.atomic_write import replace_file
from t5g2convert.errors import CheckpointError, OutputError, T5g2Error

if TYPE_CHECKING:
    from lightning_fabric import Fabric


CorpusName = Annotated[str, Field(max_length=4096)]


@dataclass(frozen=True, slots=True)
class Scores:
    """Texts that a model generated, compared with their targets.

    Attributes:
        texts: Number of texts.
        exact: Share of texts that equal their target.
        chrf: chrF of all texts, 0 to 100.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    texts: Count
    exact: float
    chrf: float


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
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", strict=True)

    step: Count
    tasks: Mapping[TaskName, float]
    hidden: Mapping[TaskName, float]
    labels: Mapping[TaskName, Count]
    corpora: Mapping[CorpusName, float] = field(default_factory=dict)
    generated: Scores | None = None

    @classmethod
    def of_sums(cls, step: int, names: Sequence[str], sums: Tensor, corpora: Mapping[str, float] | None = None) -> Self:
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
        scores = {} if self.generated is None else {"exact": self.generated.exact, "chrF": self.generated.chrf}
        return {**whole, **tasks, **corpora, **{f"held out/{name}": score for name, score in scores.items()}}

    @property
    def line(self) -> str:
        """One line for the terminal."""
        kinds = [each for each in (self.tasks, self.corpora) if each]
        parts = "; ".join(", ".join(f"{name} {loss:.3f}" for name, loss in kind.items()) for kind in kinds)
        scores = "" if (found := self.generated) is None else f"  exact {found.exact:.1%}  chrF {found.chrf:.1f}"
        return (
            f"held out after step {self.step}  loss {self.loss:.4f}  ({parts})  "
            f"with the encoder hidden {self.hidden_loss:.4f}{scores}"
        )


_EVALUATION: Final = TypeAdapter(Evaluation)


@torch.no_grad()
def evaluate(
    engine: "Fabric", module: nn.Module, held_out: Sequence[Samples[Any]], *, loop: LoopConfig, step: int
) -> Evaluation:
    """Compute the held-out losses, each process its share.

    Args:
        engine: Fabric, launched.
        module: The sharded `ModelWithLoss`.
        held_out: Held-out samples, each a run of one step.
        loop: Settings of the loop.
        step: Completed steps.

    Raises:
        T5g2Error: A sample cannot be made; on other ranks than 0, `ReportedElsewhere`.
    """
    names = held_out[0].task_names
    # Losses, losses with the encoder hidden, and labels; float64 holds all counts exactly.
    corpora = list(dict.fromkeys(samples.corpora[0].name for samples in held_out))
    every = torch.zeros(len(corpora), 3, len(names), dtype=torch.float64, device=engine.device)
    module.eval()
    for samples in held_out:
        sums = every[corpora.index(samples.corpora[0].name)]
        for _, batch in held_out_batches(engine, samples, loop):
            for row, seen in zip(sums, (batch, hide_encoder(batch)), strict=False):
                _, losses_T, labels_T = module(seen)
                row += losses_T
            sums[2] += labels_T
    module.train()
    if engine.world_size > 1:
        torch.distributed.all_reduce(every)
    by_corpus = {
        name: float(sums[0].sum() / sums[2].sum()) for name, sums in zip(corpora, every, strict=True) if len(every) > 1
    }
    return Evaluation.of_sums(step, names, every.sum(dim=0), by_corpus)


def held_out_batches(engine: "Fabric", samples: Samples[Any], loop: LoopConfig) -> Iterator[tuple[MicroBatch, Batch]]:
    """Yield this process's batches of held-out samples, each with its micro-batch.

    Raises:
        T5g2Error: A sample cannot be made; on other ranks than 0, `ReportedElsewhere`.
    """
    order = samples.order(loop, rank=engine.global_rank, world=engine.world_size)
    for place, made in load_batches(samples, order, workers=0):
        raise_first_error(engine, made if isinstance(made, T5g2Error) else None)
        assert not isinstance(made, T5g2Error), "raised before"
        yield place, engine.to_device(made)


def hide_encoder(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the same samples with the encoder hidden from the decoder."""
    return {**batch, "attention_mask": torch.zeros_like(batch["attention_mask"])}


@dataclass(frozen=True, slots=True)
class Policy:
    """What evaluations decide.

    Attributes:
        keep_best: Keep the checkpoint of the lowest loss.
        patience: Evaluations without a lower loss that end the run; None for a run to its last step.
    """

    keep_best: bool = False
    patience: int | None = None


NOTHING_DECIDED: Final = Policy()


class Evaluator:
    """Evaluates a run after some of its steps, and keeps all results in evaluation.jsonl.

    Args:
        engine: Fabric, launched.
        module: The sharded `ModelWithLoss`.
        held_out: Held-out samples, each a run of one step; empty for no evaluation.
        loop: Settings of the loop.
        path: The run's evaluation.jsonl.
        start: Steps completed before; later evaluations in the file are dropped.
        report: Called with every evaluation, on rank 0.
        policy: What the evaluations decide.
        generate: Returns the scores of generated texts, on all ranks; None to generate nothing.
    """

    def __init__(
        self,
        engine: "Fabric",
        module: nn.Module,
        held_out: Sequence[Samples[Any]],
        loop: LoopConfig,
        path: Path,
        *,
        start: int,
        report: Callable[[Evaluation], None],
        policy: Policy = NOTHING_DECIDED,
        generate: Callable[[nn.Module], Scores] | None = None,
    ) -> None:
        self._engine, self._module, self._held_out, self._loop = engine, module, held_out, loop
        self._path, self._report, self._policy, self._generate = path, report, policy, generate
        on_rank_0 = engine.global_rank == 0
        before = engine.broadcast(run_on_all_ranks(engine, lambda: read_evaluations(path) if on_rank_0 else []))
        self.evaluations: list[Evaluation] = [each for each in before if each.step <= start]
        if len(self.evaluations) < len(before):
            # Now: a run that dies before its next evaluation must not find those of steps that it went back from.
            run_on_all_ranks(engine, lambda: write_evaluations(path, self.evaluations) if on_rank_0 else None)

    def __call__(self, done: int) -> Mapping[str, float]:
        """Evaluate after so many steps, and return scalars for TensorBoard.

        Return none without held-out data, or if the file has this evaluation from before a run resumed.
        """
        if not self._held_out or any(each.step == done for each in self.evaluations):
            return {}
        found = evaluate(self._engine, self._module, self._held_out, loop=self._loop, step=done)
        if self._generate is not None:
            found = replace(found, generated=self._generate(self._module))
        self.evaluations.append(found)
        if self._engine.global_rank == 0:
            write_evaluations(self._path, self.evaluations)
            self._report(found)
        return found.scalars

    @property
    def best(self) -> int | None:
        """The step of the lowest loss after training began, if its checkpoint is to be kept."""
        best = best_of(self.evaluations) if self._policy.keep_best else None
        return None if best is None else best.step

    @property
    def is_over(self) -> bool:
        """Whether there were as many evaluations without a lower loss as the run waits for."""
        best, patience = best_of(self.evaluations), self._policy.patience
        if best is None or patience is None:
            return False
        return len(self.evaluations) - 1 - self.evaluations.index(best) >= patience


def best_of(evaluations: Sequence[Evaluation]) -> Evaluation | None:
    """Return the evaluation with the lowest loss; the first counts, and the one before the first step does not."""
    return min((each for each in evaluations if each.step), key=lambda each: _rank(each.loss), default=None)


def _rank(loss: float) -> float:
    return math.inf if math.isnan(loss) else loss


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
    document = asdict(evaluation)
    return document if evaluation.generated is not None else {k: v for k, v in document.items() if k != "generated"}


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
