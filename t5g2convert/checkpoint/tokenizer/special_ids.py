"""The token ids that config.json and generation_config.json name."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

SECTIONS: Final = ((), ("text_config",), ("encoder",), ("encoder", "text_config"), ("decoder",))
"""The sections of config.json that name tokens, in Gemma and T5Gemma."""

IMAGE_IDS: Final = frozenset(
    {
        "boi_token_index", "eoi_token_index", "image_token_index", "boi_token_id", "eoi_token_id", "image_token_id",
    }
)  # fmt: skip
"""Tokens that a model needs only if it reads images; configs without images may name ids past the table."""

GENERATED_IDS: Final = frozenset(
    {
        "suppress_tokens", "begin_suppress_tokens", "bad_words_ids", "force_words_ids", "forced_decoder_ids",
        "sequence_bias",
    }
)  # fmt: skip
"""Settings of generation_config.json that hold token ids, with names other than `..._token_id`."""


def config_ids(config: Mapping[str, Any], *, images: bool) -> Iterator[tuple[str, int]]:
    """Yield the ids of tokens in config.json, each with the path of its field.

    Null and negative numbers are not ids.

    Args:
        config: config.json.
        images: Whether the model reads images; otherwise image tokens are left out.

    Example:
        >>> list(config_ids({"eos_token_id": [1, 106], "text_config": {"pad_token_id": 0}}, images=False))
        [('eos_token_id', 1), ('eos_token_id', 106), ('text_config.pad_token_id', 0)]
    """
    for path in SECTIONS:
        section: Any = config
        for key in path:
            section = section.get(key) if isinstance(section, Mapping) else None
        if not isinstance(section, Mapping):
            continue
        for name, value in section.items():
            if name in IMAGE_IDS and not images:
                continue
            if name.endswith("_token_id") or name in IMAGE_IDS:
                yield from ((".".join((*path, name)), number) for number in _whole_numbers(value))


def generation_ids(generation: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield the ids of tokens in generation_config.json, each with its field."""
    for name in filter(has_ids, generation):
        found: list[Any] = []
        with_ids(name, generation[name], found.append)
        yield from ((name, number) for number in _whole_numbers(found))


def has_ids(name: str) -> bool:
    """Return whether a setting of generation_config.json holds token ids."""
    return name.endswith("_token_id") or name in GENERATED_IDS


def with_ids(name: str, value: Any, change: Callable[[Any], Any]) -> Any:
    """Return the value of a setting of generation_config.json with a function applied to each token id.

    Args:
        name: The setting.
        value: Its value; lists may be nested.
        change: Called with each id, or with the value that is in the place of an id.

    Example:
        >>> with_ids("sequence_bias", [[[5, 7], 7.0]], lambda number: number + 1)
        [[[6, 8], 7.0]]
    """
    if not isinstance(value, list):
        return change(value)
    if name == "forced_decoder_ids":
        # Pairs of a position and a token.
        return [
            [*each[:1], *(change(token) for token in each[1:])] if isinstance(each, list) else each for each in value
        ]
    if name == "sequence_bias":
        # Pairs of a sequence of tokens and a bias.
        return [[with_ids("", each[0], change), *each[1:]] if isinstance(each, list) and each else change(each)
                for each in value]  # fmt: skip
    return [with_ids("", each, change) for each in value]


def _whole_numbers(value: Any) -> Iterator[int]:
    """Yield the integers from 0 in a value, which may be a nested list."""
    if isinstance(value, list):
        for item in value:
            yield from _whole_numbers(item)
    elif type(value) is int and value >= 0:
        yield value
