"""The loop: micro-batches in, one update a step, the same whatever the number of processes but for rounding."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from t5g2convert.adaptation.train import checkpoints
from t5g2convert.adaptation.train.checkpoints import State
from t5g2convert.adaptation.train.dataloader import loader
from t5g2convert.adaptation.train.distributed import ReportedElsewhere, raise_first_error
from t5g2convert.adaptation.train.metrics import Log, Metrics, opened
from t5g2convert.adaptation.train.run_folder import METRICS_FILE, TENSORBOARD_FOLDER
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.dataset import Batch, Samples, passes_of, places, task_names
from t5g2convert.errors import DataError, T5g2Error

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Report = Callable[[Metrics], None]


@dataclass(frozen=True, slots=True)
class LoopConfig:
    """How a run is cut into pieces; none of it decides the result.

    Attributes:
        micro: Samples that a process takes at once.
        workers: Processes that make micro-batches beside each process.
        save_every: Steps between two checkpoints.
        keep: Checkpoints that are kept.
    """

    micro: int = 1
    workers: int = 0
    save_every: int = 10_000
    keep: int = 5


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """AdamW; only matrices are decayed: a norm's weight is a distance from 1, whose decay would undo the norm."""
    groups = [
        {"params": [each for each in parameters.values() if each.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [each for each in parameters.values() if each.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=settings.betas, eps=settings.eps)


def train(
    engine: "Fabric",
    module: nn.Module,
    state: State,
    samples: Samples,
    *,
    run: Path,
    start: int,
    pace: LoopConfig,
    report: Report,
) -> None:
    """Do all steps from `start` on, with a checkpoint every so many and at the end.

    Args:
        engine: Launched.
        module: The sharded `Denoiser`.
        state: Its trained parameters and their optimizer.
        samples: The data, and the settings.
        run: The run's folder.
        start: Steps that were done before.
        pace: How it is cut.
        report: Told of every step, on the first process.

    Raises:
        DataError: A gradient is not finite, or a sample cannot be made; `ReportedElsewhere` on the others.
        OutputError: A checkpoint or a log cannot be written.
    """
    settings = samples.settings
    passes = passes_of(settings, world=engine.world_size, micro=pace.micro)
    batches = loader(
        samples,
        lambda: places(settings, rank=engine.global_rank, world=engine.world_size, micro=pace.micro, start=start),
        workers=pace.workers,
    )
    first = engine.global_rank == 0
    log_context = opened(run / METRICS_FILE, run / TENSORBOARD_FOLDER, start=start) if first else nullcontext(None)
    module.train()
    with log_context as log:
        sums = _Sums(engine, settings)
        for step, batch, is_last in _agreed(engine, batches, passes):
            loss, losses_T, labels_T = module(engine.to_device(batch))
            engine.backward(loss)
            sums.add(losses_T, labels_T, batch)
            if not is_last:
                continue
            metrics = _update(engine, state, settings, step, sums)
            _tell(log, metrics, report)
            done = step + 1
            if done % pace.save_every == 0 or done == settings.steps:
                if log is not None:
                    log.flush()
                checkpoints.save(engine, run, done, state, settings, keep=pace.keep)
            # Here, so that the time of a step has no checkpoint in it.
            sums = _Sums(engine, settings)


def _tell(log: Log | None, metrics: Metrics, report: Report) -> None:
    if log is not None:
        log.add(metrics)
        report(metrics)


def _agreed(
    engine: "Fabric", batches: Iterator[tuple[int, Batch | T5g2Error]], passes: int
) -> Iterator[tuple[int, Batch, bool]]:
    """Micro-batches with their step, and whether they are the last of it, all of them sound.

    Whether one could not be made is agreed on before the first pass of a step and before the last, since at each
    agreement every process waits for its device. Between them the last that was made stands in for one that was not,
    so that all make the same passes; the step is never finished.

    Raises:
        T5g2Error: As `raise_first_error`.
    """
    error: T5g2Error | None = None
    sound: Batch = {}
    for number, (step, made) in enumerate(batches):
        place = number % passes
        if isinstance(made, T5g2Error):
            error = error or made
        else:
            sound = made
        if place in (0, passes - 1):
            raise_first_error(engine, error)
        yield step, sound, place == passes - 1


class _Sums:
    """What the micro-batches of a step add up to, and since when."""

    def __init__(self, engine: "Fabric", settings: Settings) -> None:
        self.names = task_names(settings)
        self.started = time.perf_counter()
        # Losses, labels, and in the last place the tokens of the encoder; float64 holds all counts exactly.
        self.values = torch.zeros(2 * len(self.names) + 1, dtype=torch.float64, device=engine.device)
        self._engine = engine

    def add(self, losses_T: Tensor, labels_T: Tensor, batch: Batch) -> None:
        """Add a micro-batch."""
        counted = (batch["labels"] >= 0).any(dim=1)
        read = batch["attention_mask"][counted].sum()
        self.values += torch.cat([losses_T.double(), labels_T.double(), read[None].to(losses_T.device).double()])

    def of_all(self) -> list[float]:
        """The sums over all processes."""
        if self._engine.world_size > 1:
            torch.distributed.all_reduce(self.values)
        return [float(value) for value in self.values.tolist()]


def _update(engine: "Fabric", state: State, settings: Settings, step: int, sums: _Sums) -> Metrics:
    """Make one step of the gradient that was added up, and tell of it."""
    values = sums.of_all()
    count = len(sums.names)
    losses, labels = values[:count], values[count : 2 * count]
    total = sum(labels)
    norm = _scale_and_clip(engine, state, settings, step, labels=total)
    if norm is None:
        error = DataError(
            f"the gradient of step {step + 1} is not finite", hint="lower --lr, or look for the cause in the data"
        )
        # All processes have found the same.
        raise error if engine.global_rank == 0 else ReportedElsewhere(error.exit_code)
    for group in state.optimizer.param_groups:
        group["lr"] = settings.rate(step)
    state.optimizer.step()
    state.optimizer.zero_grad()
    came = [number for number in range(count) if labels[number]]
    tokens = int(values[-1] + total)
    return Metrics(
        step=step + 1,
        kind="images" if settings.is_image_step(step) else "text",
        loss=sum(losses) / total,
        tasks={sums.names[number]: losses[number] / labels[number] for number in came},
        labels={sums.names[number]: int(labels[number]) for number in came},
        grad_norm=norm,
        lr=settings.rate(step),
        tokens=tokens,
        tokens_per_second=tokens / max(time.perf_counter() - sums.started, 1e-9),
    )


def _scale_and_clip(engine: "Fabric", state: State, settings: Settings, step: int, *, labels: float) -> float | None:
    """Make gradients of summed losses those of the mean over all labels, and clip them by their global norm.

    Returns:
        The norm before it was clipped; None where it is not finite.
    """
    if step < settings.freeze_until:
        for name, parameter in state.parameters.items():
            if not any(fnmatchcase(name, pattern) for pattern in settings.trainable):
                parameter.grad = None
    gradients = [parameter.grad for parameter in state.parameters.values() if parameter.grad is not None]
    if not gradients:
        # Only what images train was to be trained, and this step is of text.
        return 0.0
    for gradient in gradients:
        # FSDP2 takes the mean over processes of what each has summed.
        gradient.mul_(engine.world_size / labels)
    norm: Any = get_total_norm(gradients)
    # Each process has a part of every tensor: the norm of the parts together is that of the whole.
    whole = float(norm.full_tensor())
    if not math.isfinite(whole):
        return None
    if whole > settings.clip:
        for gradient in gradients:
            gradient.mul_(settings.clip / whole)
    return whole
