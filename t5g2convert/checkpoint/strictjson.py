"""A strict JSON parser for the files of checkpoints: one object, every key once, finite numbers."""

import codecs
import json
import math
import re
from pathlib import Path
from typing import Any, Final

from t5g2convert.errors import CheckpointError

OTHER_ENCODINGS: Final = {
    codecs.BOM_UTF8: ("utf-8", "starts with a byte order mark"),
    codecs.BOM_UTF32_LE: ("utf-32", "is UTF-32 text"),
    codecs.BOM_UTF32_BE: ("utf-32", "is UTF-32 text"),
    codecs.BOM_UTF16_LE: ("utf-16", "is UTF-16 text"),
    codecs.BOM_UTF16_BE: ("utf-16", "is UTF-16 text"),
    b"{\0\0\0": ("utf-32-le", "is UTF-32 text"),
    b"\0\0\0{": ("utf-32-be", "is UTF-32 text"),
    b"{\0": ("utf-16-le", "is UTF-16 text"),
    b"\0{": ("utf-16-be", "is UTF-16 text"),
}
"""First bytes of JSON in other encodings, which editors on Windows write: the encoding, and its name for an error."""

_HALF: Final = re.compile(rb"\\u[dD][89a-fA-F]")
"""The start of an escape for half of a surrogate pair."""


def parse_object(text: bytes, where: Path, subject: str = "") -> dict[str, Any]:
    """Parse a JSON object.

    Args:
        text: UTF-8 JSON.
        where: The file, for errors.
        subject: The start of the error's sentence, if the text is not the whole file ("the header ").

    Raises:
        CheckpointError: The text is not JSON, not UTF-8, not an object, nested too deeply, or has a key twice.
    """
    if found := _other_encoding(text):
        hint = None if subject else "save it as UTF-8 without a byte order mark"
        raise CheckpointError(f"{subject}{found}, expected plain UTF-8", where=where, hint=hint)
    try:
        document = json.loads(
            text.decode(),
            # Only an escape can produce characters that UTF-8 cannot encode.
            object_pairs_hook=_checked if _HALF.search(text) else _once,
            parse_int=_integer,
            parse_float=_finite,
            parse_constant=_finite,
        )
    except _DuplicateKeyError as error:
        raise CheckpointError(f"{subject}names {error.key!r} twice", where=where) from None
    except RecursionError:
        raise CheckpointError(f"{subject}is nested too deeply", where=where) from None
    except ValueError as error:
        raise CheckpointError(f"{subject}is not valid JSON: {error}", where=where) from None
    if not isinstance(document, dict):
        raise CheckpointError(f"{subject}is a JSON {type(document).__name__}, expected an object", where=where)
    return document


def _other_encoding(text: bytes) -> str | None:
    """Describe text in an encoding other than plain UTF-8; return None if it is not in a known one."""
    for start, (encoding, found) in OTHER_ENCODINGS.items():
        if text.startswith(start):
            try:
                text.decode(encoding)
            except UnicodeDecodeError:
                return None
            return found
    return None


def is_text(text: str) -> bool:
    """Return whether a string can be encoded as UTF-8; half of a surrogate pair, which JSON can escape, cannot."""
    if text.isascii():
        return True
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _integer(text: str) -> int | float:
    """Parse a whole number; `-0` is a float to other parsers."""
    return -0.0 if text == "-0" else int(text)


def _finite(text: str) -> float:
    """Parse a number; refuse NaN and Infinity, which are not JSON and which readers of the output would refuse."""
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text[:60]} is not a finite number")
    return number


class _DuplicateKeyError(ValueError):
    def __init__(self, key: str) -> None:
        super().__init__(key)
        self.key = key


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; refuse a repeated key."""
    result = dict(pairs)
    if len(result) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(key)
            seen.add(key)
    return result


def _checked(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object; refuse texts that cannot be encoded again."""
    for key, value in pairs:
        if not (is_text(key) and _is_writable(value)):
            raise ValueError("a string contains half of a surrogate pair")
    return _once(pairs)


def _is_writable(value: object) -> bool:
    """Return whether a text, or every text in a list, can be encoded; nested objects are already checked."""
    if isinstance(value, list):
        return all(map(_is_writable, value))
    return not isinstance(value, str) or is_text(value)
