"""What a training run is asked for, what is done while it trains, and what it gives."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import nn

from t5g2convert.adaptation.adapter_export import ExportedAdapter
from t5g2convert.adaptation.data.corpora import folders_of
from t5g2convert.adaptation.export import Exported
from t5g2convert.adaptation.options import RunOptions
from t5g2convert.adaptation.train.evaluation import NOTHING_DECIDED, Policy
from t5g2convert.adaptation.train.evaluation_log import Evaluation, Scores
from t5g2convert.adaptation.train.metrics import Metrics
from t5g2convert.adaptation.train.run_folder import RUN_FILE
from t5g2convert.adaptation.train.run_settings import RunSettings

if TYPE_CHECKING:
    from lightning_fabric import Fabric

O_co = TypeVar("O_co", bound=RunOptions, covariant=True)


@dataclass(frozen=True, slots=True)
class RunRequest(Generic[O_co]):
    """A requested run.

    Attributes:
        model: The folder of a converted model.
        data: The folder of packed data, or a file that lists several; see `data.corpora`.
        run: The run's folder; absent or empty, unless the run resumes.
        options: The options of the run.
    """

    model: Path
    data: Path
    run: Path
    options: O_co

    @property
    def inputs(self) -> tuple[Path, ...]:
        """All folders that are read; none may be in the run's folder."""
        teacher = () if self.options.kd is None else (self.options.kd,)
        held_out = () if self.options.eval is None else folders_of(self.options.eval)
        return (self.model, *folders_of(self.data), *teacher, *held_out)

    @property
    def resumes(self) -> bool:
        """Whether there is a run to resume; --resume on an absent or empty folder starts one."""
        return self.options.resume and (self.run / RUN_FILE).exists()


@dataclass(frozen=True, slots=True)
class Outcome:
    """A completed run.

    Attributes:
        first: Whether this process is rank 0, the only one that prints.
        start: Steps completed before.
        trained: Number of trained parameters.
        checkpoint: The last checkpoint, or the best if it is kept.
        steps: The whole log, on rank 0.
        plot: The plot of the losses.
        settings: The run's settings, with the teacher's identity.
        evaluations: All held-out losses.
        best: The step of the best evaluation, if its checkpoint is kept; it is the one that is exported.
        stopped: The step after which the run ended early, if it did.
        exported: The exported model, on rank 0, if `export` is set.
        adapter: The exported adapter in its place, if one was trained.
    """

    first: bool
    start: int
    trained: int
    checkpoint: Path
    steps: tuple[Metrics, ...]
    plot: Path
    settings: RunSettings
    evaluations: tuple[Evaluation, ...] = ()
    best: int | None = None
    stopped: int | None = None
    exported: Exported | None = None
    adapter: ExportedAdapter | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `--json` prints."""
        last = self.steps[-1]
        return {
            "steps": last.step,
            "resumed_from": self.start,
            "trained_parameters": self.trained,
            "checkpoint": str(self.checkpoint),
            "plot": str(self.plot),
            "model": None if self.exported is None else self.exported.to_json(),
            **({} if self.adapter is None else {"adapter": self.adapter.to_json()}),
            "loss": last.loss,
            "tasks": dict(last.tasks),
            **({"held_out": asdict(self.evaluations[-1])} if self.evaluations else {}),
            **({} if self.best is None else {"best": self.best}),
            **({} if self.stopped is None else {"stopped": self.stopped}),
        }


@dataclass(frozen=True, slots=True)
class Watch:
    """What is done with the run while it trains.

    Attributes:
        begun: Called once with notes and the steps of the whole run, on rank 0, before the first step.
        report: Called with the metrics of every step, on rank 0.
        evaluated: Called with the held-out losses, on rank 0.
        policy: What the evaluations decide.
        generate: Returns the scores of texts generated for held-out samples, on all ranks; None to generate nothing.
    """

    begun: Callable[[Sequence[str], int], None]
    report: Callable[[Metrics], None]
    evaluated: Callable[[Evaluation], None]
    policy: Policy = NOTHING_DECIDED
    generate: "Callable[[Fabric, nn.Module, Sequence[Any]], Scores] | None" = None
