"""generation_config.json of the output: the source's, whole, with the ids of tokens that move moved."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5g2convert.checkpoint.config import ConfigSection, Token, parse_section
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.hub import read_held
from t5g2convert.checkpoint.special_ids import GENERATION_FILE, has_ids, with_ids
from t5g2convert.errors import CheckpointError


class _Ends(ConfigSection):
    eos_token_id: Token | list[Token] | None = None


def given_generation(checkpoint: Checkpoint) -> dict[str, Any]:
    """The generation_config.json of a source, without nulls; empty where it has none.

    Raises:
        CheckpointError: It is not a JSON object, or its end tokens are not ids.
    """
    given = read_held(checkpoint, GENERATION_FILE) or {}
    parse_section(_Ends, given, checkpoint.path / GENERATION_FILE)
    return {key: value for key, value in given.items() if value is not None}


def generation_config(
    given: Mapping[str, Any], gaps: Mapping[str, Any], moves: Mapping[int, int], rows: int, where: Path
) -> dict[str, Any]:
    """Make generation_config.json of the output.

    Args:
        given: The source's, without nulls: every key is carried, known or not.
        gaps: What the map adds where the source's lacks it.
        moves: New id by old id, of the tokens that move.
        rows: Rows of the output's table.
        where: The source's file, for errors.

    Raises:
        CheckpointError: An id lies past the table, or is one that another token moves to.
    """
    check_tokens(given, moves, rows, where)

    def moved(token: Any) -> Any:
        return moves.get(token, token)

    return {**gaps, **{key: with_ids(key, value, moved) if has_ids(key) else value for key, value in given.items()}}


def check_tokens(document: Mapping[str, Any], moves: Mapping[int, int], rows: int, where: Path) -> None:
    """Refuse ids that no row is kept of, and those that another token moves to; all are named in one error.

    Args:
        document: Settings, of which those with ids are looked at.
        moves: New id by old id, of the tokens that move.
        rows: Rows of the output's table.
        where: The file, for errors.

    Raises:
        CheckpointError: There are such ids, or what should be an id is not a whole number.
    """
    faults: list[str] = []
    for key in filter(has_ids, document):

        def look(token: Any, key: str = key) -> None:
            if token is None:
                return
            if type(token) is not int:
                faults.append(f"{key} has {token!r}, expected a token id")
            elif token in moves.values() and token not in moves:
                faults.append(f"{key} has token {token}, which gives way to the one that moves there")
            elif not 0 <= moves.get(token, token) < rows:
                faults.append(f"{key} has token {token}, but the embedding table keeps {rows} rows")

        with_ids(key, document[key], look)
    if faults:
        hint = "correct the id, or remove the key"
        raise CheckpointError(faults[0], where=where, hint=hint, details=faults if len(faults) > 1 else ())
