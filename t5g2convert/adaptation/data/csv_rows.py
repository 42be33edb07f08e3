"""Rows of a CSV file, as Python's csv module reads it: commas, double quotes, names of columns in the first row."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from t5g2convert.adaptation.data.image_columns import IMAGE_KEYS
from t5g2convert.adaptation.data.rows import LONGEST, Columns, Fault, Row, row_of
from t5g2convert.errors import DataError

UNCLOSED: Final = "unexpected end of data"
"""What the csv module says of a quote that is not closed at the end of the file."""


class _Decoded:
    """The lines of a file as text; after a line that is not valid, the next one can be read."""

    def __init__(self, lines: Iterator[tuple[str, bytes]]) -> None:
        self._lines = lines
        self.number = 0
        """Lines read so far; the csv module does not count those that are not valid."""

    def __iter__(self) -> "_Decoded":
        return self

    def __next__(self) -> str:
        _, line = next(self._lines)
        self.number += 1
        if len(line) > LONGEST:
            raise ValueError(f"is longer than {LONGEST} bytes, the limit for a line; split it")
        try:
            return line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ValueError(f"is not UTF-8: {error.reason} at byte {error.start} of the line") from None


def csv_rows(path: Path, lines: Iterator[tuple[str, bytes]], columns: Columns) -> Iterator[Row]:
    """Yield the rows of a CSV file; a row that is not valid is replaced by a `Fault`.

    Args:
        path: The file.
        lines: The place and the bytes of each of its lines.
        columns: The columns that decide the form of a row.

    Raises:
        DataError: The file has no valid header, lacks the columns, or has a quote that is not closed.
    """
    csv.field_size_limit(LONGEST)
    decoded = _Decoded(lines)
    reader = csv.reader(decoded, strict=True)
    header = _header(path, reader, columns)
    if header is None:
        return
    while True:
        where = f"{path}:{decoded.number + 1}"
        try:
            fields = next(reader)
        except StopIteration:
            return
        except (csv.Error, ValueError) as error:
            if str(error) == UNCLOSED or "field limit" in str(error):
                raise DataError(
                    f"has a quote that is not closed within {LONGEST} characters, or before the file ends", where=where
                ) from None
            reason = str(error)
            yield Fault(where, reason if isinstance(error, ValueError) else f"is not valid CSV: {reason}")
            continue
        if len(fields) == len(header):
            row = {
                name: None if name in IMAGE_KEYS and not field else field
                for name, field in zip(header, fields, strict=True)
            }
            yield row_of(where, row, columns, path.parent)
        elif fields:
            yield Fault(where, f"has {len(fields)} fields, but the header has {len(header)}")


def _header(path: Path, reader: Iterator[list[str]], columns: Columns) -> list[str] | None:
    """Return the names of the columns; None for an empty file."""
    try:
        header = next(reader)
    except StopIteration:
        return None
    except (csv.Error, ValueError) as error:
        raise DataError(f"has no valid header: {error}", where=f"{path}:1") from None
    if twice := [name for name in header if header.count(name) > 1]:
        raise DataError(f"has the column {twice[0]!r} twice", where=f"{path}:1")
    if not columns.fitting(header):
        raise DataError(columns.absence(header, "column "), where=f"{path}:1")
    return header
