"""`t5g2 pack`."""

from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from t5g2convert.adaptation.pack_options import PackOptions
from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, print_notes
from t5g2convert.cli.convert import ProgressBar
from t5g2convert.cli.options import with_options
from t5g2convert.errors import UsageError
from t5g2convert.printable import printable


@with_options
def pack(
    model: Annotated[Path, typer.Argument(help="The converted folder to train: its tokenizer is used.")],
    output: Annotated[Path, typer.Argument(help="The folder to write.")],
    inputs: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="INPUT...",
            help="Files that end in .txt (one document each), .jsonl, .csv or .parquet, or folders of them; .gz, .bz2, "
            ".xz and .zst are decompressed. Images are files below the folder of a JSONL or CSV, or bytes in Parquet: "
            '`{"text": "<start_of_image> a cat", "image": "cat.png"}`. Rows with other keys are pairs: `input` and '
            "`target`, `prompt` and `completion`, `messages`.",
        ),
    ] = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            help="Instead of INPUT: a data set on the Hub or in a folder, loaded with the datasets library.",
        ),
    ] = None,
    split: Annotated[str, typer.Option("--split", help="Split of --dataset.")] = "train",
    subset: Annotated[
        str | None, typer.Option("--subset", help="Configuration of --dataset, if it has several.")
    ] = None,
    column: Annotated[
        str | None, typer.Option("--column", help="Key or column with the text of documents.", show_default="text")
    ] = None,
    input_column: Annotated[
        str | None,
        typer.Option("--input-column", help="Key or column with the input of pairs.", show_default="input, or prompt"),
    ] = None,
    target_column: Annotated[
        str | None,
        typer.Option("--target-column", help="Key or column with their target.", show_default="target, or completion"),
    ] = None,
    messages_column: Annotated[
        str | None,
        typer.Option(
            "--messages-column",
            help="Key or column with conversations. If any of these four is given, rows have only the forms given.",
            show_default="messages, or conversations",
        ),
    ] = None,
    show: Annotated[
        int,
        typer.Option(
            "--show",
            min=0,
            metavar="N",
            help="Afterwards, print the first N documents, documents with images, and pairs in OUTPUT, token by token.",
        ),
    ] = 0,
    *,
    options: PackOptions,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Tokenize text, images and pairs into the files that `t5g2 adapt` and `t5g2 finetune` train on.

    The name of a special token in a text, like `<eos>` or `<unused99>`, is read as plain characters.
    """
    if bool(inputs) == bool(dataset):
        raise UsageError("pass either files and folders to pack, or --dataset" + (", not both" if inputs else ""))
    from t5g2convert.adaptation.data.dataset_rows import read_dataset
    from t5g2convert.adaptation.data.documents import files_of, read_files, unread_endings
    from t5g2convert.adaptation.data.image_columns import IMAGE_ENDINGS
    from t5g2convert.adaptation.data.pack import pack_documents
    from t5g2convert.adaptation.data.rows import Columns
    from t5g2convert.adaptation.data.shown import first_samples

    sources = inputs or []
    columns = Columns(column, input_column, target_column, messages_column)
    total = sum(path.stat().st_size for path in files_of(sources))
    with ProgressBar(total, "pack") if sources else nullcontext() as bar:
        documents = (
            read_files(sources, columns, bar.advance) if bar else read_dataset(dataset or "", split, columns, subset)
        )
        folders = sources or [folder for folder in (Path(dataset or ""),) if folder.exists()]
        done = pack_documents(model, output, documents, options.replace(sources=folders))
    unread = unread_endings(sources)
    if done.index.pictures.images:
        # Rows name the images of their folder.
        unread = Counter({ending: count for ending, count in unread.items() if ending not in IMAGE_ENDINGS})
    if unread:
        endings = ", ".join(f"{count:,} {printable(ending)}" for ending, count in sorted(unread.items()))
        done = replace(done, notes=(*done.notes, f"{unread.total():,} file(s) are not read as documents: {endings}"))
    samples = first_samples(output, model, show) if show else []
    if as_json:
        emit_json({**done.to_json(), **({"samples": [each.to_json() for each in samples]} if show else {})})
        return
    index = done.index
    images = ", no images"
    if index.image.documents:
        images = f"; {index.image.documents:,} more with images, {index.image.tokens:,} tokens"
    what = f"{index.text.documents:,} documents ({index.text.tokens:,} tokens{images})"
    if index.pair.documents:
        pairs = f"{index.pair.documents:,} pairs ({index.pair.tokens:,} tokens)"
        what = f"{what} and {pairs}" if index.text.documents or index.image.documents else pairs
    where = printable(str(output))
    line = f"appended to {where}, which now has {what}" if options.append else f"packed {what} into {where}"
    console().print(line, soft_wrap=True)
    if index.empty:
        console().print(f"skipped {index.empty:,} empty documents")
    if index.skipped is not None:
        console().print(f"skipped {index.skipped.documents:,} documents that cannot be packed; see skipped.jsonl")
    if index.pair.cut:
        console().print(f"cut the beginning of {index.pair.cut:,} inputs")
    if index.pair.too_long:
        console().print(f"skipped {index.pair.too_long:,} pairs that are too long")
    for line in (line for sample in samples for line in sample.lines()):
        console().print(line, soft_wrap=True)
    print_notes(done.notes)
