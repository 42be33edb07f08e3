"""`t5g2 finetune`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from t5g2convert.adaptation.finetune_options import FinetuneOptions
from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, print_notes
from t5g2convert.cli.options import with_options
from t5g2convert.cli.training import DryRunOption, LogEveryOption, RunArgument, Watched, cost_lines, run_and_print

if TYPE_CHECKING:
    from t5g2convert.adaptation.finetune import FinetuneRequest
    from t5g2convert.adaptation.run_request import Outcome


@with_options
def finetune(
    model: Annotated[Path, typer.Argument(help="The T5Gemma 2 folder to train.")],
    data: Annotated[
        Path,
        typer.Argument(
            help="The folder of pairs that `t5g2 pack` wrote with MODEL's tokenizer, or a YAML file that lists several "
            "folders with their weights."
        ),
    ],
    out: RunArgument,
    options: FinetuneOptions,
    log_every: LogEveryOption = 1,
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Fine-tune a model on pairs of an input and a target, on one device or many.

    Every pair is read once an epoch. The loss is that of the targets alone, summed over all their tokens of a step and
    divided by their number. SigLIP is never trained.
    """
    from t5g2convert.adaptation.finetune import FinetuneRequest
    from t5g2convert.adaptation.finetune import finetune as run

    request = FinetuneRequest(model, data, out, options)
    if dry_run:
        _foresee(request, as_json=as_json)
        return

    def start(watched: Watched) -> "Outcome":
        return run(request, begun=watched.begun, report=watched.report, evaluated=watched.evaluated)

    run_and_print("finetune", start, every=log_every, as_json=as_json)


def _foresee(request: "FinetuneRequest", *, as_json: bool) -> None:
    from t5g2convert.adaptation.finetune import foresee

    found = foresee(request)
    if as_json:
        emit_json(found.to_json())
        return
    lines = {
        "steps": f"{found.steps:,} of {found.batch_pairs:,} pairs",
        "pairs": f"{found.pairs:,}, read {found.epochs:.3g} times; {found.held_out:,} are evaluated",
        "padding": f"{found.cost.padding:.1%} of the tokens of a pass",
        **cost_lines(found.cost, steps="steps"),
    }
    for name, line in lines.items():
        console().print(f"{name:<10} {line}", soft_wrap=True)
    print_notes(found.notes)
