"""Prompts from a file: one text a line, or one JSON value a line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Final

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from t5g2convert.errors import UsageError
from t5g2convert.reference.generation.generator import Prompt
from t5g2convert.reference.options import GenerateOptions

JSON_SUFFIXES: Final = (".jsonl", ".ndjson")
"""The names of files with a JSON value on each line."""


class _Line(BaseModel):
    """A line of a JSON file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    prompt: str = ""
    decoder_prompt: str | None = None
    image: Annotated[str, Field(min_length=1)] | None = None


def read_prompts(path: Path, options: GenerateOptions) -> list[Prompt]:
    """Read prompts; empty lines are skipped.

    A line is the encoder's text, or the decoder's with `hide_encoder`. In a file `*.jsonl` it is a JSON string, or an
    object with `prompt`, `decoder_prompt` and `image` (a path, relative to the file).

    Args:
        path: The file.
        options: `decoder_prompt` and `image` hold for lines that do not name them.

    Raises:
        UsageError: The file cannot be read, has no prompt, or a line is not valid.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UsageError(f"{path} is not UTF-8 text") from None
    prompts = list(_prompts(path, lines, options))
    if not prompts:
        raise UsageError(f"{path} has no prompt")
    return prompts


def _prompts(path: Path, lines: list[str], options: GenerateOptions) -> Iterator[Prompt]:
    as_json = path.suffix in JSON_SUFFIXES
    for number, text in enumerate(lines, start=1):
        line = text.removesuffix("\r")
        if not line.strip():
            continue
        found = _parsed(line, f"{path}:{number}", options) if as_json else _plain(line, options)
        if options.hide_encoder and found.prompt:
            raise UsageError(f"{path}:{number}: --hide-encoder hides prompt from the decoder; use decoder_prompt")
        yield Prompt(
            found.prompt,
            options.decoder_prompt if found.decoder_prompt is None else found.decoder_prompt,
            options.image if found.image is None else path.parent / found.image,
        )


def _plain(line: str, options: GenerateOptions) -> _Line:
    return _Line(decoder_prompt=line) if options.hide_encoder else _Line(prompt=line)


def _parsed(line: str, where: str, options: GenerateOptions) -> _Line:
    try:
        value = json.loads(line)
        return _plain(value, options) if isinstance(value, str) else _Line.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        raise UsageError(f"{where}: {'.'.join(map(str, first['loc']))}: {first['msg']}".replace(": : ", ": ")) from None
    except ValueError as error:
        raise UsageError(f"{where}: not JSON: {error}") from None
