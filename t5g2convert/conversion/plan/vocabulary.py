"""The check that two checkpoints embed the same tokens, so that the rows of their tables correspond."""

import zlib
from array import array
from typing import Final

from t5g2convert.checkpoint.file_names import TOKENIZER_FILE
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.sources import SOURCE, VISION_FROM, Role
from t5g2convert.checkpoint.tokenizer.files import Tokenizer
from t5g2convert.errors import CheckpointError, MappingError
from t5g2convert.mapping.resolution import Resolution
from t5g2convert.mapping.schema import WeightMap

MOST_RENAMED: Final = 0.01
"""Fraction of the tokens that may differ in name: unused tokens are often renamed, and have little weight in a fit."""

HINT: Final = "use --projector zeros, which does not need a common vocabulary"


def shared_rows(resolution: Resolution, weight_map: WeightMap, donated: int) -> int:
    """Return how many rows of both embedding tables are the same tokens: all rows that the map keeps.

    The names of the tokens are compared if both checkpoints have a tokenizer.json.

    Args:
        resolution: The map applied to source and donor.
        weight_map: The map, which states how tables are cut.
        donated: Number of rows of the donor's table.

    Raises:
        CheckpointError: A tokenizer.json cannot be read, or has no vocabulary.
        HubError: The Hub refuses a tokenizer.json, or cannot be reached.
        MappingError: The tables have different numbers of rows, or their tokens have different names.
    """
    cut, vocab = weight_map.vocabulary.cut, resolution.dims["vocab"]
    # Rows after the cut differ between models, even if they are kept.
    rows, kept = cut.get(vocab, vocab), cut.get(donated, donated)
    if kept != rows:
        raise MappingError(f"the donor embeds {kept} tokens, the source {rows}: no common vocabulary", hint=HINT)
    check_names(resolution, VISION_FROM, "the donor", hint=HINT)
    return rows


def check_names(resolution: Resolution, role: Role, whose: str, *, hint: str | None = None) -> None:
    """Refuse a checkpoint with other token names than the source's, if both have a tokenizer.json.

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
    """Return whether both the source and another checkpoint have the names of their tokens."""
    return all(resolution.checkpoints[each].holds(TOKENIZER_FILE) for each in (role, SOURCE))


def _names(checkpoint: Checkpoint, rows: int, hint: str | None) -> "array[int]":
    """Return a checksum of each token's name by id, or 0 for no token; the names would take 20 times the memory."""
    document = Tokenizer(checkpoint).json
    assert document is not None, "names are compared only if both have a tokenizer.json"
    names = array("Q", bytes(8 * rows))
    for token, number in document.vocabulary().items():
        if 0 <= number < rows:
            names[number] = zlib.crc32(token.encode(errors="surrogatepass")) + 1
    if not any(names):
        raise CheckpointError("has no vocabulary of tokens by name", where=document.path, hint=hint)
    return names
