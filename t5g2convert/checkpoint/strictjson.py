"""JSON as checkpoints hold it, read without mercy: one object, every key once."""

import json
from pathlib import Path
from typing import Any

from t5g2convert.errors import CheckpointError


def parse_object(text: bytes, where: Path, subject: str = "") -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: UTF-8 JSON.
        where: The file, for errors.
        subject: What the text is, if not the whole file, as the start of a sentence ("the header ").

    Raises:
        CheckpointError: It is not JSON, not an object, nested too deeply, or has a key twice.
    """
    try:
        document = json.loads(text, object_pairs_hook=_refuse_duplicates)
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{subject}names {error.key!r} twice", where=where) from None
    except RecursionError:
        raise CheckpointError(f"{subject}is nested too deeply", where=where) from None
    except ValueError as error:
        raise CheckpointError(f"{subject}is not valid JSON: {error}", where=where) from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{subject}is a JSON {type(document).__name__}, expected an object", where=where)
    return document


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return result
