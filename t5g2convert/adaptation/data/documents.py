"""Documents from text files, JSONL, Parquet and data sets, one at a time, in file order."""

import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.hub.hub_errors import network_error, without_token
from t5g2convert.checkpoint.strictjson import is_text
from t5g2convert.errors import DataError, T5g2Error, UsageError
from t5g2convert.interrupts import raise_interruption
from t5g2convert.progress import Progress

SUFFIXES: Final = (".txt", ".jsonl", ".parquet")

LONGEST: Final = 16 << 20
"""Most bytes of a document, or of a line of JSON. The tokenizer takes whole documents and needs about 120 bytes of
memory per character, 2 GB at this limit (measured with tokenizers 0.23)."""

ROWS: Final = 64
"""Rows of a Parquet file decoded at once."""

COLUMN_BYTES: Final = 1 << 20
"""Bytes of a Parquet column read at once."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its images.

    Attributes:
        where: The file with the line or row, for errors.
        text: The text.
        images: Image files, in the order of their positions.
    """

    where: str
    text: str
    images: tuple[Path, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """A document that cannot be packed, and why."""

    where: str
    reason: str


def files_of(inputs: Iterable[Path]) -> Iterator[Path]:
    """Yield the files to read: in a folder, all that end in .txt, .jsonl or .parquet, ordered by name.

    Hidden files and folders are skipped, and links to folders are not followed.

    Raises:
        DataError: An input is missing, cannot be read, or is a folder without such files.
        UsageError: A file has another ending.
    """
    for given in inputs:
        if given.is_dir():
            found = False
            for path in _walk(given):
                found = True
                yield path
            if not found:
                raise DataError(f"has no file that ends in {', '.join(SUFFIXES)}", where=given)
        elif not given.exists():
            raise DataError("no such file or folder", where=given)
        elif given.suffix.lower() not in SUFFIXES:
            raise UsageError(f"{given} ends in {given.suffix or 'nothing'}, expected {', '.join(SUFFIXES)}")
        else:
            yield _regular(given)


def _walk(folder: Path) -> Iterator[Path]:
    try:
        items = sorted(os.scandir(folder), key=lambda item: item.name)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=folder) from None
    for item in items:
        if item.name.startswith("."):
            continue
        if item.is_dir(follow_symlinks=False):
            yield from _walk(Path(item.path))
        elif Path(item.name).suffix.lower() in SUFFIXES and not item.is_dir():
            yield _regular(Path(item.path))


def _regular(path: Path) -> Path:
    if not path.is_file():
        raise DataError("is not a readable file" if path.exists() else "is a broken symlink", where=path)
    return path


def read_files(inputs: Iterable[Path], column: str, progress: Progress) -> Iterator[Document | Fault]:
    """Yield all documents of all inputs; a document that cannot be read is replaced by a `Fault`.

    Args:
        inputs: Files and folders; see `files_of`.
        column: Key or column with the text, in JSONL and Parquet.
        progress: Called with the number of bytes just read.

    Raises:
        DataError: A file cannot be read at all, or a Parquet file lacks the column.
    """
    for path in files_of(inputs):
        try:
            kind = path.suffix.lower()
            if kind == ".txt":
                yield _read_text(path, progress)
            elif kind == ".jsonl":
                yield from _read_lines(path, column, progress)
            else:
                yield from _read_parquet(path, column, progress)
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", where=path) from None


def read_dataset(name: str, split: str, column: str, subset: str | None = None) -> Iterator[Document | Fault]:
    """Stream the documents of a data set of the Hub, or of a folder that the datasets library reads.

    Args:
        name: `org/name`, or a folder.
        split: For example `train`.
        column: Column with the text.
        subset: Configuration, if the data set has several.

    Raises:
        DataError: The library cannot read it, or it lacks the column.
        HubError: The Hub does not have it, denies access, or cannot be reached.
        UsageError: The library is not installed.
    """
    datasets = _imported("datasets")
    where = f"{name}[{split}]"
    try:
        datasets.disable_progress_bars()
        # Its messages about retries contain addresses.
        datasets.logging.set_verbosity(logging.CRITICAL)
        rows = iter(datasets.load_dataset(name, subset, split=split, streaming=True))
        for number, row in enumerate(rows, 1):
            if column not in row:
                raise DataError(f"has no column {column!r}, but {_named(row)}", where=where)
            _refuse_images(row, where)
            yield _checked(f"{where}:{number}", row[column])
    except T5g2Error:
        raise
    except Exception as error:  # noqa: BLE001 - the library and the readers below it raise anything
        raise_interruption()
        raise _dataset_error(error, name, where, datasets) from None


