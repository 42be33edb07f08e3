"""`t5g2 average`."""

from pathlib import Path
from typing import Annotated

import typer

from t5g2convert.adaptation.options import AverageOptions
from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, parameter_table, print_notes, size_text
from t5g2convert.cli.options import with_options
from t5g2convert.printable import printable


@with_options
def average(
    run: Annotated[
        Path,
        typer.Argument(help="The folder of a run of t5g2 adapt, or of transformers' Trainer."),
    ],
    output: Annotated[
        Path | None, typer.Argument(help="The folder to write.", show_default="average in the run's folder")
    ] = None,
    *,
    options: AverageOptions,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Average the last checkpoints of a training run into a model, as T5Gemma 2 was finished."""
    from t5g2convert.adaptation.average import average_checkpoints

    done = average_checkpoints(run, output or run / "average", options)
    if as_json:
        document = done.to_json()
        # Only conversions have these keys.
        for key in ("mapping", "kept", "residual"):
            del document[key]
        emit_json({**document, "checkpoints": options.last})
        return
    out = console()
    out.print(parameter_table(done.parameters))
    out.print(
        f"wrote the mean of {options.last} checkpoint(s), {done.tensors} tensors, {size_text(done.nbytes)} in "
        f"{len(done.shards)} file(s), to {printable(str(done.output))}",
        soft_wrap=True,
    )
    print_notes(done.notes)
