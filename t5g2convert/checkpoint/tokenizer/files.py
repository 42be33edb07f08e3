"""The tokenizer files of a checkpoint, each read and parsed once, when it is first needed."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.file_names import (
    ADDED_TOKENS_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from t5g2convert.checkpoint.folder import Checkpoint, read_json_file
from t5g2convert.checkpoint.header import FileIdentity
from t5g2convert.checkpoint.hub.model import fetch, read_held
from t5g2convert.checkpoint.strictjson import parse_object
from t5g2convert.errors import CheckpointError

_STRING: Final = rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"'
_MERGES: Final = re.compile(
    rb'(?<!\\)"merges"\s*+:\s*+\[((?:[^"\[\]]++|%s|\[(?:[^"\[\]]++|%s)*+\])*+)\]' % (_STRING, _STRING), re.DOTALL
)
"""A list of merges: texts, or lists of texts. No string can hold this, as its quotes would have backslashes."""


@dataclass(frozen=True, slots=True)
class TokenizerJson:
    """tokenizer.json, read whole.

    Attributes:
        path: The file.
        identity: The file as it was before it was read.
        text: Its bytes.
    """

    path: Path
    identity: FileIdentity
    text: bytes

    @classmethod
    def read(cls, path: Path) -> "TokenizerJson":
        """Read a tokenizer.json.

        Raises:
            CheckpointError: The file cannot be read, or is too large.
        """
        try:
            identity = FileIdentity.of(path)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error
        return cls(path, identity, read_json_file(path))

    def parse(self) -> dict[str, Any]:
        """Parse the file, with an empty list in place of the merges: Gemma's would take 150 MB more.

        Raises:
            CheckpointError: It is not JSON, or has a key twice.
        """
        found = _MERGES.search(self.text)
        text = self.text if found is None else self.text[: found.start(1)] + self.text[found.end(1) :]
        return parse_object(text, self.path)


class Tokenizer:
    """The tokenizer files of a checkpoint; those of a model on the Hub are downloaded when they are first needed.

    Each property raises CheckpointError if its file cannot be read or is not JSON, and HubError if the Hub does not
    provide it.

    Args:
        checkpoint: The checkpoint.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    @cached_property
    def json(self) -> TokenizerJson | None:
        """tokenizer.json; None where there is none."""
        if not self.checkpoint.holds(TOKENIZER_FILE):
            return None
        fetch(self.checkpoint, [TOKENIZER_FILE])
        return TokenizerJson.read(self.checkpoint.path / TOKENIZER_FILE)

    @cached_property
    def settings(self) -> Mapping[str, Any] | None:
        """tokenizer_config.json; None where there is none."""
        return read_held(self.checkpoint, TOKENIZER_CONFIG_FILE)

    @cached_property
    def added_tokens(self) -> Mapping[str, Any] | None:
        """added_tokens.json; None where there is none."""
        return read_held(self.checkpoint, ADDED_TOKENS_FILE)

    @cached_property
    def special_tokens(self) -> Mapping[str, Any] | None:
        """special_tokens_map.json; None where there is none."""
        return read_held(self.checkpoint, SPECIAL_TOKENS_FILE)
