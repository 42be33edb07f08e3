"""`t5g2 average`."""

from pathlib import Path
from typing import Annotated

import typer

from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, parameter_table, print_notes, size_text
from t5g2convert.cli.options import DtypeOption, OverwriteOption
from t5g2convert.printable import printable


def average(
    run: Annotated[
        Path,
        typer.Argument(help="The folder of a run of t5g2 adapt, or of transformers' Trainer."),
    ],
    output: Annotated[
        Path | None, typer.Argument(help="The folder to write.", show_default="average in the run's folder")
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            help="The model that was trained, with its frozen tensors; needed for checkpoints of Trainer.",
            show_default="where it was",
        ),
    ] = None,
    last: Annotated[int, typer.Option("--last", help="How many, from the last checkpoint; 5 in the paper.", min=1)] = 5,
    dtype: DtypeOption = "keep",
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Write the mean of the last checkpoints of a training run as a model, as the paper of T5Gemma 2 ends its own."""
    from t5g2convert.adaptation.average import average as write_mean

    done = write_mean(run, last, output or run / "average", model=model, dtype=dtype, overwrite=overwrite)
    if as_json:
        document = done.to_json()
        # Of those only a conversion has a word.
        for key in ("mapping", "kept", "residual"):
            del document[key]
        emit_json({**document, "checkpoints": last})
        return
    out = console()
    out.print(parameter_table(done.parameters))
    out.print(
        f"wrote the mean of {last} checkpoint(s), {done.tensors} tensors, {size_text(done.nbytes)} in "
        f"{len(done.shards)} file(s), to {printable(str(done.output))}",
        soft_wrap=True,
    )
    print_notes(done.notes)
