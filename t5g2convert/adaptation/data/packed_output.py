"""A folder of packed data as an output: the files that may be replaced, and the data that may be appended to."""

import hashlib
from pathlib import Path

from t5g2convert.adaptation.data.document_table import PICTURE, PICTURES, TABLE_COLUMNS
from t5g2convert.adaptation.data.image_documents import PICTURES_FILE
from t5g2convert.adaptation.data.index import INDEX_FILE, read_index
from t5g2convert.adaptation.data.packed import COUNTS_FILE, SKIPPED_FILE, Packed, check_tokenizer
from t5g2convert.adaptation.data.pairs import PAIR, PAIR_PICTURES_FILE, PAIRS_FILE
from t5g2convert.adaptation.data.token_stream import END, TOKEN, shard_name
from t5g2convert.conversion.output.ownership import ListedFile
from t5g2convert.conversion.output.recovery import leftovers
from t5g2convert.errors import DataError, OutputError


def check_packed_output(output: Path) -> None:
    """Refuse a folder that is not packed data: with a forgotten argument, OUTPUT is a folder of texts.

    Raises:
        OutputError: The folder contains other files, but no index.
    """
    if not output.is_dir() or (output / INDEX_FILE).is_file():
        return
    if {item.name for item in output.iterdir()} - leftovers(output):
        raise OutputError(
            "contains other files than packed data, and is not replaced",
            where=output,
            hint="the arguments are MODEL OUTPUT INPUT...",
        )


def open_existing(output: Path, model: Path, *, bos: bool) -> Packed:
    """Open the packed data to append to.

    Raises:
        DataError: It is missing, damaged, or was packed with another tokenizer, other tokens or another `bos`.
    """
    packed = Packed.open(output)
    check_tokenizer(packed, model)
    if packed.index.bos != bos:
        found = "--bos" if packed.index.bos else "--no-bos"
        raise DataError(f"was packed with {found}", where=output, hint=f"pass {found}, or choose another folder")
    if hashlib.sha256(packed.counts.tobytes()).hexdigest() != packed.index.counts:
        raise DataError(
            "was modified after packing: its sha256 differs",
            where=output / COUNTS_FILE,
            hint="copy the file again, or pack the data again",
        )
    return packed


def packed_listing(folder: Path) -> dict[str, ListedFile]:
    """List the files of packed data, from its index.

    Raises:
        DataError: The index is missing or not valid.
    """
    index, _ = read_index(folder)
    listed = {
        INDEX_FILE: ListedFile(),
        "text.doc": ListedFile(index.text.documents * END.itemsize, index.text.ends),
        "image.doc": ListedFile(index.image.documents * TABLE_COLUMNS * END.itemsize, index.image.ends),
        PICTURES_FILE: ListedFile(index.pictures.places * PICTURE.itemsize, index.pictures.sha256),
        COUNTS_FILE: ListedFile(index.tokens.vocabulary * END.itemsize, index.counts),
    }
    if index.has_pair_files:
        listed[PAIRS_FILE] = ListedFile(index.pair.documents * TABLE_COLUMNS * END.itemsize, index.pair.ends)
        listed[PAIR_PICTURES_FILE] = ListedFile(index.pair.places * PICTURE.itemsize, index.pair.pictures)
    for name, stream in (("text", index.text), ("image", index.image), (PAIR, index.pair)):
        for number, shard in enumerate(stream.shards):
            listed[shard_name(name, number)] = ListedFile(shard.tokens * TOKEN.itemsize, shard.sha256)
    for number, pictures in enumerate(index.pictures.shards):
        listed[shard_name(PICTURES, number)] = ListedFile(pictures.nbytes, pictures.sha256)
    if index.skipped is not None:
        listed[SKIPPED_FILE] = ListedFile(sha256=index.skipped.sha256)
    return listed
