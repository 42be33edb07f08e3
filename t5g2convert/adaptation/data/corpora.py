"""The corpora of a run: one folder of packed data, or several with weights, listed in a YAML file.

::

    corpora:
      - {data: packed/web, weight: 0.7}
      - {data: packed/code, weight: 0.3}

Folders are relative to the file. A weight is the corpus's share of the text tokens that a run reads, and of its
documents with images among the corpora that have some; the sum of all weights need not be 1.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

from numpy.typing import NDArray
from pydantic import Field, field_validator

from t5g2convert.adaptation.data.packed import Packed, check_tokenizer
from t5g2convert.adaptation.data.token_stream import END, mapped_array
from t5g2convert.adaptation.declarations import read_declaration
from t5g2convert.checkpoint.manifest_section import digest_of
from t5g2convert.errors import DataError
from t5g2convert.mapping.schema import Declaration

PLAIN: Final = r"^[^\x00-\x1f\x7f-\x9f]+$"
"""Names without control characters: they are printed."""


class CorpusEntry(Declaration):
    """A corpus in the file."""

    data: str = Field(
        max_length=4096, pattern=PLAIN, description="A folder that `t5g2 pack` wrote, relative to the file."
    )
    weight: float = Field(ge=1e-6, le=1e6, description="Its share of the tokens, relative to the other weights.")


class CorporaFile(Declaration):
    """The file."""

    format: Literal[1] = 1
    corpora: Annotated[tuple[CorpusEntry, ...], Field(min_length=1, strict=False)]

    @field_validator("corpora")
    @classmethod
    def _listed_once(cls, corpora: tuple[CorpusEntry, ...]) -> tuple[CorpusEntry, ...]:
        names = [corpus.data for corpus in corpora]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"{name!r} is listed twice")
        return corpora


@dataclass(frozen=True)
class Corpus:
    """A corpus of a run.

    Attributes:
        name: Its folder, as the file lists it.
        packed: The data.
        weight: Its weight, as the file gives it.
    """

    name: str
    packed: Packed
    weight: float = 1.0

    @property
    def exact(self) -> Fraction:
        """The weight as the decimal fraction that the file has."""
        return Fraction(repr(self.weight))

    @cached_property
    def ends(self) -> NDArray[Any]:
        """The end of each document without images, in tokens from the start, uint64 [documents], memory-mapped."""
        return mapped_array(self.packed.folder / "text.doc", END, (self.packed.index.text.documents,))


class Corpora:
    """All corpora of a run.

    Args:
        corpora: At least one.
    """

    def __init__(self, corpora: Sequence[Corpus]) -> None:
        self._corpora = tuple(corpora)
        total = sum(corpus.exact for corpus in corpora)
        self.shares = tuple(corpus.exact / total for corpus in corpora)
        """The share of each corpus; all together are 1."""

    @classmethod
    def open(cls, path: Path) -> Self:
        """Open a folder written by `t5g2 pack`, or all those that a file lists.

        Raises:
            DataError: Data is missing or damaged, or is listed twice.
            MappingError: The file is not valid.
        """
        if not path.is_file():
            return cls([Corpus(path.name, Packed.open(path))])
        corpora = [Corpus(entry.data, Packed.open(path.parent / entry.data), entry.weight) for entry in _entries(path)]
        for number, corpus in enumerate(corpora):
            for other in corpora[:number]:
                if other.packed.sha256 == corpus.packed.sha256:
                    raise DataError(f"{other.name} and {corpus.name} have the same data", where=path)
        return cls(corpora)

    def __len__(self) -> int:
        return len(self._corpora)

    def __getitem__(self, number: int) -> Corpus:
        return self._corpora[number]

    def __iter__(self) -> Iterator[Corpus]:
        return iter(self._corpora)

    @property
    def sha256(self) -> str:
        """The identity of the data: of one corpus its own, of several a hash over their sha256 and shares."""
        if len(self) == 1:
            return self._corpora[0].packed.sha256
        return digest_of([[corpus.packed.sha256, str(share)] for corpus, share in zip(self, self.shares, strict=True)])

    @property
    def tokens(self) -> int:
        """Tokens of all documents without images."""
        return sum(corpus.packed.tokens for corpus in self)

    @property
    def pairs(self) -> int:
        """Pairs of all corpora."""
        return sum(len(corpus.packed.pairs) for corpus in self)

    def to_json(self) -> list[dict[str, Any]]:
        """Return the corpora as in run.json."""
        return [{"data": each.name, "sha256": each.packed.sha256, "weight": each.weight} for each in self]

    def check_tokenizer(self, model: Path) -> None:
        """Refuse data that was packed for a model with another tokenizer or other tokens.

        Raises:
            DataError: They differ.
            CheckpointError: The model has no config or no tokenizer.
        """
        for corpus in self:
            check_tokenizer(corpus.packed, model)

    def check_bytes(self, *, part: int, parts: int) -> None:
        """Compare the sha256 of this part's share of all files.

        Raises:
            DataError: Files cannot be read or were modified; all of the first such corpus are listed.
        """
        for corpus in self:
            corpus.packed.check_bytes(part=part, parts=parts)


def folders_of(path: Path) -> tuple[Path, ...]:
    """Return the folders that `Corpora.open` reads.

    Raises:
        MappingError: The file is not valid.
    """
    return tuple(path.parent / entry.data for entry in _entries(path)) if path.is_file() else (path,)


def _entries(path: Path) -> tuple[CorpusEntry, ...]:
    return read_declaration(path, CorporaFile, CorpusEntry).corpora
