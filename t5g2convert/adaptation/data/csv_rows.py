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
    """The lines of a file as text. Bytes that are not UTF-8 are replaced, so that a row ends where it should."""

    def __init__(self, lines: Iterator[tuple[str, bytes]]) -> None:
        self._lines = lines
        self.number = 0
        """Lines read so far."""
        self.quotes = 0
        """Double quotes since the last call of `fault`."""
        self._fault: str | None = None

    def fault(self) -> str | None:
        """Return what is wrong with the lines since the last call, if anything."""
        found, self._fault, self.quotes = self._fault, None, 0
        return found

    def __iter__(self) -> "_Decoded":
        return self

    def __next__(self) -> str:
        _, line = next(self._lines)
        self.number += 1
        self.quotes += line.count(b'"')
        if len(line) > LONGEST:
            raise ValueError(f"is longer than {LONGEST} bytes, the limit for a line; split it")
        try:
            return line.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            self._fault = self._fault or f"is not UTF-8: {error.reason} at byte {error.start} of the line"
            return line.decode("utf-8-sig", "replace")


def csv_rows(path: Path, lines: Iterator[tuple[str, bytes]], columns: Columns) -> Iterator[Row]:
    """Yield the rows of a CSV file; a row that is not valid is replaced by a `Fault`.

    Args:
        path: The file.
        lines: The place and the bytes of each of its lines.
        columns: The columns that decide the form of a row.

    Raises:
        DataError: The file has no valid header, lacks the columns, or has a row that is not valid with a quote left
            open, so that the ends of the rows behind it are not known.
    """
    csv.field_size_limit(LONGEST)
    decoded = _Decoded(lines)
    reader = csv.reader(decoded, strict=True)
    header = _header(path, reader, columns, decoded)
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
            reason = str(error) if isinstance(error, ValueError) else f"is not valid CSV: {error}"
            if decoded.quotes % 2:
                hint = "mend the file: behind a quote that is open, its rows cannot be told apart"
                raise DataError(reason, where=where, hint=hint) from None
            decoded.fault()
            yield Fault(where, reason)
            continue
        if (fault := decoded.fault()) is not None:
            yield Fault(where, fault)
        elif len(fields) == len(header):
            row = {
                name: None if name in IMAGE_KEYS and not field else field
                for name, field in zip(header, fields, strict=True)
            }
            yield row_of(where, row, columns, path.parent)
        elif fields:
            yield Fault(where, f"has {len(fields)} fields, but the header has {len(header)}")


def _header(path: Path, reader: Iterator[list[str]], columns: Columns, decoded: _Decoded) -> list[str] | None:
    """Return the names of the columns; None for an empty file."""
    try:
        header = next(reader)
    except StopIteration:
        return None
    except (csv.Error, ValueError) as error:
        raise DataError(f"has no valid header: {error}", where=f"{path}:1") from None
    if (fault := decoded.fault()) is not None:
        raise DataError(f"has no valid header: {fault}", where=f"{path}:1")
    if twice := [name for name in header if header.count(name) > 1]:
        raise DataError(f"has the column {twice[0]!r} twice", where=f"{path}:1")
    if not columns.fitting(header):
        raise DataError(columns.absence(header, "column "), where=f"{path}:1")
    return header
