"""The training loop: micro-batches, one optimizer update per step, metrics and checkpoints.

Apart from rounding, the result does not depend on the number of processes.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.utils import get_total_norm

from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.train import checkpoints
from t5g2convert.adaptation.train.checkpoints import State
from t5g2convert.adaptation.train.distributed import ReportedElsewhere, raise_first_error
from t5g2convert.adaptation.train.metrics import Log, Metrics, open_log
from t5g2convert.adaptation.train.run_folder import METRICS_FILE, TENSORBOARD_FOLDER
from t5g2convert.adaptation.train.schedule import is_image_step, learning_rate
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.dataset import Batch, UL2Dataset, load_batches, micro_batches, passes_of, task_names
from t5g2convert.errors import DataError, T5g2Error

if TYPE_CHECKING:
    from lightning_fabric import Fabric

Report = Callable[[Metrics], None]


def make_optimizer(parameters: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.AdamW:
    """Return AdamW; only matrices are decayed, since Gemma's norm weights are offsets from 1."""
    groups = [
        {"params": [each for each in parameters.values() if each.ndim >= 2], "weight_decay": settings.weight_decay},
        {"params": [each for each in parameters.values() if each.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=settings.lr, betas=(settings.beta1, settings.beta2), eps=settings.eps)


def train(
    engine: "Fabric",
    module: nn.Module,
    state: State,
    samples: UL2Dataset,
    *,
    run: Path,
    start: int,
    loop: LoopConfig,
    report: Report,
) -> None:
    """Run all steps from `start` on, and save a checkpoint every `save_every` steps and at the end.

    Args:
        engine: Fabric, launched.
        module: The sharded `ModelWithLoss`.
        state: Its trained parameters and their optimizer.
        samples: The data, with the settings.
        run: The run's folder.
        start: Steps completed before.
        loop: Settings of the loop.
        report: Called with the metrics of every step, on rank 0.

    Raises:
        DataError: A gradient is not finite, or a sample cannot be made; `ReportedElsewhere` on other ranks than 0.
        OutputError: A checkpoint or a log cannot be written.
    """
    settings = samples.settings
    passes = passes_of(settings, world=engine.world_size, micro=loop.micro_batch)
    batches = load_batches(
        samples,
        lambda: micro_batches(
            settings, rank=engine.global_rank, world=engine.world_size, micro=loop.micro_batch, start=start
        ),
        workers=loop.workers,
    )
    on_rank_0 = engine.global_rank == 0
    log_context = (
        open_log(run / METRICS_FILE, run / TENSORBOARD_FOLDER, start=start) if on_rank_0 else nullcontext(None)
    )
    module.train()
    with log_context as log:
        sums = _Sums(engine, settings)
        for step, batch, is_last in _checked(engine, batches, passes):
            loss, losses_T, labels_T = module(engine.to_device(batch))
            engine.backward(loss)
            sums.add(losses_T, labels_T, batch)
            if not is_last:
                continue
            metrics = _update(engine, state, settings, step, sums)
            _log(log, metrics, report)
            done = step + 1
            if done % loop.save_every == 0 or done == settings.steps:
                if log is not None:
                    log.flush()
                checkpoints.save(engine, run, done, state, settings, keep=loop.keep)
            # Here, so that the time of a step excludes the checkpoint.
            sums = _Sums(engine, settings)


def _log(log: Log | None, metrics: Metrics, report: Report) -> None:
    if log is not None:
        log.add(metrics)
        report(metrics)


def _checked(
    engine: "Fabric", batches: Iterator[tuple[int, Batch | T5g2Error]], passes: int
) -> Iterator[tuple[int, Batch, bool]]:
    """Yield valid batches with their step, and whether they are the last of the step.

    Errors are shared only before the first and before the last pass of a step, because each time all processes wait for
    their device. In between, the last valid batch replaces one that could not be made, so that all processes make the
    same passes; the step is never completed.

    Raises:
        T5g2Error: As in `raise_first_error`.
    """
    error: T5g2Error | None = None
    valid: Batch = {}
    for number, (step, made) in enumerate(batches):
        place = number % passes
        if isinstance(made, T5g2Error):
            error = error or made
        else:
            valid = made
        if place in (0, passes - 1):
            raise_first_error(engine, error)
        yield step, valid, place == passes - 1


class _Sums:
    """Sums over the micro-batches of a step, and its start time."""

    def __init__(self, engine: "Fabric", settings: Settings) -> None:
        self.names = task_names(settings)
        self.started = time.perf_counter()
        # Losses, labels, and last the encoder tokens; float64 holds all counts exactly.
        self.values = torch.zeros(2 * len(self.names) + 1, dtype=torch.float64, device=engine.device)
        self._engine = engine

    def add(self, losses_T: Tensor, labels_T: Tensor, batch: Batch) -> None:
        counted = (batch["labels"] >= 0).any(dim=1)
        read = batch["attention_mask"][counted].sum()
        self.values += torch.cat([losses_T.double(), labels_T.double(), read[None].to(losses_T.device).double()])

    def of_all(self) -> list[float]:
        """Return the sums over all processes."""
        if self._engine.world_size > 1:
            torch.distributed.all_reduce(self.values)
        return [float(value) for value in self.values.tolist()]


def _update(engine: "Fabric", state: State, settings: Settings, step: int, sums: _Sums) -> Metrics:
    """Update the parameters with the accumulated gradient, and return the metrics."""
    values = sums.of_all()
    count = len(sums.names)
    losses, labels = values[:count], values[count : 2 * count]
    total = sum(labels)
    norm = _scale_and_clip(engine, state, settings, step, labels=total)
    if norm is None:
        error = DataError(f"the gradient of step {step + 1} is not finite", hint="lower --lr, or check the data")
        # All processes see the same norm.
        raise error if engine.global_rank == 0 else ReportedElsewhere(error.exit_code)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(settings, step)
    state.optimizer.step()
    state.optimizer.zero_grad()
    present = [number for number in range(count) if labels[number]]
    tokens = int(values[-1] + total)
    return Metrics(
        step=step + 1,
        kind="images" if is_image_step(settings, step) else "text",
        loss=sum(losses) / total,
        tasks={sums.names[number]: losses[number] / labels[number] for number in present},
        labels={sums.names[number]: int(labels[number]) for number in present},
        grad_norm=norm,
        lr=learning_rate(settings, step),
        tokens=tokens,
        tokens_per_second=tokens / max(time.perf_counter() - sums.started, 1e-9),
    )


def _scale_and_clip(engine: "Fabric", state: State, settings: Settings, step: int, *, labels: float) -> float | None:
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
