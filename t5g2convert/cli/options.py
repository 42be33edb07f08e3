"""Options that several commands share."""

import re
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Final, Literal

import typer

_UNITS: Final = {
    "": 1, "B": 1,
    "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
    "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40,
}  # fmt: skip
"""Decimal and binary as in transformers: GB is 10^9 bytes, GiB is 2^30; the B may be left out."""

SMALLEST_SHARD = 10**6
"""Bytes below which a size is a slip of the pen, as 5 for 5G: a model would become thousands of files."""


def parse_size(text: str) -> int:
    """Return the bytes of `5G`, `5GB`, `500MB`, `4GiB` or a plain number, in any case of letters."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*", text, re.ASCII)
    if match is None or match[2].upper() not in _UNITS:
        raise typer.BadParameter(f"{text!r} is not a size; write 5G, 500MB or 4GiB")
    size = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    if size < SMALLEST_SHARD:
        raise typer.BadParameter(f"{text!r} is below 1 MB, the smallest size of a file; write 5G, 500MB or 4GiB")
    if size >= 2**63:
        raise typer.BadParameter(f"{text!r} is more than a file can have; write 5G, 500MB or 4GiB")
    return size


DeviceOption = Annotated[
    Literal["cpu", "cuda"], typer.Option("--device", help="Where the passes run; parity is exact on the CPU.")
]
PassDtypeOption = Annotated[
    Literal["bfloat16", "float16", "float32"] | None,
    typer.Option("--dtype", help="What the passes compute in.", show_default="the output's"),
]
TextOption = Annotated[
    Path | None, typer.Option("--text", help="A text file to read in place of seeded tokens, with OUTPUT's tokenizer.")
]
ImageOption = Annotated[
    Path | None, typer.Option("--image", help="A picture file to look at in place of seeded pixels.")
]
SourceArgument = Annotated[
    str, typer.Argument(help="A Gemma 3 or Gemma 2 checkpoint folder, or a model of the Hub: org/name[@revision].")
]
MappingOption = Annotated[
    str | None,
    typer.Option(
        "--mapping",
        help="A shipped mapping's name, or the file of your own.",
        show_default="by the source's model_type",
    ),
]
DtypeOption = Annotated[
    str, typer.Option("--dtype", help="keep, bfloat16, float16 or float32; all tensors are cast.", metavar="DTYPE")
]
DecoderFromOption = Annotated[
    str | None,
    typer.Option(
        "--decoder-from",
        help="A Gemma 3 folder or model of the same width and vocabulary whose layers the decoder gets.",
        show_default="SOURCE",
    ),
]
DecoderParentOption = Annotated[
    str | None, typer.Option("--decoder-from", help="The checkpoint that its decoder was made of, if it was another.")
]
TowerDonorOption = Annotated[
    str | None, typer.Option("--vision-from", help="The checkpoint that its vision tower was taken from, if it was.")
]
EmbeddingFromOption = Annotated[
    Literal["source", "decoder-from"],
    typer.Option("--embedding-from", help="Whose embedding table both stacks get."),
]
EncoderLayersOption = Annotated[
    str | None,
    typer.Option(
        "--encoder-layers",
        help="Layers of its parent that the encoder takes, from 0: first:N, A:B, A:B:STEP (below B), or 0,3,5:12.",
        show_default="all",
        metavar="SPEC",
    ),
]
DecoderLayersOption = Annotated[
    str | None,
    typer.Option(
        "--decoder-layers", help="The same of the decoder and its parent.", show_default="all", metavar="SPEC"
    ),
]
VisionFromOption = Annotated[
    str | None,
    typer.Option("--vision-from", help="A Gemma 3 folder or model whose vision tower a source without images gets."),
]
ProjectorOption = Annotated[
    Literal["copy", "zeros", "aligned"] | None,
    typer.Option(
        "--projector",
        help="The projector: copy (the donor's, for equal widths), zeros (to be trained), or aligned (the donor's, by "
        "least squares between both embeddings).",
        show_default="copy for equal widths, else zeros",
    ),
]
RidgeOption = Annotated[
    float,
    typer.Option(
        "--ridge",
        help="For --projector aligned: penalty on large maps, as 1e-6; needed where the embeddings determine no map.",
    ),
]
RopeOption = Annotated[
    str,
    typer.Option(
        "--rope-scaling",
        help="keep, or linear:F: in full layers positions are divided by F, and inputs may be as much longer.",
        metavar="SCALING",
    ),
]
WindowOption = Annotated[
    int | None,
    typer.Option("--sliding-window", help="Tokens that a sliding layer sees.", show_default="the source's"),
]
PresetOption = Annotated[
    str | None,
    typer.Option("--preset", help="The settings of a release, as t5gemma-2-270m-270m.", metavar="NAME"),
]
KeepRowsOption = Annotated[
    bool,
    typer.Option(
        "--keep-rows",
        help="Keep all rows of the embedding table; the image token then keeps its id. By itself convert cuts a table "
        "of 262208 rows to 262144 where no id in use has one of the last 64.",
    ),
]
DropHeadsOption = Annotated[
    bool,
    typer.Option("--drop-heads", help="Leave out a head for classes, rewards or values; it is refused otherwise."),
]
ShardOption = Annotated[
    str,
    typer.Option(
        "--max-shard-size",
        help="Largest sum of tensors in one file, as 5G, 500MB or 4GiB; 1MB at least.",
        metavar="SIZE",
    ),
]
