"""`t5g2 adapt`, and the forecast that `--dry-run` prints."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from t5g2convert.adaptation.options import AdaptOptions
from t5g2convert.adaptation.train.run_settings import RUN
from t5g2convert.cli.console import (
    DebugOption,
    JsonOption,
    console,
    emit_json,
    parameter_table,
    print_notes,
    size_text,
    table,
)
from t5g2convert.cli.options import with_options
from t5g2convert.errors import Interrupted
from t5g2convert.interrupts import interruption, raise_interruption

if TYPE_CHECKING:
    from t5g2convert.adaptation.adapt import Request
    from t5g2convert.adaptation.run_request import Outcome
    from t5g2convert.adaptation.train.evaluation import Evaluation
    from t5g2convert.adaptation.train.forecast import Forecast, Throughput
    from t5g2convert.adaptation.train.metrics import Metrics

EPILOG: Final = """\b
One machine:
  t5g2 adapt MODEL DATA OUT --lr 1e-4 --steps 10000 --devices 8
Several machines, with torchrun on each:
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m t5g2convert \\
    adapt MODEL DATA OUT --lr 1e-4 --steps 10000
Several machines, with SLURM:
  srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --kill-on-bad-exit t5g2 \\
    adapt MODEL DATA OUT --lr 1e-4 --steps 10000

All processes must see MODEL, DATA and OUT under the same paths. A run can resume with another number of processes.
"""
"""The last paragraph of the help."""


@with_options
def adapt(
    model: Annotated[Path, typer.Argument(help="The converted folder to train.")],
    data: Annotated[
        Path,
        typer.Argument(
            help="The folder that `t5g2 pack` wrote with MODEL's tokenizer, or a YAML file that lists several folders "
            "with their weights."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The run's folder: checkpoints, logs, and the trained model.")],
    options: AdaptOptions,
    log_every: Annotated[
        int,
        typer.Option(
            "--log-every", min=1, help="Steps between printed lines; OUT/metrics.jsonl has all.", rich_help_panel=RUN
        ),
    ] = 1,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Print what the run would do and an estimate of its cost; write nothing.",
            rich_help_panel=RUN,
        ),
    ] = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Continue the training of a converted model with UL2, on one device or many.

    AdamW on float32 weights with linear warmup and cosine decay. The loss is summed over all labels of a step and
    divided by their number. SigLIP is never trained.
    """
    from t5g2convert.adaptation.adapt import Request

    request = Request(model, data, out, options)
    if dry_run:
        _foresee(request, as_json=as_json)
    else:
        _run(request, every=log_every, as_json=as_json)


def _foresee(request: "Request", *, as_json: bool) -> None:
    from t5g2convert.adaptation.adapt import foresee

    found = foresee(request)
    if as_json:
        emit_json(found.to_json())
    else:
        print_forecast(found)


def print_forecast(forecast: "Forecast") -> None:
    """Print a table of the tasks, and lines for a step, a device and the whole run."""
    out = console()
    tasks = table("task", "of a block", "raw tokens", "encoder", "labels", "sentinels", right=(1, 2, 3, 4, 5))
    for task in forecast.tasks:
        counts = (task.weight, task.raw, task.encoder, task.labels, task.sentinels)
        tasks.add_row(task.name, *(f"{count:,}" for count in counts))
    images = f", {forecast.image_steps:,} of them of {forecast.image_samples:,} documents with images"
    lines = {"steps": f"{forecast.steps:,} of {forecast.samples:,} samples{images if forecast.image_steps else ''}"}
    if forecast.tasks:
        out.print(tasks)
        lines["text"] = f"{forecast.corpus:,} tokens, read {forecast.epochs:.3g} times"
    lines["sentinels"] = "none" if forecast.sentinels is None else "ids {:,} down to {:,}".format(*forecast.sentinels)
    if forecast.operations is not None:
        lines["a step"] = f"{forecast.operations:.2e} operations of matrix products (estimate)"
    lines["passes"] = (
        f"{forecast.passes:,.4g} a step; {forecast.useful:.1%} of the work is neither padding nor waiting for another "
        "device (by the schedule)"
    )
    held = forecast.memory
    parts = {
        "weights, gradients and moments": held.states,
        "gathered": held.gathered,
        "inputs of layers": held.inputs,
        "softmax": held.softmax,
        "the whole gradient": held.gradient,
    }
    parts_text = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
    kept = "of one layer" if forecast.recompute == "full" else f"that --recompute {forecast.recompute} keeps"
    lines["a device"] = (
        f"{size_text(held.total)} plus the activations {kept} (estimate, bfloat16, no teacher): {parts_text}"
    )
    if forecast.throughput is not None:
        lines |= _speed(forecast.throughput)
    for name, line in lines.items():
        out.print(f"{name:<10} {line}", soft_wrap=True)
    print_notes(forecast.notes)


