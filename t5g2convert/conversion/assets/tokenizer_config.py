"""tokenizer_config.json and processor_config.json of the output, from the source's.

What a map adds fills gaps only: a source that says otherwise where it matters is refused.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.hub.model import read_held
from t5g2convert.conversion.assets.tokenizer import TokenMove
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.schema import PROCESSOR_FILE

PREPROCESSOR_FILE = "preprocessor_config.json"
"""Where transformers before 5 kept the image processor; readers of T5Gemma 2 take it from processor_config.json."""


def tokenizer_config(
    given: Mapping[str, Any],
    additions: Mapping[str, Any],
    moves: Sequence[TokenMove],
    special: Sequence[str],
    where: Path,
) -> dict[str, Any]:
    """tokenizer_config.json of the output.

    Args:
        given: The source's; empty where it has none.
        additions: Keys that it gets where it lacks them and a token moves; null takes one away in any case.
        moves: The tokens that move.
        special: Tokens that become special with them.
        where: The source's file, for errors.

    Raises:
        CheckpointError: It names another token than the one that moves, or makes use of the one that gives way.
    """
    config = {key: value for key, value in given.items() if key not in additions or additions[key] is not None}
    if not moves:
        return config
    refuse_use(config, moves, where)
    for key, value in additions.items():
        if value is None:
            continue
        if key.endswith("_token") and key in config and _content(config[key]) != value:
            raise CheckpointError(f"{key} is {_content(config[key])!r}, expected {value!r}", where=where)
        config.setdefault(key, value)
    for key, value in config.items():
        for move in moves:
            if key.endswith("_token_id") and value == move.source:
                config[key] = move.target
    if isinstance(config.get("added_tokens_decoder"), dict):
        config["added_tokens_decoder"] = _decoder(config["added_tokens_decoder"], moves, special, where)
    return config


def refuse_use(document: Mapping[str, Any], moves: Sequence[TokenMove], where: Path) -> None:
    """Refuse settings in which a token has a use that is to give way: readers would add it anew, behind the table.

    Raises:
        CheckpointError: With the token and the key that it stands under.
    """
    for move in moves:
        for key, value in document.items():
            if key != "added_tokens_decoder" and move.replaces in _texts(value):
                raise CheckpointError(
                    f"{key} names {move.replaces}, which gives way to {move.token}",
                    where=where,
                    hint="move the token elsewhere with a map of your own (--mapping)",
                )


def _texts(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, list | dict):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _texts(item)


def _content(token: Any) -> Any:
    """The text of a token, which stands alone or in an object with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _decoder(
    given: Mapping[str, Any], moves: Sequence[TokenMove], special: Sequence[str], where: Path
) -> dict[str, Any]:
    """`added_tokens_decoder`, id to token, with the tokens moved."""
    decoder = dict(given)
    for move in moves:
        for number, allowed in ((move.source, [move.token]), (move.target, [move.token, move.replaces])):
            if str(number) in decoder and _content(decoder[str(number)]) not in allowed:
                raise CheckpointError(
                    f"added_tokens_decoder has {_content(decoder[str(number)])!r} as {number}, "
                    f"expected {' or '.join(sorted(allowed))}",
                    where=where,
                )
        decoder.pop(str(move.source), None)
        if str(move.target) in decoder:
            decoder[str(move.target)] = {**_flags(decoder[str(move.target)]), "content": move.token, "special": True}
    for key, token in decoder.items():
        if isinstance(token, dict) and token.get("content") in special:
            decoder[key] = {**token, "special": True}
    return decoder


def _flags(token: Any) -> dict[str, Any]:
    return dict(token) if isinstance(token, dict) else {}


def processor_config(made: Mapping[str, Any], source: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
    """processor_config.json of the output, and the source's files that it comes of.

    The image processor's settings are the source's, from processor_config.json as transformers 5 nests them there or
    from preprocessor_config.json, and where the source has none those of the map.

    Args:
        made: What the map says, filled with the source's values.
        source: The source, or the donor of its tower.

    Raises:
        CheckpointError: The source's processor makes other images, or other counts of tokens, than the model reads.
    """
    reads = [name for name in (PROCESSOR_FILE, PREPROCESSOR_FILE) if source.holds(name)]
    given = read_held(source, PROCESSOR_FILE) or {}
    where, image = source.path / PROCESSOR_FILE, given.pop("image_processor", None)
    if image is None and PREPROCESSOR_FILE in reads:
        where = source.path / PREPROCESSOR_FILE
        image = read_held(source, PREPROCESSOR_FILE)
    if not isinstance(image := image or {}, dict):
        raise CheckpointError("image_processor is no object", where=where)
    expected = made["image_processor"]
    _agree(given, made, "image_seq_length", source.path / PROCESSOR_FILE)
    _agree(image, made, "image_seq_length", where)
    _agree(image, expected, "size", where)
    settings = {key: value for key, value in image.items() if key != "processor_class"}
    fixed = {key: made[key] for key in ("processor_class",) if key in made}
    kind = {key: expected[key] for key in ("image_processor_type",) if key in expected}
    return {**made, **given, **fixed, "image_processor": {**expected, **settings, **kind}}, tuple(reads)


def _agree(given: Mapping[str, Any], expected: Mapping[str, Any], key: str, where: Path) -> None:
    """What the model's sizes decide is the same in both, where both say it."""
    if given.get(key) is not None and key in expected and given[key] != expected[key]:
        raise CheckpointError(
            f"{key} is {given[key]!r}, the model that config.json describes needs {expected[key]!r}", where=where
        )
