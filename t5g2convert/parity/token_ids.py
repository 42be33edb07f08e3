"""Token ids in an output's tokenizer and configs: each needs a row in the embedding table.

The converter reads a source's files in pieces; this module parses the output's files whole.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.file_names import (
    ADDED_TOKENS_FILE,
    GENERATION_FILE,
    PIECES_FILE,
    SPECIAL_TOKENS_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.folder import Checkpoint, read_json_if_there, read_json_object
from t5g2convert.checkpoint.tokenizer.files import read_pieces
from t5g2convert.checkpoint.tokenizer.special_ids import IMAGE_IDS, SECTIONS, config_ids, generation_ids

TABLE: Final = "embed_tokens.weight"


def table_rows(target: Checkpoint) -> int:
    """Return the number of rows that every table of a folder has, by its tensors and by its config."""
    rows = [
        stored.entry.shape[0] for name, stored in target.tensors.items() if name.endswith(TABLE) and stored.entry.shape
    ]
    for path in SECTIONS:
        section: Any = target.config
        for key in path:
            section = section.get(key) if isinstance(section, Mapping) else None
        size = section.get("vocab_size") if isinstance(section, Mapping) else None
        rows += [size] if type(size) is int else []
    return min(rows, default=0)


def token_faults(target: Checkpoint) -> Iterator[str]:
    """Yield the first token without a row in the folder's table, for each tokenizer file.

    Raises:
        CheckpointError: A file cannot be read, or is not JSON.
    """
    rows, seen = table_rows(target), set[str]()
    for number, token, name in _tokens(target.path):
        if type(number) is not int:
            yield f"{name}: the token {token!r} has id {number!r}, which is not a whole number"
        elif number >= rows and name not in seen:
            seen.add(name)
            yield f"{name}: the token {token!r} has id {number}, but the embedding table has {rows} rows"


def special_faults(target: Checkpoint) -> Iterator[str]:
    """Yield the fields of config.json and generation_config.json that name a token without a row.

    Raises:
        CheckpointError: generation_config.json cannot be read, or is not JSON.
    """
    rows = table_rows(target)
    named = [("", *item) for item in config_ids(target.config, images=_reads_images(target.config))]
    for name in (GENERATION_FILE, TOKENIZER_CONFIG_FILE):
        if is_there(target.path / name):
            found = generation_ids(read_json_object(target.path / name))
            named += [(f"{name}: ", *item) for item in found if name == GENERATION_FILE or item[0] not in IMAGE_IDS]
    for file, field, number in named:
        if number >= rows:
            yield f"{file}{field} is {number}, but the embedding table has {rows} rows"


def _reads_images(config: Mapping[str, Any]) -> bool:
    """Return whether a model reads images: Gemma 3 with a tower, or T5Gemma 2 with a tower that has layers."""
    if config.get("model_type") == "gemma3":
        return True
    encoder = config.get("encoder", config)
    vision = encoder.get("vision_config") if isinstance(encoder, Mapping) else None
    return isinstance(vision, Mapping) and bool(vision.get("num_hidden_layers"))


def _tokens(folder: Path) -> Iterator[tuple[Any, str, str]]:
    """Yield every id of a folder's tokenizer with its token and file; the id may be of any JSON type."""
    document, settings, listed, special = (
        read_json_if_there(folder, name)
        for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, ADDED_TOKENS_FILE, SPECIAL_TOKENS_FILE)
    )
    vocabulary = _vocabulary(document)
    if not document and is_there(folder / PIECES_FILE):
        pieces = read_pieces(folder / PIECES_FILE) or ()
        vocabulary = {piece.decode(errors="replace"): number for number, piece in enumerate(pieces)}
        yield from ((number, piece, PIECES_FILE) for piece, number in vocabulary.items())
    else:
        yield from ((number, token, TOKENIZER_FILE) for token, number in vocabulary.items())
    added: list[tuple[Any, str, str]] = []
    entries = document.get("added_tokens")
    for entry in entries if isinstance(entries, list) else ():
        if isinstance(entry, dict):
            added.append((entry.get("id"), str(entry.get("content")), TOKENIZER_FILE))
    yield from _written(document.get("post_processor"))
    yield from _written(document.get("padding"))
    decoder = settings.get("added_tokens_decoder")
    for key, value in decoder.items() if isinstance(decoder, dict) else ():
        content = value.get("content") if isinstance(value, dict) else value
        added.append((int(key) if key.isdecimal() else key, str(content), TOKENIZER_CONFIG_FILE))
    added += [(number, token, ADDED_TOKENS_FILE) for token, number in listed.items()]
    yield from added
    if vocabulary:
        # A loader gives the next ids to tokens without one.
        named = [(name, TOKENIZER_CONFIG_FILE) for name in _names(settings)]
        named += [(name, SPECIAL_TOKENS_FILE) for name in _names(special)]
        top = len(vocabulary) - 1
        ids = {token: number for token, number in vocabulary.items() if type(number) is int}
        for token, name in [*((token, name) for _, token, name in added), *named]:
            if token not in ids:
                ids[token] = top + 1
                yield ids[token], token, name
            top = max(top, ids[token])


def _written(node: Any) -> Iterator[tuple[Any, str, str]]:
    """Yield the ids that a post-processor or padding adds to texts."""
    if not isinstance(node, dict):
        return
    if "pad_id" in node:
        yield node["pad_id"], str(node.get("pad_token")), TOKENIZER_FILE
    for name in ("sep", "cls"):
        if isinstance(pair := node.get(name), list) and len(pair) == 2:
            yield pair[1], str(pair[0]), TOKENIZER_FILE
    templates = node.get("special_tokens")
    for token, template in templates.items() if isinstance(templates, dict) else ():
        yield from ((number, token, TOKENIZER_FILE) for number in template.get("ids", ()))
    steps = node.get("processors")
    for step in steps if isinstance(steps, list) else ():
        yield from _written(step)


def _vocabulary(document: Mapping[str, Any]) -> dict[str, int]:
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        return {piece[0]: number for number, piece in enumerate(vocabulary)}
    return vocabulary if isinstance(vocabulary, dict) else {}


def _names(document: Mapping[str, Any]) -> Iterator[str]:
    for key, value in document.items():
        several = key in ("additional_special_tokens", "extra_special_tokens")
        if not several and not key.endswith("_token"):
            continue
        items = value.values() if several and isinstance(value, dict) else value if several else [value]
        for item in items or ():
            name = item.get("content") if isinstance(item, dict) else item
            if isinstance(name, str) and name:
                yield name