def _dataset_error(error: Exception, name: str, where: str, datasets: Any) -> T5g2Error:
    """Translate an error of the datasets library; for a data set of the Hub, its text is not repeated.

    It quotes servers, which may quote the token.
    """
    local = Path(name).exists()
    absent = "no such folder, and no such data set on the Hub"
    if (known := network_error(error, name if local else f"datasets/{name}", absent=absent)) is not None:
        return known
    text = " ".join(without_token(str(error)).split())
    if local:
        return DataError(f"cannot be read as a data set: {text or type(error).__name__}", where=where)
    if isinstance(error, datasets.exceptions.DatasetNotFoundError):
        return DataError(absent, where=where)
    # Names of splits and configurations do not come from a server.
    names = ", ".join(re.findall(r"'([\w.-]{1,60})'", text.partition("[")[2])) or "the splits listed on its Hub page"
    if "Unknown split" in text:
        return DataError("has no such split", where=where, hint=f"--split takes one of {names}")
    if "Config name is missing" in text or "BuilderConfig" in text:
        reason = "has several configurations, or none with that name"
        return DataError(reason, where=where, hint=f"--subset takes one of {names}")
    return DataError(f"cannot be read as a data set ({type(error).__name__})", where=where)


def _read_text(path: Path, progress: Progress) -> Document | Fault:
    """Read a whole file as one document."""
    with path.open("rb") as file:
        data = file.read(LONGEST + 1)
    progress(path.stat().st_size)
    if len(data) > LONGEST:
        return Fault(str(path), f"is longer than {LONGEST} bytes, the limit for a document; split it")
    try:
        return _checked(str(path), data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return Fault(f"{path}:{line}", f"is not UTF-8: {error.reason} at byte {error.start}")


def _read_lines(path: Path, column: str, progress: Progress) -> Iterator[Document | Fault]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            progress(len(line))
            where = f"{path}:{number}"
            if len(line) > LONGEST:
                yield Fault(where, f"is longer than {LONGEST} bytes, the limit for a line; split it")
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST)
                    progress(len(line))
            elif line.strip():
                yield _row(line, where, path.parent, column)


def _row(line: bytes, where: str, folder: Path, column: str) -> Document | Fault:
    try:
        row = json.loads(line.decode("utf-8-sig").rstrip())
    except UnicodeDecodeError as error:
        return Fault(where, f"is not UTF-8: {error.reason} at byte {error.start} of the line")
    except RecursionError:
        return Fault(where, "is nested too deeply")
    except json.JSONDecodeError as error:
        return Fault(where, f"is not valid JSON: {error.msg} at column {error.colno}")
    except ValueError as error:
        return Fault(where, f"is not valid JSON: {error}")
    if not isinstance(row, dict):
        return Fault(where, f"is a JSON {type(row).__name__}, expected an object")
    if column not in row:
        return Fault(where, f"has no {column!r}, but {_named(row)}")
    images = [] if row.get("images") is None else row["images"]
    if not isinstance(images, list) or not all(isinstance(name, str) and is_text(name) for name in images):
        return Fault(where, "'images' is not a list of file names")
    for name in images:
        path = Path(name)
        if path.is_absolute() or ".." in path.parts or "\0" in name or not path.parts:
            return Fault(where, f"the image {name!r} is not a file below the folder of the JSONL")
    return _checked(where, row[column], tuple(folder / name for name in images))


def _read_parquet(path: Path, column: str, progress: Progress) -> Iterator[Document | Fault]:
    pyarrow, parquet = _imported("pyarrow"), _imported("pyarrow.parquet")
    size, reported = path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=COLUMN_BYTES) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(f"has no column {column!r}, but {_named(names)}", where=path)
            _refuse_images(names, str(path))
            rows, number = file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=ROWS, columns=[column]):
                for value in batch.column(0):
                    number += 1
                    yield _parquet_row(f"{path}:{number}", value)
                progress(size * number // rows - reported)
                reported = size * number // rows
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot be read as Parquet: {' '.join(str(error).split())}", where=path) from None


def _parquet_row(where: str, value: Any) -> Document | Fault:
    try:
        return _checked(where, value.as_py())
    except UnicodeDecodeError as error:
        return Fault(where, f"is not UTF-8: {error.reason} at byte {error.start}")


def _checked(where: str, text: object, images: tuple[Path, ...] = ()) -> Document | Fault:
    """Return a document, or a fault if its text is not valid."""
    if not isinstance(text, str):
        return Fault(where, f"the text is {'null' if text is None else f'of type {type(text).__name__}'}")
    if "\0" in text:
        return Fault(where, f"contains NUL at character {text.index(chr(0))}: it is not text")
    if not is_text(text):
        return Fault(where, "contains half of a surrogate pair")
    if len(text) > LONGEST:
        return Fault(where, f"is longer than {LONGEST} characters, the limit for a document; split it")
    return Document(where, text, images)


def _refuse_images(columns: Iterable[str], where: str) -> None:
    if "images" in columns:
        raise DataError("has a column 'images', but images are read only from JSONL", where=where)


def _named(columns: Iterable[str]) -> str:
    shown = sorted(map(str, columns))
    return ", ".join(map(repr, shown[:8])) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") or "nothing"


def _imported(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise UsageError(f"{name} is not installed: pip install 't5g2convert[adapt]'") from None
