"""tokenizer: texts and pictures become the same tokens and pixels as in the source, except for declared token moves.

The converter replaces bytes in files that it does not parse. This module parses the files, and derives the expected
contents from the source's files. The rules for the small files are written here in code, independently of the map.
"""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families.gemma3 import Gemma3
from t5g2convert.checkpoint.file_names import (
    OLDER_TEMPLATE_FILE,
    PROCESSOR_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.folder import Checkpoint, read_json_file, read_json_if_there, read_json_object
from t5g2convert.checkpoint.manifest import Manifest, TokenRecord
from t5g2convert.checkpoint.sources import VISION_FROM, Folders
from t5g2convert.parity.reports.report import Check, failed_check
from t5g2convert.parity.token_ids import token_faults

UNCHANGED: Final = (SPECIAL_TOKENS_FILE, TEMPLATE_FILE, OLDER_TEMPLATE_FILE)

TEMPLATES: Final = "additional_chat_templates"
"""The folder of additional chat templates; transformers loads every *.jinja in it."""

IMAGE_TOKENS: Final = {
    "boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>",
}  # fmt: skip
"""The tokens that Gemma3Processor reads from the tokenizer."""

MASK: Final = "<mask>"
"""GemmaTokenizer of transformers 5 makes this token special on loading; in the releases' files it already is."""

PIXELS: Final = {
    "do_convert_rgb": True, "do_normalize": True, "do_rescale": True, "do_resize": True, "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5], "resample": 2, "rescale_factor": 1 / 255,
}  # fmt: skip
"""Gemma 3's image processor; the source's own settings override it."""

MOST_FAULTS: Final = 50


def has_tokenizer_files(target: Path, manifest: Manifest | None) -> bool:
    """Return whether a folder has, or must have, any file that the check `tokenizer` judges."""
    return bool(_names(target, manifest))


def _names(target: Path, manifest: Manifest | None) -> list[str]:
    files = {} if manifest is None else manifest.files
    known = [
        name
        for name in (TOKENIZER_FILE, TOKENIZER_CONFIG_FILE, PROCESSOR_FILE, *UNCHANGED)
        if name in files or is_there(target / name)
    ]
    return [*known, *template_names(files, target)]


def template_names(files: Iterable[str], *folders: Path) -> list[str]:
    """Return the additional chat templates that a manifest lists or that are in one of the folders."""
    found = {name for name in files if re.fullmatch(rf"{TEMPLATES}/[^/]+\.jinja", name)}
    for folder in folders:
        found |= {f"{TEMPLATES}/{path.name}" for path in (folder / TEMPLATES).glob("*.jinja")}
    return sorted(found)


def judge_tokenizer(folders: Folders, model: Gemma3, target: Checkpoint, manifest: Manifest | None) -> Check:
    """Compare the target's tokenizer and image processor with the source's.

    Args:
        folders: The source, and the donor of the vision tower, which also gives the image processor.
        model: The settings that the target should have.
        target: The converted folder, open.
        manifest: The target's manifest, which declares changes under `tokens`; None if the folder has none.

    Raises:
        CheckpointError: A file of either is not a regular file, or is not JSON.
    """
    source, seeing = folders.source, folders.by_role.get(VISION_FROM, folders.source)
    names = _names(target.path, manifest)
    changes = [] if manifest is None else manifest.tokens
    unchanged = (
        *(name for name in UNCHANGED if name in names),
        *template_names(() if manifest is None else manifest.files, source, target.path),
    )
    faults = [*token_faults(target)]
    faults += [f"{name} differs from the source's" for name in unchanged if not same_bytes(name, source, target)]
    images, index = model.vision is not None, target.config.get("image_token_index")
    found = _Tokenizer({})
    if TOKENIZER_FILE in names:
        found = _Tokenizer(read_json_object(target.path / TOKENIZER_FILE))
        given = read_json_if_there(source, TOKENIZER_FILE)
        faults += [] if is_there(source / TOKENIZER_FILE) else [f"{TOKENIZER_FILE} exists, but the source has none"]
        known = _Tokenizer(given).added
        faults += _tokenizer_faults(given, found, changes)
        faults += _image_token_faults(known, model.tokens.image_token_index, found.added, index) if images else ()
    move = (model.tokens.image_token_index, index)
    # Without a tokenizer.json only the settings are changed for the image token.
    known_there = found.added.get(IMAGE_TOKENS["image_token"], {}).get("id") == index
    moved = move[0] != move[1] and (TOKENIZER_FILE not in names or known_there)
    if TOKENIZER_CONFIG_FILE in names:
        expected = _expected_settings(
            read_json_if_there(source, TOKENIZER_CONFIG_FILE), move if moved else None, found.added, images=images
        )
        faults += _told(TOKENIZER_CONFIG_FILE, expected, read_json_object(target.path / TOKENIZER_CONFIG_FILE))
    if PROCESSOR_FILE in names:
        faults += _told(
            PROCESSOR_FILE, _expected_processor(seeing, model), read_json_object(target.path / PROCESSOR_FILE)
        )
    if faults:
        whose = "the source's" if VISION_FROM not in folders.by_role else "the source's or the donor's"
        return failed_check("tokenizer", f"setting(s) or token(s) that are not {whose} or have no row", faults)
    moves = [f"{change.token}, now {change.target}" for change in changes if change.replaces is not None]
    declared = f" but for {'; '.join(moves)}, as declared" if moves else ""
    if PROCESSOR_FILE in names and VISION_FROM not in folders.by_role:
        told = f"tokens and pixels match the source's{declared}"
    else:
        kept = [f"tokens match the source's{declared}"] if {*names} - {PROCESSOR_FILE} else []
        told = ", ".join([*kept, *(["pixels match the donor's"] if PROCESSOR_FILE in names else [])])
    return Check("tokenizer", True, f"{', '.join(names)}: {told}")


def judge_copied_tokenizer(folders: Folders, target: Checkpoint, manifest: Manifest | None) -> Check:
    """Require that no file of the tokenizer differs from the source's.

    Raises:
        CheckpointError: A file of either cannot be read.
    """
    return judge_copied_files(_names(target.path, manifest), folders.source, target)


def judge_copied_files(names: Sequence[str], source: Path, target: Checkpoint) -> Check:
    """Require files that equal the source's byte for byte, with a row for every token.

    Raises:
        CheckpointError: A file of either cannot be read.
    """
    faults = [*token_faults(target)]
    faults += [f"{name} differs from the source's" for name in names if not same_bytes(name, source, target)]
    if faults:
        return failed_check("tokenizer", "file(s) or token(s) that differ from the source's or have no row", faults)
    return Check("tokenizer", True, f"{', '.join(names)}: identical to the source's")


def same_bytes(name: str, source: Path, target: Checkpoint) -> bool:
    """Return whether both have a file of that name with the same bytes.

    Raises:
        CheckpointError: Either is not a file, or cannot be read.
    """
    if not (is_there(source / name) and is_there(target.path / name)):
        return False
    return read_json_file(source / name) == read_json_file(target.path / name)


class _Tokenizer:
    """A tokenizer.json: its text in a normal form, and copies of its added tokens by content."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        # The text takes a tenth of the memory of the parsed objects.
        self.text = json.dumps(document)
        listed = document.get("added_tokens")
        entries = [dict(entry) for entry in listed if isinstance(entry, dict)] if isinstance(listed, list) else []
        self.added = {entry["content"]: entry for entry in entries if type(entry.get("content")) is str}


def _tokenizer_faults(given: dict[str, Any], found: _Tokenizer, changes: Sequence[TokenRecord]) -> list[str]:
    """Return the faults of a tokenizer.json; `given` is the source's, to which the declared changes are applied."""
    try:
        expected = json.dumps(_changed(given, changes))
    except (LookupError, TypeError, AttributeError, ValueError) as error:
        return [
            f"t5g2.json declares tokens that do not fit the source's {TOKENIZER_FILE}: {type(error).__name__} {error}"
        ]
    if found.text == expected:
        return []
    told = _told(TOKENIZER_FILE, given, json.loads(found.text))
    return told or [f"{TOKENIZER_FILE} has its keys in a different order from the source's"]


def _changed(tokenizer: dict[str, Any], changes: Sequence[TokenRecord]) -> dict[str, Any]:
    """Return a tokenizer with the declared changes; refuse a change that does not describe the source correctly."""
    entries: list[dict[str, Any]] = tokenizer["added_tokens"] if changes else []
    for change in changes:
        token, number, replaced = change.token, change.target, change.replaces
        if change.source not in (None, number):
            (old,) = (entry for entry in entries if (entry["id"], entry["content"]) == (change.source, token))
            entries.remove(old)
        was = token if replaced is None else replaced
        (entry,) = (entry for entry in entries if (entry["id"], entry["content"]) == (number, was))
        entry |= {"content": token, "special": True}
        if replaced is not None:
            vocabulary = tokenizer["model"]["vocab"]
            if vocabulary[replaced] != number or token in vocabulary:
                raise ValueError(f"{replaced} is not {number}, or {token} already exists")
            # Added tokens are in the order of their ids.
            tokenizer["model"]["vocab"] = {
                token if name == replaced else name: value for name, value in vocabulary.items()
            }
    return tokenizer


def _image_token_faults(
    known: Mapping[str, Mapping[str, Any]], old: int, added: Mapping[str, Mapping[str, Any]], new: Any
) -> Iterator[str]:
    """Require that the source's image token has the image token id of the target's encoder."""
    for name, entry in known.items():
        if entry.get("id") == old and (found := added.get(name, {}).get("id")) != new:
            yield f"{TOKENIZER_FILE}: {name} has id {found}, the encoder's image_token_index is {new}"


def _expected_settings(
    given: Mapping[str, Any], move: tuple[int, Any] | None, added: Mapping[str, Mapping[str, Any]], *, images: bool
) -> dict[str, Any]:
    """Return the expected tokenizer_config.json; `move` is the image token's old and new id if it moved."""
    expected = {key: value for key, value in given.items() if images or key != "processor_class"}
    if move is None:
        return expected
    old, new = move
    names = {"tokenizer_class": "GemmaTokenizer"}
    names |= {"processor_class": "Gemma3Processor", **IMAGE_TOKENS} if images else {}
    expected = {**names, **expected}
    for key, value in expected.items():
        if key.endswith("_token_id") and value == old:
            expected[key] = new
    decoder = expected.get("added_tokens_decoder")
    if isinstance(decoder, dict):
        decoder = {key: value for key, value in decoder.items() if key != str(old)}
        for key, value in decoder.items():
            flags = value if isinstance(value, dict) else {}
            if key == str(new):
                decoder[key] = {**flags, "content": IMAGE_TOKENS["image_token"], "special": True}
            elif flags.get("content") == MASK and MASK in added:
                decoder[key] = {**flags, "special": added[MASK].get("special")}
        expected["added_tokens_decoder"] = decoder
    return expected


def _expected_processor(source: Path, model: Gemma3) -> dict[str, Any]:
    """Return the expected processor_config.json; transformers 4 had the image processor in preprocessor_config.json."""
    given = read_json_if_there(source, PROCESSOR_FILE)
    image = given.get("image_processor") or read_json_if_there(source, "preprocessor_config.json")
    side = None if model.vision is None else model.vision.image_size
    own = {key: value for key, value in image.items() if key != "processor_class"}
    return {
        "image_seq_length": model.tokens.mm_tokens_per_image,
        **given,
        "processor_class": "Gemma3Processor",
        "image_processor": {
            **PIXELS,
            **own,
            "size": {"height": side, "width": side},
            "image_processor_type": "Gemma3ImageProcessor",
        },
    }


def _told(name: str, expected: Any, found: Any) -> list[str]:
    return [f"{name}: {fault}" for fault in islice(_differences(expected, found, ""), MOST_FAULTS)]


def _differences(expected: Any, found: Any, at: str) -> Iterator[str]:
    """Yield all differences between two JSON documents, with their key paths."""
    if isinstance(expected, dict) and isinstance(found, dict):
        for key in expected.keys() | found.keys() if expected.keys() != found.keys() else expected:
            place = f"{at}.{key}" if at else key
            if key not in found:
                yield f"{place} is missing"
            elif key not in expected:
                yield f"{place} is {_short(found[key])}, which the source does not have"
            else:
                yield from _differences(expected[key], found[key], place)
    elif isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        for position, pair in enumerate(zip(expected, found, strict=True)):
            yield from _differences(*pair, f"{at}[{position}]")
    elif type(expected) is not type(found) or expected != found:
        yield f"{at} is {_short(found)}, expected {_short(expected)}"


def _short(value: Any) -> str:
    """Return a value in few words."""
    if isinstance(value, list):
        return f"a list of {len(value)}"
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
