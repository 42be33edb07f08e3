"""`t5g2 pack`."""

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, print_notes
from t5g2convert.cli.convert import ProgressBar
from t5g2convert.cli.options import OverwriteOption
from t5g2convert.errors import UsageError
from t5g2convert.printable import printable


def pack(
    model: Annotated[Path, typer.Argument(help="The converted folder that is to be trained: its tokenizer is used.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Files that end in .txt (one document each), .jsonl or .parquet, or folders of them. Pictures are "
            'files below the folder of a JSONL: `{"text": "<start_of_image> a cat", "images": ["cat.png"]}`.',
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option("--dataset", help="In place of INPUT, a data set of the Hub or a folder, read by datasets."),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="For --dataset: its split.")] = "train",
    subset: Annotated[
        str | None, typer.Option("--subset", help="For --dataset: its configuration, where it has several.")
    ] = None,
    column: Annotated[str, typer.Option("--column", help="The key or column that holds the text.")] = "text",
    bos: Annotated[
        bool,
        typer.Option(
            "--bos/--no-bos",
            help="Begin each document with `<bos>`. Whether the releases did is not established; our default is not "
            "to. Each document ends with `<eos>`.",
        ),
    ] = False,
    shard_tokens: Annotated[int, typer.Option("--shard-tokens", help="Tokens of a file, 4 bytes each.")] = 1 << 28,
    flush: Annotated[
        bool, typer.Option("--flush/--no-flush", help="Wait until the disk has everything, against power loss.")
    ] = True,
    overwrite: OverwriteOption = False,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Make text and pictures into the token files that `t5g2 adapt` trains on.

    A special token's name in a text, like `<eos>` or `<unused99>`, is read as the characters that it is.
    """
    if bool(inputs) == bool(dataset):
        raise UsageError("give files or folders to pack, or --dataset" + (", not both" if inputs else ""))
    from t5g2convert.adaptation.data.documents import files_of, read_dataset, read_files
    from t5g2convert.adaptation.data.pack import pack as pack_documents

    sources = inputs or []
    total = sum(path.stat().st_size for path in files_of(sources))
    with ProgressBar(total, "pack") if sources else nullcontext() as bar:
        documents = (
            read_files(sources, column, bar.advance) if bar else read_dataset(dataset or "", split, column, subset)
        )
        done = pack_documents(
            model,
            output,
            documents,
            sources=sources or [folder for folder in (Path(dataset or ""),) if folder.exists()],
            bos=bos,
            shard_tokens=shard_tokens,
            overwrite=overwrite,
            flush=flush,
        )
    if as_json:
        emit_json(done.to_json())
        return
    index = done.index
    console().print(
        f"wrote {index.text.documents:,} documents of {index.text.tokens:,} tokens and {index.image.documents:,} with "
        f"pictures of {index.image.tokens:,} to {printable(str(output))}",
        soft_wrap=True,
    )
    if index.empty:
        console().print(f"{index.empty:,} empty documents were left out")
    print_notes(done.notes)