_PARTS: Final = {
    "products": "matrix products",
    "scores": "attention scores",
    "elements": "operations by element",
    "launches": "launching kernels",
    "communication": "communication",
    "waiting": "waiting for other devices",
    "optimizer": "optimizer",
    "checkpoints": "checkpoints",
}


def _speed(found: "Throughput") -> dict[str, str]:
    """Return a line for the expected speed, and one for the machine that it assumes."""
    from t5g2convert.adaptation.train.assumed_machine import assumptions

    shares = {title: getattr(found.seconds, name) / found.step for name, title in _PARTS.items()}
    parts = sorted(((share, title) for title, share in shares.items() if share >= 0.005), reverse=True)
    text = (
        f"{float(f'{found.tokens_per_second:.2g}'):,.0f} tokens/s in text steps of {found.step:.2g} s, "
        f"{found.peak_share:.0%} of the "
        f"peak of {found.devices} {found.machine.name} (estimate, bfloat16): "
    )
    text += ", ".join(f"{title} {share:.0%}" for share, title in parts)
    if not found.fits:
        text += f"; but it does not fit in the {size_text(int(found.machine.memory))} of a device"
    return {"speed": text, "assumed": assumptions(found.machine)}


def _run(request: "Request", *, every: int, as_json: bool) -> None:
    """Run the training; only rank 0 prints."""
    from t5g2convert.adaptation.adapt import adapt as run
    from t5g2convert.adaptation.train.distributed import ReportedElsewhere, early_rank
    from t5g2convert.adaptation.train.evaluation import overfitting

    steps = request.options.steps
    try:
        with _progress(steps) as advance:

            def report(step: "Metrics") -> None:
                if not as_json and (step.step % every == 0 or step.step == steps):
                    typer.echo(step.line)
                advance(step.step)
                # If the exception of a signal was lost, for example in a destructor, stop the run here.
                raise_interruption()

            def evaluated(found: "Evaluation") -> None:
                if not as_json:
                    typer.echo(found.line)

            outcome = run(request, begun=print_notes, report=report, evaluated=evaluated)
    except ReportedElsewhere as error:
        raise typer.Exit(error.exit_code) from None
    except Exception as error:
        # Torch and other libraries turn the exception of a signal handler into their own errors.
        stopped = error if isinstance(error, Interrupted) else interruption()
        if stopped is None:
            raise
        if early_rank():
            raise typer.Exit(stopped.exit_code) from None
        stopped.hint = "repeat the command with --resume to continue from the last checkpoint, if any"
        raise stopped from None
    if not outcome.first:
        return
    if as_json:
        emit_json(outcome.to_json())
    else:
        _print(outcome)
    if (note := overfitting(outcome.evaluations)) is not None:
        print_notes([note])


def _print(outcome: "Outcome") -> None:
    out = console()
    out.print(f"{outcome.steps[-1].step:,} steps of {outcome.trained:,} trained parameters")
    out.print(f"checkpoint  {outcome.checkpoint}", soft_wrap=True)
    out.print(f"losses      {outcome.plot}", soft_wrap=True)
    if outcome.exported is not None:
        how = "already exported, unchanged" if outcome.exported.before else "loads in transformers"
        out.print(f"model       {outcome.exported.output}, {how}", soft_wrap=True)
        out.print(parameter_table(outcome.exported.inspection.parameters))


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr, if stderr is a terminal and this is rank 0."""
    from t5g2convert.adaptation.train.distributed import early_rank

    if not sys.stderr.isatty() or early_rank():
        yield lambda done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("adapt"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # If stdout is the same terminal, lines go above the bar; otherwise they go to stdout unchanged.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=console(stderr=True), transient=True, redirect_stdout=redirect) as bar:
        task = bar.add_task("adapt", total=steps)
        yield lambda done: bar.update(task, completed=done)
