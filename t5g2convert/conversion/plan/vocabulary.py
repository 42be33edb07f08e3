"""Check that two checkpoints embed the same tokens, so that the rows of their tables correspond."""

import json
import re
import zlib
from array import array
from collections.abc import Iterator
from io import BufferedReader
from typing import Final

from t5g2convert.checkpoint.file_names import TOKENIZER_FILE
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.hub.model import fetch
from t5g2convert.checkpoint.sources import SOURCE, VISION_FROM, Role
from t5g2convert.errors import CheckpointError, MappingError
from t5g2convert.mapping.resolve import Resolution
from t5g2convert.mapping.schema import WeightMap

PIECE_BYTES: Final = 1 << 18

MOST_RENAMED: Final = 0.01
"""Fraction of the tokens that may have other names: unused tokens are often renamed, and weigh little in a fit."""

HINT: Final = "--projector zeros does not need a common vocabulary"

_VOCABULARY: Final = re.compile(rb'"vocab"\s*:\s*\{')
_TOKEN: Final = re.compile(rb'\s*,?\s*"((?:[^"\\]|\\.)*+)"\s*:\s*(\d++)(?=.)', re.DOTALL)


def shared_rows(resolution: Resolution, weight_map: WeightMap, donated: int) -> int:
    """Return how many rows of both embedding tables are the same tokens: all that the map keeps of such tables.

    The names of the tokens are compared if both checkpoints have a tokenizer.json.

    Args:
        resolution: The map applied to source and donor.
        weight_map: The map, which says what is cut from tables.
        donated: Number of rows of the donor's table.

    Raises:
        CheckpointError: A tokenizer.json cannot be read, or has no vocabulary.
        HubError: The Hub refuses a tokenizer.json, or cannot be reached.
        MappingError: The tables have different numbers of rows, or their tokens different names.
    """
    cut, vocab = weight_map.vocabulary.cut, resolution.dims["vocab"]
    # Rows after the cut are each model's own, even if they are kept.
    rows, kept = cut.get(vocab, vocab), cut.get(donated, donated)
    if kept != rows:
        raise MappingError(f"the donor embeds {kept} tokens, the source {rows}: no common vocabulary", hint=HINT)
    check_names(resolution, VISION_FROM, "the donor", hint=HINT)
    return rows


def check_names(resolution: Resolution, role: Role, whose: str, *, hint: str | None = None) -> None:
    """Refuse a checkpoint with other names of tokens than the source's, if both have a tokenizer.json.

    Raises:
        CheckpointError: A tokenizer.json cannot be read, or has no vocabulary.
        HubError: The Hub refuses a tokenizer.json, or cannot be reached.
        MappingError: More than 1% of the tokens have other names.
    """
    if not has_names(resolution, role):
        return
    rows = resolution.dims["vocab"]
    theirs, ours = (_names(resolution.checkpoints[each], rows, hint) for each in (role, SOURCE))
    differing = [number for number in range(rows) if theirs[number] != ours[number]]
    if len(differing) > MOST_RENAMED * rows:
        raise MappingError(
            f"{len(differing)} of {rows} tokens have another name in {whose}'s {TOKENIZER_FILE} than in the "
            f"source's, the first is {differing[0]}: no common vocabulary",
            hint=hint,
        )


def has_names(resolution: Resolution, role: Role) -> bool:
    """Whether both the source and another checkpoint have the names of their tokens."""
    return all(resolution.checkpoints[each].holds(TOKENIZER_FILE) for each in (role, SOURCE))


def _names(checkpoint: Checkpoint, rows: int, hint: str | None) -> "array[int]":
    """Return a checksum of each token's name, by id, 0 for no token; the names would take 20 times the memory."""
    fetch(checkpoint, [TOKENIZER_FILE])
    path, names = checkpoint.path / TOKENIZER_FILE, array("Q", bytes(8 * rows))
    try:
        with path.open("rb") as file:
            for name, number in vocabulary_of(file):
                if number < rows:
                    names[number] = zlib.crc32(name) + 1
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error
    except ValueError as error:
        raise CheckpointError(f"is not valid JSON: {error}", where=path) from None
    if not any(names):
        raise CheckpointError("has no vocabulary of tokens by name", where=path, hint=hint)
    return names


def vocabulary_of(file: BufferedReader) -> Iterator[tuple[bytes, int]]:
    """Yield the tokens of `model.vocab` with their ids. It reads pieces: the whole would fill memory."""
    text, at = b"", None
    while piece := file.read(PIECE_BYTES):
        text += piece
        if at is None:
            # Inside a string, such quotes have a backslash in front or no brace behind.
            found = _VOCABULARY.search(text)
            text, at = (text[found.end() :], 0) if found else (text[-100:], None)
        if at is None:
            continue
        while found := _TOKEN.match(text, at):
            name, at = found[1], found.end()
            # The same name may be written with and without escapes.
            yield json.loads(b'"%s"' % name).encode(errors="surrogatepass") if b"\\" in name else name, int(found[2])
        text, at = text[at:], 0
        if text.lstrip().startswith(b"}"):
            return
