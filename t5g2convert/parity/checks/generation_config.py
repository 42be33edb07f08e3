"""generation_config.json: what it should say, worked out from the source's file apart from the converter."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families.text_and_vision import TextConfig
from t5g2convert.checkpoint.file_names import GENERATION_FILE
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.folder import read_json_object
from t5g2convert.parity.checks.config import differences

TOKENS: Final = {
    "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_decoder_ids",
    "sequence_bias",
}  # fmt: skip
"""Settings that are made of ids, beside those by the name of `..._token_id`."""


def generation_faults(
    folder: Path, target: Path, writes: TextConfig, move: tuple[int, int] | None = None
) -> Iterator[str]:
    """Everything in which a generation_config.json is not the source's.

    Args:
        folder: The source's folder, or that of the decoder's parent.
        target: The converted folder.
        writes: The settings of the stack that writes, as its parent has them.
        move: Old and new id of a token that has moved.

    Raises:
        CheckpointError: A file cannot be read.
    """
    expected = {name: getattr(writes, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    if is_there(folder / GENERATION_FILE):
        given = read_json_object(folder / GENERATION_FILE)
        expected |= {name: value for name, value in given.items() if value is not None}
    if move is not None:
        for name in expected:
            if name in TOKENS or name.endswith("_token_id"):
                expected[name] = _with_new_id(expected[name], *move)
    yield from differences(expected, read_json_object(target / GENERATION_FILE))


def _with_new_id(value: Any, old: int, new: int) -> Any:
    """A value in which one id is exchanged, however deep it is."""
    if isinstance(value, list):
        return [_with_new_id(item, old, new) for item in value]
    return new if type(value) is int and value == old else value
