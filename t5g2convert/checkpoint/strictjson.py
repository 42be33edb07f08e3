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


def is_text(text: str) -> bool:
    """Whether a string can be written as UTF-8: JSON can spell half of a surrogate pair, which cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _integer(text: str) -> int | float:
    """A whole number; `-0` is a float to other readers of JSON."""
    return -0.0 if text == "-0" else int(text)


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object whose keys differ and whose texts can be written again."""
    result = dict(pairs)
    for key, value in result.items():
        if not (is_text(key) and _is_writable(value)):
            raise ValueError("a text holds half of a surrogate pair")
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return result


def _is_writable(value: object) -> bool:
    """Whether a value is no text that cannot be written, nor a list with one; objects were looked at before."""
    if isinstance(value, list):
        return all(map(_is_writable, value))
    return not isinstance(value, str) or is_text(value)
