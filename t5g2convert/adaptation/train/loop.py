"""The training loop: micro-batches, one optimizer update per step, metrics and checkpoints.

Apart from rounding, the result does not depend on the number of processes.
"""

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.train.checkpoints import State
from t5g2convert.adaptation.train.dataset import Batch, Samples, load_batches
from t5g2convert.adaptation.train.distributed import ReportedElsewhere, raise_first_error
from t5g2convert.adaptation.train.metrics import Log, Metrics, open_log
from t5g2convert.adaptation.train.micro_batches import MicroBatch
from t5g2convert.adaptation.train.run_folder import METRICS_FILE, TENSORBOARD_FOLDER
from t5g2convert.adaptation.train.run_settings import RunSettings
from t5g2convert.adaptation.train.saver import Saver
from t5g2convert.adaptation.train.schedule import learning_rate
from t5g2convert.adaptation.train.sharding import before_pass, reduces_once, trained_parts
from t5g2convert.adaptation.train.signals import signals_at_step_ends
from t5g2convert.errors import DataError, Interrupted, T5g2Error

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Report = Callable[[Metrics], None]

PEAK: Final = "peak"
"""Key of a parameter group's peak learning rate."""


class Evaluates(Protocol):
    """Evaluates a run after some of its steps, on all ranks."""

    def __call__(self, done: int) -> Mapping[str, float]:
        """Evaluate after so many steps, and return scalars for TensorBoard."""

    @property
    def best(self) -> int | None:
        """The step whose checkpoint is kept; None for none."""

    @property
    def is_over(self) -> bool:
        """Whether the run ends after the last evaluation."""


class NotEvaluated:
    """A run without evaluations."""

    best = None
    is_over = False

    def __call__(self, done: int) -> Mapping[str, float]:
        """Return nothing."""
        return {}


def make_optimizer(
    parameters: Mapping[str, nn.Parameter], settings: RunSettings, parts: Mapping[str, str] | None = None
) -> torch.optim.AdamW:
    """Return AdamW; only matrices are decayed, since Gemma's norm weights are offsets from 1.

    Args:
        parameters: Trained parameters by their published names.
        settings: The run's settings, with the learning rate of each part.
        parts: The part of each parameter; by default all have the same learning rate.
    """
    rates = {name: settings.lr if parts is None else settings.rate_of(parts[name]) for name in parameters}
    groups = [
        {
            "params": [each for name, each in parameters.items() if (each.ndim >= 2, rates[name]) == (decayed, rate)],
            "weight_decay": settings.weight_decay if decayed else 0.0,
            "lr": rate,
            PEAK: rate,
        }
        for rate in dict.fromkeys(rates.values())
        for decayed in (True, False)
    ]
    return torch.optim.AdamW(
        groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps, fused=True
    )


