"""Files beside the weights, as a plan tells of them."""

from dataclasses import dataclass
from typing import Literal

from t5g2convert.checkpoint.header import FileIdentity


@dataclass(frozen=True, slots=True)
class Splice:
    """Bytes that take the place of a file's own from `start` to `end`, counted from the start of the file."""

    start: int
    end: int
    text: bytes


@dataclass(frozen=True, slots=True)
class TokenChange:
    """A token that is special and has the id `target` in the output's tokenizer.

    Attributes:
        token: Its name.
        source: Its id as an added token of the source; None where it is none.
        target: Its id in the output.
        replaces: The name that the id had in the source; None where it had this one.
    """

    token: str
    source: int | None
    target: int
    replaces: str | None


@dataclass(frozen=True, slots=True)
class PlannedFile:
    """A file beside the weights: made while planning, or a source's file with some of its bytes exchanged.

    Attributes:
        name: Its name in the output.
        reads: The source's files that it comes of; of a file that is copied, the one.
        text: Its bytes, where it is made.
        splices: What is exchanged in the file that is copied, in the order of the file.
        identity: That file as it was when it was planned; None where nothing is copied.
    """

    name: str
    reads: tuple[str, ...]
    text: bytes | None = None
    splices: tuple[Splice, ...] = ()
    identity: FileIdentity | None = None

    @property
    def how(self) -> Literal["copied", "changed", "made"]:
        """How it comes about; a file that is made of the one of its name alone is that one, changed."""
        if self.text is None and not self.splices:
            return "copied"
        return "changed" if self.reads == (self.name,) else "made"
