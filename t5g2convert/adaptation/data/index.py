"""index.json of packed data: its contents, the model it was packed for, and the sha256 of every file."""

import hashlib
import os
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from t5g2convert.adaptation.data.tokens import ModelTokens
from t5g2convert.checkpoint.families.config_section import MAX_INTEGER, Size
from t5g2convert.checkpoint.file_store import regular_file
from t5g2convert.checkpoint.folder import scheme_of
from t5g2convert.checkpoint.manifest_section import Digest
from t5g2convert.errors import CheckpointError, DataError

INDEX_FILE: Final = "index.json"

FORMAT: Final = 3

WITHOUT_PAIRS: Final = 2
"""The format before pairs, which is still read: it has no files of them."""

MAX_BYTES: Final = 1 << 24
"""Largest index: about a hundred thousand shards."""

Count = Annotated[int, Field(ge=0, lt=2**48)]
Id = Annotated[int, Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]


class _Section(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class ShardEntry(_Section):
    """A file of tokens."""

    tokens: Annotated[int, Field(gt=0, lt=2**48)]
    sha256: Digest


class StreamEntry(_Section):
    """Documents, concatenated in shards."""

    documents: Count
    tokens: Count
    shards: tuple[ShardEntry, ...]
    ends: Digest


class PictureShardEntry(_Section):
    """A file of images."""

    nbytes: Annotated[int, Field(gt=0, lt=2**48)]
    sha256: Digest


class PicturesEntry(_Section):
    """Images: positions in documents, distinct images, their bytes in shards, and the sha256 of image.pic."""

    places: Count
    images: Count
    nbytes: Count
    shards: tuple[PictureShardEntry, ...]
    sha256: Digest


class PairEntry(StreamEntry):
    """Pairs of an input and a target.

    Attributes:
        places: The length of pair.pic, the list of their images.
        pictures: The sha256 of pair.pic.
        cut: Pairs with an input that was cut.
        too_long: Pairs that were skipped because they are too long.
    """

    places: Count
    pictures: Digest
    cut: Count = 0
    too_long: Count = 0


NO_FILE: Final = hashlib.sha256().hexdigest()

NO_PAIRS: Final = PairEntry(documents=0, tokens=0, shards=(), ends=NO_FILE, places=0, pictures=NO_FILE)


class SkippedEntry(_Section):
    """Documents that could not be packed and were skipped, as listed in their file."""

    documents: Count
    sha256: Digest


class AppendedEntry(_Section):
    """What was appended last: the sha256 of the index before, and of the rows."""

    existing: Digest
    rows: Digest


class TokensEntry(_Section):
    """Token ids of the model that the data was packed for."""

    vocabulary: Size
    bos: Id | None
    eos: Id
    pad: Id | None
    boi: Id
    eoi: Id
    image: Id
    per_image: Id
    pictures: bool


class Index(_Section):
    """index.json."""

    format: Literal[2, 3]
    tokenizer_sha256: Digest
    tokens: TokensEntry
    bos: bool
    text: StreamEntry
    image: StreamEntry
    pair: PairEntry = NO_PAIRS
    pictures: PicturesEntry
    counts: Digest
    highest: Id
    special: dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Count]
    empty: Count
    skipped: SkippedEntry | None = None
    appended: AppendedEntry | None = None

    @property
    def has_pair_files(self) -> bool:
        """Whether the data has files of pairs, which may be empty."""
        return self.format > WITHOUT_PAIRS

    @model_validator(mode="after")
    def _pairs_need_files(self) -> Self:
        if self.pair.documents and not self.has_pair_files:
            raise ValueError(f"format {self.format} has no pairs")
        return self


def read_index(folder: Path) -> tuple[Index, str]:
    """Read index.json; return it and its sha256, hexadecimal.

    Raises:
        DataError: It is missing or not valid.
    """
    if scheme := scheme_of(folder):
        raise DataError(f"expected a folder written by t5g2 pack, got an address ({scheme}//...)")
    path = folder / INDEX_FILE
    if not os.path.lexists(path):
        raise DataError("is missing: this is not a folder of packed data", where=path, hint="t5g2 pack writes one")
    check_regular(path)
    try:
        with path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot be read: {error.strerror}", where=path) from None
    if len(text) > MAX_BYTES:
        raise DataError(f"is larger than {MAX_BYTES} bytes", where=path, hint="pack the data again")
    try:
        index = Index.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        if first["loc"] == ("format",) and first["type"] == "literal_error":
            raise DataError(
                f"has format {first['input']!r}, but this version of t5g2 reads formats {WITHOUT_PAIRS} and {FORMAT}",
                where=path,
                hint="pack the data again",
            ) from None
        place = ".".join(map(str, first["loc"]))
        raise DataError(
            f"is not an index of packed data: {f'{place}: ' if place else ''}{first['msg']}",
            where=path,
            hint="pack the data again",
        ) from None
    return index, hashlib.sha256(text).hexdigest()


def check_regular(path: Path) -> None:
    """Refuse a path that is not a regular file: reading a pipe or a device would block.

    Raises:
        DataError: It is not a regular file, or cannot be read.
    """
    try:
        regular_file(path)
    except CheckpointError as error:
        raise DataError(error.message, where=path, hint="copy it again, or pack the data again") from None


def tokens_entry(tokens: ModelTokens) -> TokensEntry:
    """Return a model's token ids as an entry of the index."""
    return TokensEntry(**{name: getattr(tokens, name) for name in TokensEntry.model_fields})
