"""Documents from text files, JSONL, Parquet and data sets, one at a time, in file order."""

import bz2
import gzip
import io
import json
import logging
import lzma
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final

from t5g2convert.adaptation.data.image_columns import IMAGE_KEYS, ImageSource, image_keys, images_of
from t5g2convert.checkpoint.hub.hub_errors import network_error, without_token
from t5g2convert.checkpoint.strictjson import is_text
from t5g2convert.errors import DataError, T5g2Error, UsageError
from t5g2convert.interrupts import raise_interruption
from t5g2convert.progress import Progress

SUFFIXES: Final = (".txt", ".jsonl", ".parquet")

COMPRESSED: Final = (".gz", ".bz2", ".xz", ".zst")
"""Endings after .txt and .jsonl; Parquet compresses its own columns."""

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
        images: Images, in the order of their positions.
    """

    where: str
    text: str
    images: tuple[ImageSource, ...] = ()


@dataclass(frozen=True, slots=True)
class Fault:
    """A document that cannot be packed, and why."""

    where: str
    reason: str


def files_of(inputs: Iterable[Path]) -> Iterator[Path]:
    """Yield the files to read: in a folder, all with an ending of documents, ordered by name.

    The endings are .txt, .jsonl and .parquet, the first two also compressed. Hidden files and folders are skipped, and
    links to folders are not followed.

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
        return endings[-2] if endings[-2:-1] in ([".txt"], [".jsonl"]) else None
    return endings[-1] if endings[-1:] and endings[-1] in SUFFIXES else None


def unread_endings(inputs: Iterable[Path]) -> Counter[str]:
    """Count the files in the folders among the inputs that are not read as documents, by their ending."""
    walked = (path for given in inputs if given.is_dir() for path in _walk(given))
    return Counter(path.suffix.lower() or "no ending" for path in walked if kind_of(path) is None)


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
            kind = kind_of(path)
            if kind == ".txt":
                yield _read_text(path, progress)
            elif kind == ".jsonl":
                yield from _read_lines(path, column, progress)
            else:
                yield from _read_parquet(path, column, progress)
        except (EOFError, zlib.error, lzma.LZMAError, gzip.BadGzipFile) as error:
            raise DataError(f"cannot be decompressed: {error}", where=path) from None
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
        loaded = _with_encoded_images(datasets.load_dataset(name, subset, split=split, streaming=True), datasets)
        folder = Path(name) if Path(name).exists() else None
        for number, row in enumerate(loaded, 1):
            if column not in row:
                raise DataError(f"has no column {column!r}, but {_named(row)}", where=where)
            yield _checked(f"{where}:{number}", row, column, IMAGE_KEYS, folder)
    except T5g2Error:
        raise
    except Exception as error:  # noqa: BLE001 - the library and the readers below it raise anything
        raise_interruption()
        raise _dataset_error(error, name, where, datasets) from None


def _with_encoded_images(loaded: Any, datasets: Any) -> Any:
    """Return a data set with the bytes of its images instead of decoded pixels."""
    encoded = datasets.Image(decode=False)
    for name, feature in (loaded.features or {}).items():
        if isinstance(feature, datasets.Image):
            loaded = loaded.cast_column(name, encoded)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            loaded = loaded.cast_column(name, datasets.Sequence(encoded))
    return loaded


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
    with _decompressed(path) as (file, _):
        data = file.read(LONGEST + 1)
    progress(path.stat().st_size)
    if len(data) > LONGEST:
        return Fault(str(path), f"is longer than {LONGEST} bytes, the limit for a document; split it")
    try:
        return _checked_text(str(path), data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        return Fault(f"{path}:{line}", f"is not UTF-8: {error.reason} at byte {error.start}")


def _read_lines(path: Path, column: str, progress: Progress) -> Iterator[Document | Fault]:
    with _decompressed(path) as (file, position):
        number = reported = 0
        while line := file.readline(LONGEST + 1):
            number += 1
            where = f"{path}:{number}"
            if len(line) > LONGEST:
                yield Fault(where, f"is longer than {LONGEST} bytes, the limit for a line; split it")
                while line and not line.endswith(b"\n"):
                    line = file.readline(LONGEST)
            elif line.strip():
                yield _row(line, where, path, column)
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
            pyarrow = _imported("pyarrow")
            file = io.BufferedReader(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, mode="r"), "zstd"))
        yield file, raw.tell


def _row(line: bytes, where: str, path: Path, column: str) -> Document | Fault:
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
    return _checked(where, row, column, image_keys(path.name), path.parent)


def _read_parquet(path: Path, column: str, progress: Progress) -> Iterator[Document | Fault]:
    pyarrow, parquet = _imported("pyarrow"), _imported("pyarrow.parquet")
    size, reported = path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path, memory_map=False, pre_buffer=False, buffer_size=COLUMN_BYTES) as file:
            names = file.schema_arrow.names
            if column not in names:
                raise DataError(f"has no column {column!r}, but {_named(names)}", where=path)
            columns = [column, *(name for name in names if name in IMAGE_KEYS)]
            rows, number = file.metadata.num_rows, 0
            for batch in file.iter_batches(batch_size=ROWS, columns=columns):
                for row in zip(*(batch.column(name) for name in columns), strict=True):
                    number += 1
                    yield _parquet_row(f"{path}:{number}", dict(zip(columns, row, strict=True)), column, path.parent)
                progress(size * number // rows - reported)
                reported = size * number // rows
    except pyarrow.ArrowException as error:
        raise DataError(f"cannot be read as Parquet: {' '.join(str(error).split())}", where=path) from None


def _parquet_row(where: str, row: Mapping[str, Any], column: str, folder: Path) -> Document | Fault:
    try:
        return _checked(where, {name: value.as_py() for name, value in row.items()}, column, IMAGE_KEYS, folder)
    except UnicodeDecodeError as error:
        return Fault(where, f"is not UTF-8: {error.reason} at byte {error.start}")


def _checked(
    where: str, row: Mapping[str, Any], column: str, keys: tuple[str, ...], folder: Path | None
) -> Document | Fault:
    """Return the document of a row, or a fault if its text or images are not valid."""
    try:
        images = images_of(row, keys, folder)
    except ValueError as error:
        return Fault(where, str(error))
    return _checked_text(where, row[column], images)


def _checked_text(where: str, text: object, images: tuple[ImageSource, ...] = ()) -> Document | Fault:
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


def _named(columns: Iterable[str]) -> str:
    shown = sorted(map(str, columns))
    return ", ".join(map(repr, shown[:8])) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") or "nothing"


def _imported(name: str) -> Any:
    from importlib import import_module

    try:
        return import_module(name)
    except ImportError:
        raise UsageError(f"{name} is not installed: pip install 't5g2convert[adapt]'") from None
