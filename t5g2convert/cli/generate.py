"""`t5g2 generate`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from t5g2convert.cli.console import DebugOption
from t5g2convert.cli.options import with_options
from t5g2convert.errors import T5g2Error
from t5g2convert.printable import printable
from t5g2convert.reference.options import GenerateOptions


@with_options
def generate(
    output: Annotated[Path, typer.Argument(help="A T5Gemma 2 or T5Gemma folder with a tokenizer.")],
    prompt: Annotated[str, typer.Option("--prompt", help="The text for the encoder.")],
    options: GenerateOptions,
    debug: DebugOption = False,
) -> None:
    """Write greedily with the reference encoder-decoder. A fresh conversion has yet to learn to use its encoder."""
    from t5g2convert.reference import generation

    began = False
    try:
        for piece in generation.generate(output, prompt, **dict(options)):
            began = True
            sys.stdout.write(printable(piece, keep="\n"))
            sys.stdout.flush()
    except T5g2Error:
        # Start the error on a new line, but without an empty line if nothing was written.
        sys.stdout.write("\n" * began)
        raise
    sys.stdout.write("\n")
