"""JSON as checkpoints hold it, read without mercy: one object, every key once."""

import json
from collections.abc import Iterable
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
        document = json.loads(text.decode(), object_pairs_hook=_checked, parse_int=_integer)
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{subject}names {error.key!r} twice", where=where) from None
    except RecursionError:
        raise CheckpointError(f"{subject}is nested too deeply", where=where) from None
    except ValueError as error:
        raise CheckpointError(f"{subject}is not valid JSON: {error}", where=where) from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{subject}is a JSON {type(document).__name__}, expected an object", where=where)
    return document


def _integer(text: str) -> int | float:
    """A whole number; `-0` is a float to other readers of JSON."""
    return -0.0 if text == "-0" else int(text)


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ and whose texts can be written again (JSON can spell half of a surrogate pair)."""
    result = dict(pairs)
    _check_text(result)
    _check_text(result.values())
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return result


def _check_text(values: Iterable[Any]) -> None:
    """Raise a ValueError if a text among the values, or in lists of them, is not Unicode; objects check their own."""
    for value in values:
        if isinstance(value, str):
            if not value.isascii():
                value.encode()
        elif isinstance(value, list):
            _check_text(value)
