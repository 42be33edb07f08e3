"""Documents, pairs and conversations from text files, JSONL, CSV and Parquet, one at a time, in file order."""

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

from t5g2convert.adaptation.data.csv_rows import csv_rows
from t5g2convert.adaptation.data.image_columns import IMAGE_KEYS, image_keys
from t5g2convert.adaptation.data.messages import without_nulls
from t5g2convert.adaptation.data.rows import BESIDE, LONGEST, Columns, Document, Fault, Row, checked_document, row_of
from t5g2convert.errors import DataError, UsageError
from t5g2convert.progress import Progress

SUFFIXES: Final = (".txt", ".jsonl", ".csv", ".parquet")

COMPRESSED: Final = (".gz", ".bz2", ".xz", ".zst")
"""Endings after the others; Parquet compresses its own columns."""

ROWS: Final = 64
"""Rows of a Parquet file decoded at once."""

COLUMN_BYTES: Final = 1 << 20
"""Bytes of a Parquet column read at once."""


def files_of(inputs: Iterable[Path]) -> Iterator[Path]:
    """Yield the files to read: in a folder, all with an ending of documents, ordered by name.

    The endings are .txt, .jsonl, .csv and .parquet, all but the last also compressed. Hidden files and folders are
    skipped, and links to folders are not followed.

    Raises:
        DataError: An input is missing, cannot be read, or is a folder without documents.
        UsageError: A file has another ending.
    """
    for given in inputs:
        if given.is_dir():
            found = False
            for path in _walk(given):
                if kind_of(path) is not None:
                    found = True
                    yield _regular(path)
            if not found:
                raise DataError(f"has no file that ends in {', '.join(SUFFIXES)}", where=given)
        elif not given.exists():
            raise DataError("no such file or folder", where=given)
        elif kind_of(given) is None:
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
        elif not item.is_dir():
            yield Path(item.path)


def kind_of(path: Path) -> str | None:
    """Return the ending that decides how a file is read, without a compression ending; None for other files."""
    endings = [ending.lower() for ending in path.suffixes]
    if endings[-1:] and endings[-1] in COMPRESSED:
        return endings[-2] if endings[-2:-1] and endings[-2] in SUFFIXES[:-1] else None
    return endings[-1] if endings[-1:] and endings[-1] in SUFFIXES else None


def unread_endings(inputs: Iterable[Path]) -> Counter[str]:
    """Count the files in the folders among the inputs that are not read as documents, by their ending."""
    walked = (path for given in inputs if given.is_dir() for path in _walk(given))
    return Counter(path.suffix.lower() or "no ending" for path in walked if kind_of(path) is None)


def _regular(path: Path) -> Path:
    if not path.is_file():
        raise DataError("is not a readable file" if path.exists() else "is a broken symlink", where=path)
    return path


def read_files(inputs: Iterable[Path], columns: Columns | str, progress: Progress) -> Iterator[Row]:
    """Yield all rows of all inputs; a row that cannot be read is replaced by a `Fault`.

    Args:
        inputs: Files and folders; see `files_of`.
        columns: The keys or columns that decide the form of a row, in JSONL, CSV and Parquet; a name is that of the
            text of documents.
        progress: Called with the number of bytes just read.

    Raises:
        DataError: A file cannot be read at all, or a table lacks the columns.
    """
    columns = Columns(text=columns) if isinstance(columns, str) else columns
    for path in files_of(inputs):
        try:
            kind = kind_of(path)
            if kind == ".txt":
                yield _read_text(path, progress)
            elif kind == ".jsonl":
                for where, line in _lines(path, progress):
                    if len(line) > LONGEST or line.strip():
                        yield _row(line, where, path, columns)
            elif kind == ".csv":
                yield from csv_rows(path, _lines(path, progress), columns)
            else:
                yield from _read_parquet(path, columns, progress)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise DataError(f"cannot be decompressed: {error}", where=path) from None
        except OSError as error:
            raise DataError(f"cannot be read: {error.strerror or error}", where=path) from None


def _read_text(path: Path, progress: Progress) -> Document | Fault:
    """Read a whole file as one document."""
    with _decompressed(path) as (file, _):
        data = file.read(LONGEST + 1)
    progress(path.stat().st_size)
    if len(data) > LONGEST:
        return Fault(str(path), f"is longer than {LONGEST} bytes, the limit for a document; split it")
    try:
        return checked_document(str(path), data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return Fault(f"{path}:{line}", f"is not UTF-8: {error.reason} at byte {error.start}")


def _lines(path: Path, progress: Progress) -> Iterator[tuple[str, bytes]]:
    """Yield the place and the bytes of each line; of a line that is too long, one byte more than the limit."""
    with _decompressed(path) as (file, position):
        number = reported = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            yield f"{path}:{number}", line
            if len(line) > LONGEST:
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST)
            progress(position() - reported)
            reported = position()


@contextmanager
def _decompressed(path: Path) -> Iterator[tuple[IO[bytes], Callable[[], int]]]:
    """Open a file that may be compressed; also return a function for the number of its bytes read so far."""
    with path.open("rb") as raw:
        ending = path.suffix.lower()
        file: Any = raw
        if ending == ".gz":
            file = gzip.GzipFile(fileobj=raw)
        elif ending == ".bz2":
            file = bz2.BZ2File(raw)
        elif ending == ".xz":
            file = lzma.LZMAFile(raw)  # noqa: SIM115 - closed with the file below it
        elif ending == ".zst":
            pyarrow = imported("pyarrow")
            file = io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))
        yield file, raw.tell


def _row(line: bytes, where: str, path: Path, columns: Columns) -> Row:
    if len(line) > LONGEST:
        return Fault(where, f"is longer than {LONGEST} bytes, the limit for a line; split it")
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
    return row_of(where, row, columns, path.parent, image_keys(path.name))


def _read_parquet(path: Path, columns: Columns, progress: Progress) -> Iterator[Row]:
    pyarrow, parquet = imported("pyarrow"), imported("pyarrow.parquet")
    size, reported = path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=COLUMN_BYTES) as file:
            names = file.schema_arrow.names
            forms = columns.fitting(names)
            if not forms:
                raise DataError(columns.absence(names, "column "), where=path)
            if twice := [name for name in names if names.count(name) > 1]:
                raise DataError(f"has the column {twice[0]!r} twice", where=path)
            wanted = {key for form in forms for key in form.keys} | {*IMAGE_KEYS, *BESIDE}
            read = [name for name in names if name in wanted]
            rows, number = file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=ROWS, columns=read):
                for row in zip(*(batch.column(name) for name in read), strict=True):
                    number += 1
                    yield _parquet_row(f"{path}:{number}", dict(zip(read, row, strict=True)), columns, path.parent)
                progress(size * number // rows - reported)
                reported = size * number // rows
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot be read as Parquet: {' '.join(str(error).split())}", where=path) from None


def _parquet_row(where: str, row: Mapping[str, Any], columns: Columns, folder: Path) -> Row:
    try:
        values = {name: value.as_py() for name, value in row.items()}
    except UnicodeDecodeError as error:
        return Fault(where, f"is not UTF-8: {error.reason} at byte {error.start}")
    return row_of(where, {name: without_nulls(value) for name, value in values.items()}, columns, folder)


def imported(name: str) -> Any:
    """Return an optional library.

    Raises:
        UsageError: It is not installed.
    """
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise UsageError(
            f"{name} is not installed: pip install '.[adapt]' in the folder of t5g2convert's source"
        ) from None
