"""generation_config.json of the output: the source's, with new ids for tokens that move."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field, field_validator

from t5g2convert.checkpoint.families.config_section import ConfigSection, Number, Token, parse_section
from t5g2convert.checkpoint.file_names import GENERATION_FILE
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.hub.open_and_fetch import read_held
from t5g2convert.checkpoint.tokenizer.special_ids import has_ids, with_ids
from t5g2convert.errors import CheckpointError

Count = Annotated[int, Field(ge=0)]
Ids = list[Token]

CACHES: Final = (
    "static", "offloaded_static", "sliding_window", "hybrid", "hybrid_chunked", "offloaded_hybrid",
    "offloaded_hybrid_chunked", "dynamic", "offloaded", "quantized", "paged",
)  # fmt: skip
"""The values of cache_implementation with which transformers loads a model; it refuses any other."""


class _Known(ConfigSection):
    """The keys that transformers checks for their type when it loads a model."""

    eos_token_id: Token | Ids | None = None
    bos_token_id: Token | None = None
    pad_token_id: Token | None = None
    suppress_tokens: Ids | None = None
    begin_suppress_tokens: Ids | None = None
    max_new_tokens: Annotated[int, Field(gt=0)] | None = None
    max_length: Count | None = None
    min_length: Count | None = None
    min_new_tokens: Count | None = None
    num_beams: Count | None = None
    top_k: Count | None = None
    num_return_sequences: Count | None = None
    no_repeat_ngram_size: Count | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    min_p: Number | None = None
    repetition_penalty: Number | None = None
    do_sample: bool | None = None
    use_cache: bool | None = None
    cache_implementation: str | None = None

    @field_validator("cache_implementation")
    @classmethod
    def _is_known(cls, value: str | None) -> str | None:
        if value is not None and value not in CACHES:
            raise ValueError(f"{value!r} is not one of {', '.join(CACHES)}")
        return value


def given_generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the generation_config.json of a source without nulls; an empty dict if it has none.

    Raises:
        CheckpointError: It is not a JSON object, or a known key has a value that transformers does not accept.
        HubError: The Hub does not provide it, or cannot be reached.
    """
    given = read_held(checkpoint, GENERATION_FILE) or {}
    parse_section(_Known, given, checkpoint.path / GENERATION_FILE)
    return {key: value for key, value in given.items() if value is not None}


def generation_config(
    given: Mapping[str, Any], gaps: Mapping[str, Any], moves: Mapping[int, int], rows: int, where: Path
) -> dict[str, Any]:
    """Return generation_config.json of the output.

    Args:
        given: The source's generation_config.json, without nulls; every key is kept.
        gaps: Keys to add if the source lacks them.
        moves: The new id of each token that moves, by its old id.
        rows: Number of rows of the output's table.
        where: The source's file, for errors.

    Raises:
        CheckpointError: An id is past the table, or is the new id of another token.
    """
    check_tokens(given, moves, rows, where)

    def moved(token: Any) -> Any:
        return moves.get(token, token)

    return {**gaps, **{key: with_ids(key, value, moved) if has_ids(key) else value for key, value in given.items()}}


def check_tokens(document: Mapping[str, Any], moves: Mapping[int, int], rows: int, where: Path) -> None:
    """Refuse ids past the table, and ids that another token moves to; one error names them all.

    Args:
        document: The settings; only settings with ids are checked.
        moves: The new id of each token that moves, by its old id.
        rows: Number of rows of the output's table.
        where: The file, for errors.

    Raises:
        CheckpointError: An id is past the table, is the new id of another token, or is not an integer.
    """
    faults: list[str] = []
    for key in filter(has_ids, document):

        def check(token: Any, key: str = key) -> None:
            if token is None:
                return
            if type(token) is not int:
                faults.append(f"{key} has {token!r}, expected a token id")
            elif token in moves.values() and token not in moves:
                faults.append(f"{key} has token {token}, which is the new id of a moved token")
            elif not 0 <= moves.get(token, token) < rows:
                faults.append(f"{key} has token {token}, but the embedding table keeps {rows} rows")

        with_ids(key, document[key], check)
    if faults:
        hint = "correct the id, or remove the key"
        raise CheckpointError(faults[0], where=where, hint=hint, details=faults if len(faults) > 1 else ())