def train(
    engine: "Fabric",
    module: nn.Module,
    state: State,
    samples: Samples[Any],
    *,
    run: Path,
    start: int,
    loop: LoopConfig,
    report: Report,
    evaluation: Evaluates | None = None,
) -> None:
    """Run all steps from `start` on, and save checkpoints.

    Regular checkpoints are written every `save_every` steps and after the last step. Interim checkpoints are written
    when `save_minutes` have passed and when a signal requests it; only the newest is kept. All processes agree on them
    at the end of a step, in the sum that they share anyway; that is also where they learn that a save in the background
    has ended.

    Args:
        engine: Fabric, launched.
        module: The sharded `ModelWithLoss`.
        state: Its trained parameters and their optimizer.
        samples: The data, with the settings.
        run: The run's folder.
        start: Steps completed before.
        loop: Settings of the loop.
        report: Called with the metrics of every step, on rank 0.
        evaluation: Called before the first step, every `eval_every` steps, and after the last; a run that resumes after
            one of these steps calls it again. The checkpoint of its best step is kept, and made if there is none.

    Raises:
        DataError: A gradient is not finite, or a sample cannot be made; `ReportedElsewhere` on other ranks than 0.
        Interrupted: A signal ended the run; the checkpoint of its last step is complete.
        OutputError: A checkpoint or a log cannot be written.
    """
    settings, evaluation = samples.settings, evaluation or NotEvaluated()
    order = samples.order(loop, rank=engine.global_rank, world=engine.world_size, start=start)
    batches = load_batches(samples, order, workers=loop.workers_of(has_images=samples.has_images))
    on_rank_0 = engine.global_rank == 0
    once = reduces_once(engine, loop.reduce, sum(each.numel() for each in state.parameters.values()))
    parts = trained_parts(module)
    log_context = (
        open_log(run / METRICS_FILE, run / TENSORBOARD_FOLDER, start=start) if on_rank_0 else nullcontext(None)
    )
    module.train()
    saver = Saver(engine, run, state, settings, keep=loop.keep, background=loop.async_save)
    with signals_at_step_ends() as wishes, log_context as log, closing(batches), saver:
        if start % loop.eval_every == 0:
            # A run that resumes may have died after the checkpoint of this step, before its evaluation.
            _evaluate(evaluation, log, start)
            if evaluation.is_over:
                return
        sums, saved, skipped = _Sums(engine, samples.task_names), time.monotonic(), 0
        for place, batch in _checked(engine, batches):
            before_pass(parts, is_last=place.is_last, sums=place.is_last or not once)
            loss, losses_T, labels_T = module(engine.to_device(batch))
            engine.backward(loss)
            sums.add(losses_T, labels_T, batch)
            if not place.is_last:
                continue
            late = on_rank_0 and time.monotonic() - saved >= 60 * loop.save_minutes
            totals = sums.over_all_processes(stop=bool(wishes.stop), save=wishes.save or late, written=saver.is_written)
            if totals.written:
                saver.finish()
            metrics = _update(engine, state, settings, place.step, totals, may_skip=skipped < loop.skip_nonfinite)
            skipped += metrics.grad_norm is None
            _log(log, metrics, report)
            done = place.step + 1
            regular = done % loop.save_every == 0 or done == settings.steps
            if regular or totals.save or totals.stop:
                if log is not None:
                    log.flush()
                at_once = totals.stop or done == settings.steps
                saver.save(done, interim=not regular, at_once=at_once, best=evaluation.best)
                wishes.save, saved = False, time.monotonic()
            if totals.stop and done < settings.steps:
                raise Interrupted(wishes.stop or signal.SIGTERM)
            if done % loop.eval_every == 0 or done == settings.steps:
                _evaluate(evaluation, log, done)
                is_over = evaluation.is_over
                if (is_over or evaluation.best == done) and saver.last != done:
                    if log is not None:
                        log.flush()
                    saver.save(done, interim=True, at_once=is_over, best=evaluation.best)
                if is_over:
                    return
            # Here, so that the time of a step excludes the checkpoint.
            sums = _Sums(engine, samples.task_names)


def _evaluate(evaluation: Evaluates, log: Log | None, done: int) -> None:
    scalars = evaluation(done)
    if log is not None:
        log.add_scalars(scalars, done)


def _log(log: Log | None, metrics: Metrics, report: Report) -> None:
    if log is not None:
        log.add(metrics)
        report(metrics)


def _checked(
    engine: "Fabric", batches: Iterator[tuple[MicroBatch, Batch | T5g2Error]]
) -> Iterator[tuple[MicroBatch, Batch]]:
    """Yield valid batches with their micro-batches.

    Errors are shared only before the first and before the last pass of a step, because each time all processes wait for
    their device. In between, the last valid batch replaces one that could not be made, so that all processes make the
    same passes; the step is never completed.

    Raises:
        T5g2Error: As in `raise_first_error`.
    """
    error: T5g2Error | None = None
    valid: Batch = {}
    for place, made in batches:
        if isinstance(made, T5g2Error):
            error = error or made
        else:
            valid = made
        if place.is_first or place.is_last:
            raise_first_error(engine, error)
        yield place, valid


@dataclass(frozen=True, slots=True)
class _Totals:
    """The sums of a step over all processes.

    Attributes:
        losses: By task.
        labels: By task.
        read: Encoder tokens, without padding.
        stop: Whether a signal ends the run after this step.
        save: Whether a checkpoint is requested.
        written: Whether a save in the background has ended on all processes.
        seconds: Since the step started.
    """

    losses: Mapping[str, float]
    labels: Mapping[str, int]
    read: int
    stop: bool
    save: bool
    written: bool
    seconds: float


