"""The journal of a pack, from which `--resume` continues it: how far it was, at the end of some batch.

It is a file in the staging folder: a line with the sha256 of the rest, and a JSON object. It lists for each file how
many of its bytes belong to that moment, and is replaced by one rename when the disk has these bytes. What was written
later is cut off and written again, so a run may be killed at any moment.

Rows are read again from the start, and passed over without tokenizing. Their sha256 must be that of the rows that the
interrupted run read.
"""

import base64
import hashlib
import json
import os
import stat
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Final, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from t5g2convert.adaptation.data.index import Count, TokensEntry
from t5g2convert.adaptation.data.output_files import FileState
from t5g2convert.adaptation.data.rows import Fault
from t5g2convert.adaptation.data.token_stream import END
from t5g2convert.checkpoint.atomic_write import clear, flush_folder, replace_file
from t5g2convert.checkpoint.manifest_section import Digest
from t5g2convert.conversion.output.recovery import JOURNAL_FILE
from t5g2convert.conversion.write.copy import output_errors
from t5g2convert.errors import DataError, OutputError

SAVE_SECONDS: Final = 30.0
"""Seconds between two writings of the journal, at least."""

SAVE_SHARE: Final = 0.02
"""Largest share of the time that is spent on the journal: if writing it takes longer, it is written less often."""

ANEW_HINT: Final = "pack again without --resume"

T = TypeVar("T")


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Deciding(_Section):
    """All that decides the bytes of packed data, except the rows.

    Attributes:
        version: The version of t5g2.
        tokenizer_sha256: sha256 of tokenizer.json.
        tokens: The token ids of the model.
        bos: Whether documents start with bos.
        shard_tokens: Tokens per shard.
        pairs: The options of pairs, with the limits of the model.
        template: sha256 of the files with the chat template.
        existing: sha256 of the index of the data that is appended to.
    """

    version: str
    tokenizer_sha256: Digest
    tokens: TokensEntry
    bos: bool
    shard_tokens: int
    pairs: str
    template: Digest
    existing: Digest | None

    def differences(self, now: "Deciding") -> list[str]:
        """Return what the interrupted run had that this one has not."""
        found = []
        if self.version != now.version:
            found.append(f"version {self.version} of t5g2, not {now.version}")
        if (self.tokenizer_sha256, self.tokens) != (now.tokenizer_sha256, now.tokens):
            found.append("another tokenizer or other tokens")
        if self.template != now.template:
            found.append("another chat template")
        if self.bos != now.bos:
            found.append("--bos" if self.bos else "--no-bos")
        if self.shard_tokens != now.shard_tokens:
            found.append(f"--shard-tokens {self.shard_tokens}, not {now.shard_tokens}")
        if self.pairs != now.pairs:
            found.append(f"{self.pairs}, not {now.pairs}")
        if self.existing != now.existing:
            other = "other data to append to" if now.existing is not None else "--append"
            found.append("no --append" if self.existing is None else other)
        return found


@dataclass(frozen=True, slots=True)
class Mark:
    """How far the input was read at the end of a batch.

    Attributes:
        rows: Rows so far.
        sha256: Their sha256.
        documents: Documents and pairs so far, with those that are empty or cannot be packed.
        blank: Those without text; with an earlier run, all that it found empty.
        plain_placeholders: Those without images that have a placeholder in their text.
    """

    rows: int
    sha256: str
    documents: int
    blank: int
    plain_placeholders: int


class PackState(_Section):
    """A pack at the end of a batch.

    Attributes:
        format: The format of the journal.
        deciding: What decides the bytes.
        rows, sha256, documents, plain_placeholders: See `Mark`.
        empty: Documents without text or tokens, also of the existing data.
        cut: Pairs with an input that was cut, also of the existing data.
        too_long: Pairs that were skipped because they are too long, also of the existing data.
        losing: Images of which 8-bit RGB loses something.
        faults: The documents that cannot be packed, as JSON: number, where, reason.
        counts: The occurrences of each token, compressed.
        files: The files, by name.
    """

    format: Literal[1]
    deciding: Deciding
    rows: Count
    sha256: Digest
    documents: Count
    empty: Count
    cut: Count
    too_long: Count
    plain_placeholders: Count
    losing: Count
    faults: str
    counts: str
    files: dict[str, FileState]

    def read_faults(self) -> dict[int, Fault]:
        """Return the documents that cannot be packed, by number."""
        return {number: Fault(where, reason) for number, where, reason in json.loads(self.faults)}

    def read_counts(self) -> NDArray[np.uint64]:
        """Return the occurrences of each token, [vocabulary]."""
        return np.frombuffer(zlib.decompress(base64.b64decode(self.counts)), END).astype(np.uint64)


def faults_text(faults: dict[int, Fault], documents: int) -> str:
    """Return the faults among the first documents as ASCII; file names need not be UTF-8."""
    return json.dumps([(number, it.where, it.reason) for number, it in sorted(faults.items()) if number < documents])


def counts_text(counts: NDArray[np.uint64]) -> str:
    """Return the occurrences of each token, compressed."""
    return base64.b64encode(zlib.compress(counts.astype(END).tobytes(), 1)).decode()


