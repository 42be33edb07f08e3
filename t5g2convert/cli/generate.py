"""`t5g2 generate`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from t5g2convert.cli.console import DebugOption
from t5g2convert.cli.options import DeviceOption, PassDtypeOption
from t5g2convert.errors import T5g2Error
from t5g2convert.printable import printable


def generate(
    output: Annotated[Path, typer.Argument(help="A T5Gemma 2 or T5Gemma folder with a tokenizer.")],
    prompt: Annotated[str, typer.Option("--prompt", help="What the encoder reads.")],
    image: Annotated[Path | None, typer.Option("--image", help="A picture that the encoder sees first.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", help="Tokens to write at most.", min=1)] = 64,
    dtype: PassDtypeOption = None,
    device: DeviceOption = "cpu",
    debug: DebugOption = False,
) -> None:
    """Write greedily with the reference encoder-decoder. A fresh conversion has yet to learn to use its encoder."""
    from t5g2convert.reference import generation

    began = False
    try:
        for piece in generation.generate(
            output, prompt, image=image, max_new_tokens=max_new_tokens, dtype=dtype, device=device
        ):
            began = True
            sys.stdout.write(printable(piece, keep="\n"))
            sys.stdout.flush()
    except T5g2Error:
        # The reason starts on a line of its own; where nothing was written, no empty line is.
        sys.stdout.write("\n" * began)
        raise
    sys.stdout.write("\n")
