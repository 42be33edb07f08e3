"""`t5g2 adapt`, and the forecast that `--dry-run` prints."""

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
    print_notes,
    size_text,
    table,
)
from t5g2convert.cli.options import with_options
from t5g2convert.cli.training import Watched, run_and_print

if TYPE_CHECKING:
    from t5g2convert.adaptation.adapt import Request
    from t5g2convert.adaptation.run_request import Outcome
    from t5g2convert.adaptation.train.forecast import Forecast, Throughput

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