class _Sums:
    """Sums over the micro-batches of a step, and its start time."""

    def __init__(self, engine: "Fabric", task_names: Sequence[str]) -> None:
        self._names = task_names
        self._started = time.perf_counter()
        # Losses, labels, encoder tokens, the requests to stop and to save, and ended saves; float64 holds all counts
        # exactly.
        self._values = torch.zeros(2 * len(self._names) + 4, dtype=torch.float64, device=engine.device)
        self._engine = engine

    def add(self, losses_T: Tensor, labels_T: Tensor, batch: Batch) -> None:
        counted = (batch["labels"] >= 0).any(dim=1)
        read = batch["attention_mask"][counted].sum()
        self._values[:-3] += torch.cat([losses_T.double(), labels_T.double(), read[None].to(losses_T.device).double()])

    def over_all_processes(self, *, stop: bool, save: bool, written: bool) -> _Totals:
        """Return the sums over all processes; a request of one is a request of all."""
        self._values[-3:] = torch.tensor([stop, save, written])
        if self._engine.world_size > 1:
            torch.distributed.all_reduce(self._values)
        *sums, read, stops, saves, ended = self._values.tolist()
        losses, labels = sums[: len(self._names)], sums[len(self._names) :]
        return _Totals(
            losses=dict(zip(self._names, losses, strict=True)),
            labels={name: int(count) for name, count in zip(self._names, labels, strict=True)},
            read=int(read),
            stop=stops > 0,
            save=saves > 0,
            written=ended == self._engine.world_size,
            seconds=max(time.perf_counter() - self._started, 1e-9),
        )


def _update(
    engine: "Fabric", state: State, settings: RunSettings, step: int, totals: _Totals, *, may_skip: bool
) -> Metrics:
    """Update the parameters with the accumulated gradient, unless it is skipped, and return the metrics."""
    labels = {name: count for name, count in totals.labels.items() if count}
    norm = _scale_and_clip(engine, state, settings, step, labels=sum(labels.values()))
    if norm is None and not may_skip:
        error = DataError(
            f"the gradient of step {step + 1} is not finite",
            hint="--skip-nonfinite N makes no update in up to N such steps; "
            f"--resume --skip-steps {step + 1}-{step + 1} passes over its data; with --resume --change a lower --lr "
            "holds from the newest checkpoint on, and with --from STEP from an earlier one",
        )
        # All processes see the same norm.
        raise error if engine.global_rank == 0 else ReportedElsewhere(error.exit_code)
    if norm is not None:
        for group in state.optimizer.param_groups:
            group["lr"] = learning_rate(settings, step, group[PEAK])
        state.optimizer.step()
    state.optimizer.zero_grad()
    tokens = totals.read + sum(labels.values())
    return Metrics(
        step=step + 1,
        kind=settings.kind_of(step),
        loss=sum(totals.losses.values()) / sum(labels.values()),
        tasks={name: totals.losses[name] / count for name, count in labels.items()},
        labels=labels,
        grad_norm=norm,
        lr=learning_rate(settings, step),
        tokens=tokens,
        tokens_per_second=tokens / totals.seconds,
    )


def _scale_and_clip(engine: "Fabric", state: State, settings: RunSettings, step: int, *, labels: float) -> float | None:
    """Scale gradients of summed losses to the mean over all labels, and clip them by their global norm.

    Returns:
        The norm before clipping; None if it is not finite.
    """
    if step < settings.freeze_until:
        for name, parameter in state.parameters.items():
            if not any(fnmatchcase(name, pattern) for pattern in settings.trainable):
                parameter.grad = None
    gradients = [parameter.grad for parameter in state.parameters.values() if parameter.grad is not None]
    if not gradients:
        # Only parts that images train are trained, and this is a text step.
        return 0.0
    for gradient in gradients:
        # FSDP2 averages the sums over processes.
        gradient.mul_(engine.world_size / labels)
    norm: Any = get_total_norm(gradients)
    # Each process has a shard of every tensor; this is the norm over all shards.
    whole = float(norm.full_tensor())
    if not math.isfinite(whole):
        return None
    if whole > settings.clip:
        for gradient in gradients:
            gradient.mul_(settings.clip / whole)
    return whole