class Journal:
    """The journal of a pack.

    Args:
        folder: The staging folder.
        deciding: What decides the bytes of this run.
        flush: Wait until all bytes are on disk.
    """

    def __init__(self, folder: Path, deciding: Deciding, *, flush: bool) -> None:
        self.path, self.deciding, self._flush = folder / JOURNAL_FILE, deciding, flush
        self._next = time.monotonic() + SAVE_SECONDS

    @property
    def is_due(self) -> bool:
        """Whether it is time to write the journal."""
        return time.monotonic() >= self._next

    def save(self, make: Callable[[], PackState]) -> None:
        """Write the journal.

        Args:
            make: Returns the state, after all bytes of the files that it lists are on disk.

        Raises:
            OutputError: The disk is full or fails.
        """
        began = time.monotonic()
        body = make().model_dump_json().encode()
        with output_errors(self.path):
            if self._flush:
                # The names of new files must not come after the journal.
                flush_folder(self.path.parent)
            replace_file(self.path, hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
            if self._flush:
                flush_folder(self.path.parent)
        ended = time.monotonic()
        self._next = ended + max(SAVE_SECONDS, (ended - began) * (1 / SAVE_SHARE - 1))

    def read(self) -> PackState | None:
        """Return the state of an interrupted run, and remove all that is not part of it; None if there is no journal.

        Raises:
            DataError: The run had another tokenizer, other options or other data to append to.
            OutputError: The journal is damaged, or the folder cannot be read or cleared.
        """
        if not os.path.lexists(self.path):
            with output_errors(self.path.parent):
                clear(self.path.parent)
            return None
        state = self._parsed()
        if different := state.deciding.differences(self.deciding):
            raise DataError(
                f"the interrupted pack had {', '.join(different)}",
                where=self.path.parent,
                hint="continue with the same, or pack again without --resume",
            )
        with output_errors(self.path.parent):
            clear(self.path.parent, keep={JOURNAL_FILE, *state.files})
        return state

    def remove(self) -> None:
        """Remove the journal, so that nothing of this run is kept.

        Raises:
            OutputError: It cannot be removed.
        """
        with output_errors(self.path):
            self.path.unlink(missing_ok=True)

    def _parsed(self) -> PackState:
        try:
            status = self.path.lstat()
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.geteuid():
                raise ValueError("not a regular file of this user")
            digest, _, body = self.path.read_bytes().partition(b"\n")
            if hashlib.sha256(body).hexdigest().encode() != digest:
                raise ValueError("its sha256 differs")
            return PackState.model_validate_json(body)
        except OSError as error:
            raise OutputError(f"cannot be read: {error.strerror}", where=self.path, hint=ANEW_HINT) from None
        except (ValueError, ValidationError):
            raise OutputError(
                "is not a journal of this version's pack, or is damaged", where=self.path, hint=ANEW_HINT
            ) from None


class InputDigest:
    """The sha256 of all rows so far: their texts, images and the places they come from.

    Of an image that is a file, only the path, the size and the modification time are taken.

    Args:
        begun: The state of an interrupted run.

    Attributes:
        rows: Rows so far.
    """

    def __init__(self, begun: PackState | None) -> None:
        self.rows = 0
        self._begun = begun
        self._sha256 = hashlib.sha256()

    @property
    def sha256(self) -> str:
        """The sha256 so far, hexadecimal."""
        return self._sha256.hexdigest()

    def follow(self, rows: Iterable[T]) -> Iterator[T]:
        """Yield all rows but those that the interrupted run packed.

        Raises:
            DataError: Those are not the same as then.
        """
        begun = self._begun
        for row in rows:
            self._sha256.update(_bytes_of(row))
            self.rows += 1
            if begun is None or self.rows > begun.rows:
                yield row
            elif self.rows == begun.rows and self.sha256 != begun.sha256:
                raise _changed(begun)
        if begun is not None and self.rows < begun.rows:
            raise _changed(begun)


def _changed(begun: PackState) -> DataError:
    return DataError(
        f"the input changed since the pack was interrupted, among its first {begun.rows:,} documents", hint=ANEW_HINT
    )


def _bytes_of(value: object) -> bytes:
    """Return bytes that differ for different values: rows, faults, and what they consist of."""
    if isinstance(value, str):
        kind, data = b"s", value.encode("utf-8", "surrogatepass")
    elif isinstance(value, bytes):
        kind, data = b"b", value
    elif isinstance(value, Path):
        kind, data = b"p", _bytes_of((str(value), repr(_identity(value))))
    elif isinstance(value, Mapping):
        kind, data = b"m", b"".join(map(_bytes_of, value.items()))
    elif isinstance(value, list | tuple):
        kind, data = b"t", b"".join(map(_bytes_of, value))
    elif is_dataclass(value):
        kind, data = b"d", _bytes_of((type(value).__name__, *(getattr(value, field.name) for field in fields(value))))
    else:
        kind, data = b"o", repr(value).encode()
    return b"%b%d:%b" % (kind, len(data), data)


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except (OSError, ValueError):
        return None
    return status.st_size, status.st_mtime_ns
