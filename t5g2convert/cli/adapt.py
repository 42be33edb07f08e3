"""`t5g2 adapt`, and the forecast that `--dry-run` prints."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from t5g2convert.adaptation.options import AdaptOptions
from t5g2convert.cli.console import (
    DebugOption,
    JsonOption,
    console,
    emit_json,
    print_notes,
    table,
)
from t5g2convert.cli.options import with_options
from t5g2convert.cli.training import DryRunOption, LogEveryOption, RunArgument, Watched, cost_lines, run_and_print

if TYPE_CHECKING:
    from t5g2convert.adaptation.adapt import Request
    from t5g2convert.adaptation.run_request import Outcome
    from t5g2convert.adaptation.train.forecast import Forecast

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
    out: RunArgument,
    options: AdaptOptions,
    log_every: LogEveryOption = 1,
    dry_run: DryRunOption = False,
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
        from t5g2convert.adaptation.adapt import adapt as run

        def start(watched: Watched) -> "Outcome":
            return run(
                request,
                begun=lambda notes: watched.begun(notes, options.steps),
                report=watched.report,
                evaluated=watched.evaluated,
            )

        run_and_print("adapt", start, every=log_every, as_json=as_json)


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
    lines = {"steps": f"{forecast.steps:,} of {forecast.samples:,} samples"}
    if forecast.image_steps:
        lines["steps"] += f", {forecast.image_steps:,} of them of {forecast.image_samples:,} documents with images"
    if forecast.tasks:
        out.print(tasks)
        lines["text"] = f"{forecast.corpus:,} tokens, read {forecast.epochs:.3g} times"
    lines["sentinels"] = "none" if forecast.sentinels is None else "ids {:,} down to {:,}".format(*forecast.sentinels)
    lines |= cost_lines(forecast, steps="text steps")
    for name, line in lines.items():
        out.print(f"{name:<10} {line}", soft_wrap=True)
    print_notes(forecast.notes)
