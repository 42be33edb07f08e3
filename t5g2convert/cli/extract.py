"""`t5g2 extract`."""

from pathlib import Path
from typing import Annotated

import typer

from t5g2convert.cli.console import DebugOption, JsonOption
from t5g2convert.cli.convert import AllowNonfiniteOption, OverwriteOption, VerifyOption, write_folder
from t5g2convert.cli.options import DtypeOption, ShardOption, parse_size
from t5g2convert.cli.upload import PushOption


def extract(
    source: Annotated[str, typer.Argument(help="A T5Gemma 2 folder, or a model of the Hub as org/name[@revision].")],
    dest: Annotated[Path, typer.Argument(help="The folder to write.")],
    part: Annotated[str, typer.Option("--part", help="encoder: T5Gemma 2's encoder alone; decoder: back to Gemma 3.")],
    dtype: DtypeOption = "keep",
    max_shard_size: ShardOption = "5GB",
    overwrite: OverwriteOption = False,
    allow_nonfinite: AllowNonfiniteOption = False,
    verify: VerifyOption = False,
    push_to: PushOption = None,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Take the encoder out of a T5Gemma 2 folder, or its decoder as the Gemma 3 that it is without memory."""
    write_folder(
        source,
        dest,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        verify=verify,
        push_to=push_to,
        as_json=as_json,
        part=part,
        dtype=dtype,
        max_shard_bytes=parse_size(max_shard_size),
    )
