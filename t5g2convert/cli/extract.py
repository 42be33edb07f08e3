"""`t5g2 extract`."""

from pathlib import Path
from typing import Annotated, Literal

import typer

from t5g2convert.cli.console import DebugOption, JsonOption
from t5g2convert.cli.convert import CardOption, VerifyOption, write_folder
from t5g2convert.cli.options import with_options
from t5g2convert.cli.upload import PushOption
from t5g2convert.conversion.options import ConvertOptions


@with_options(only={"dtype", "max_shard_bytes", "overwrite", "allow_nonfinite"})
def extract(
    source: Annotated[str, typer.Argument(help="A T5Gemma 2 folder, or a model on the Hub: org/name[@revision].")],
    dest: Annotated[Path, typer.Argument(help="The folder to write.")],
    part: Annotated[
        Literal["encoder", "decoder"],
        typer.Option("--part", help="encoder: only T5Gemma 2's encoder; decoder: a Gemma 3."),
    ],
    options: ConvertOptions,
    verify: VerifyOption = None,
    card: CardOption = True,
    push_to: PushOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Take the encoder out of a T5Gemma 2 folder, or its decoder as the Gemma 3 that it is without memory."""
    options = options.replace(part=part)
    write_folder(source, dest, options, verify=verify, card=card, push_to=push_to, as_json=as_json)
