"""What `t5g2 adapt` and `t5g2 finetune` share: parameters, and what they print while they train and at their end."""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from t5g2convert.adaptation.train.run_settings import RUN
from t5g2convert.cli.console import console, emit_json, parameter_table, print_notes, size_text
from t5g2convert.errors import Interrupted
from t5g2convert.interrupts import interruption, raise_interruption

if TYPE_CHECKING:
    from t5g2convert.adaptation.run_request import Outcome
    from t5g2convert.adaptation.train.evaluation_log import Evaluation
    from t5g2convert.adaptation.train.forecast import Forecast, RunCost, Throughput
    from t5g2convert.adaptation.train.metrics import Metrics

RunArgument = Annotated[Path, typer.Argument(help="The run's folder: checkpoints, logs, and the trained model.")]
LogEveryOption = Annotated[
    int,
    typer.Option(
        "--log-every", min=1, help="Steps between printed lines; OUT/metrics.jsonl has all.", rich_help_panel=RUN
    ),
]
DryRunOption = Annotated[
    bool,
    typer.Option(
        "--dry-run",
        help="Print what the run would do and an estimate of its cost; write nothing.",
        rich_help_panel=RUN,
    ),
]


@dataclass(frozen=True, slots=True)
class Watched:
    """The callbacks of a run: with notes and the number of steps, with every step, and with every evaluation."""

    begun: Callable[[Sequence[str], int], None]
    report: "Callable[[Metrics], None]"
    evaluated: "Callable[[Evaluation], None]"


def run_and_print(name: str, start: "Callable[[Watched], Outcome]", *, every: int, as_json: bool) -> None:
    """Run a training; only rank 0 prints.

    Args:
        name: The command.
        start: The training.
        every: Steps between printed lines.
        as_json: Whether to print one document at the end.
    """
    from t5g2convert.adaptation.train.distributed import ReportedElsewhere, early_rank
    from t5g2convert.adaptation.train.evaluation_log import overfitting

    last = 0
    try:
        with _progress(name) as (extend, advance):

            def begun(notes: Sequence[str], steps: int) -> None:
                nonlocal last
                last = steps
                print_notes(notes)
                extend(steps)

            def report(step: "Metrics") -> None:
                if not as_json and (step.step % every == 0 or step.step == last):
                    _say(step.line)
                advance(step.step)
                # If the exception of a signal was lost, for example in a destructor, stop the run here.
                raise_interruption()

            def evaluated(found: "Evaluation") -> None:
                if not as_json:
                    _say(found.line)

            outcome = start(Watched(begun, report, evaluated))
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
    if outcome.best is None and (note := overfitting(outcome.evaluations)) is not None:
        print_notes([note])


def _print(outcome: "Outcome") -> None:
    out = console()
    out.print(f"{outcome.steps[-1].step:,} steps of {outcome.trained:,} trained parameters")
    if outcome.stopped is not None:
        out.print(f"ended early, after step {outcome.stopped:,}: the evaluations have not become better any more")
    best = "" if outcome.best is None else ", the best evaluation"
    out.print(f"checkpoint  {outcome.checkpoint}{best}", soft_wrap=True)
    out.print(f"losses      {outcome.plot}", soft_wrap=True)
    if outcome.exported is not None:
        how = "already exported, unchanged" if outcome.exported.before else "loads in transformers"
        out.print(f"model       {outcome.exported.output}, {how}", soft_wrap=True)
        out.print(parameter_table(outcome.exported.inspection.parameters))
    if outcome.adapter is not None:
        how = "already exported, unchanged" if outcome.adapter.before else "loads in peft"
        out.print(f"adapter     {outcome.adapter.output}, {outcome.adapter.targets} targets, {how}", soft_wrap=True)
        out.print(f"t5g2 merge MODEL {outcome.adapter.output} OUTPUT makes a model of it", soft_wrap=True)


def _say(line: str) -> None:
    # typer.echo would write around the display of the bar, into the line that it is drawn in.
    print(line, flush=True)  # noqa: T201


@contextmanager
def _progress(name: str) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Show a progress bar on stderr, if stderr is a terminal and this is rank 0.

    Yields:
        What sets the number of all steps, and what sets that of the steps done.
    """
    from t5g2convert.adaptation.train.distributed import early_rank

    if not sys.stderr.isatty() or early_rank():
        yield lambda steps: None, lambda done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn(name), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # If stdout is the same terminal, lines go above the bar; otherwise they go to stdout unchanged.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=console(stderr=True), transient=True, redirect_stdout=redirect) as bar:
        task = bar.add_task(name, total=None)
        yield lambda steps: bar.update(task, total=steps), lambda done: bar.update(task, completed=done)


def cost_lines(forecast: "Forecast | RunCost", *, steps: str) -> dict[str, str]:
    """Return lines for a step, its passes, a device, and the speed.

    Args:
        forecast: The cost.
        steps: What the steps are called whose speed is expected.
    """
    lines = {}
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
        "images": held.images,
    }
    parts_text = ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size)
    kept = "of one layer" if forecast.recompute == "full" else f"that --recompute {forecast.recompute} keeps"
    lines["a device"] = (
        f"{size_text(held.total)} plus the activations {kept} (estimate, bfloat16, no teacher): {parts_text}"
    )
    if forecast.throughput is not None:
        lines |= _speed(forecast.throughput, steps)
    return lines


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


def _speed(found: "Throughput", steps: str) -> dict[str, str]:
    """Return a line for the expected speed, and one for the machine that it assumes."""
    from t5g2convert.adaptation.train.assumed_machine import assumptions

    shares = {title: getattr(found.seconds, name) / found.step for name, title in _PARTS.items()}
    parts = sorted(((share, title) for title, share in shares.items() if share >= 0.005), reverse=True)
    text = (
        f"{float(f'{found.tokens_per_second:.2g}'):,.0f} tokens/s in {steps} of {found.step:.2g} s, "
        f"{found.peak_share:.0%} of the "
        f"peak of {found.devices} {found.machine.name} (estimate, bfloat16): "
    )
    text += ", ".join(f"{title} {share:.0%}" for share, title in parts)
    if not found.fits:
        text += f"; but it does not fit in the {size_text(int(found.machine.memory))} of a device"
    return {"speed": text, "assumed": assumptions(found.machine)}
