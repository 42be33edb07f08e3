"""tokenizer of a folder that `save_pretrained` wrote: it gives every text the same ids as the start's tokenizer.

transformers rewrites the files with other keys, another order, another class, and steps without effect spelled out. So
tokens are compared one by one, and steps by their effect. State that a training leaves in the file, like a truncation,
becomes a remark.
"""

import json
from collections.abc import Collection, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.file_names import (
    OLDER_TEMPLATE_FILE,
    PREPROCESSOR_FILE,
    PROCESSOR_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    TOKENIZER_CONFIG_FILE,
    TOKENIZER_FILE,
)
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.folder import Checkpoint, read_json_file, read_json_if_there, read_json_object
from t5g2convert.parity.reports.report import Check, failed_check

READ: Final = (
    TOKENIZER_FILE,
    TOKENIZER_CONFIG_FILE,
    SPECIAL_TOKENS_FILE,
    TEMPLATE_FILE,
    OLDER_TEMPLATE_FILE,
    PROCESSOR_FILE,
    PREPROCESSOR_FILE,
)
"""The files of the start that this check reads."""

STEPS: Final = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
FLAGS: Final = ("special", "normalized", "single_word", "lstrip", "rstrip")
NAMED: Final = (
    "bos_token", "eos_token", "pad_token", "unk_token", "mask_token", "boi_token", "eoi_token", "image_token",
)  # fmt: skip
NESTED: Final = ("extra_special_tokens", "model_specific_special_tokens")
SWITCHES: Final = (
    "add_bos_token", "add_eos_token", "add_prefix_space", "clean_up_tokenization_spaces", "do_lower_case",
    "split_special_tokens", "spaces_between_special_tokens",
)  # fmt: skip
"""Settings that change ids or texts if a class reads them."""

CLASSES: Final[Mapping[str, str]] = {
    "PreTrainedTokenizerFast": "TokenizersBackend", "GemmaTokenizerFast": "GemmaTokenizer",
}  # fmt: skip
"""Older names of classes."""

IDLE: Final[Mapping[str, Any]] = {
    "dropout": None, "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False,
    "byte_fallback": False, "ignore_merges": False, "unk_token": None,
}  # fmt: skip
"""Defaults of a token model for keys that its file omits."""

PIXELS: Final = (
    "do_normalize", "do_pan_and_scan", "do_rescale", "do_resize", "image_mean", "image_std", "resample",
    "rescale_factor", "size",
)  # fmt: skip
"""Settings that change the pixels of a picture."""

MOST: Final = 50
"""Maximum number of faults of one kind to list."""


def judge_resaved_tokenizer(start: Path, target: Checkpoint, *, rows: int) -> Check | None:
    """Compare the tokenizer with the start's; return None if the folder has no tokenizer.

    Args:
        start: The folder of the model before training.
        target: The trained folder.
        rows: Number of rows of its table; every id must be below it.

    Raises:
        CheckpointError: A file of either cannot be read.
    """
    if not is_there(target.path / TOKENIZER_FILE):
        return None
    remarks: list[str] = []
    if not is_there(start / TOKENIZER_FILE):
        return Check("tokenizer", False, f"{TOKENIZER_FILE} exists, but the start has none")
    given, found = read_json_object(start / TOKENIZER_FILE), read_json_object(target.path / TOKENIZER_FILE)
    added, named = _added(found), frozenset(_named(read_json_if_there(target.path, TOKENIZER_CONFIG_FILE)).values())
    faults = [
        f"{TOKENIZER_FILE}: {fault}"
        for fault in (*_token_faults(given, found, rows, named, remarks), *_step_faults(given, found))
    ]
    remarks += _leftovers(found)
    faults += _settings_faults(start, target.path, added)
    faults += _template_faults(start, target.path)
    faults += _pixel_faults(start, target.path, remarks)
    if faults:
        return failed_check("tokenizer", "token(s) or setting(s) that differ from the start's", faults, remarks)
    count = len(_vocabulary(found))
    detail = f"{count} tokens have the start's ids, and every step works as the start's does"
    return Check("tokenizer", True, detail, remarks=tuple(remarks))


def _vocabulary(document: Mapping[str, Any]) -> Mapping[str, Any]:
    model = document.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, list):
        return {entry[0]: [number, entry[1]] for number, entry in enumerate(vocabulary)}
    return vocabulary if isinstance(vocabulary, dict) else {}


def _added(document: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    listed = document.get("added_tokens") or ()
    return {entry["content"]: entry for entry in listed if isinstance(entry, dict)}


def _token_faults(
    given: Mapping[str, Any], found: Mapping[str, Any], rows: int, named: Collection[str], remarks: list[str]
) -> Iterator[str]:
    """Require that every token keeps its id and the `FLAGS` by which texts are split, and that new tokens have rows."""
    before, after = _vocabulary(given), _vocabulary(found)
    yield from islice(_moved(before, after), MOST)
    known, added = _added(given), _added(found)
    yield from islice(_marked(known, added, named), MOST)
    ids = {**before, **{content: entry.get("id") for content, entry in known.items()}}
    taken = {number: token for token, number in ids.items() if isinstance(number, int)}
    more = {content: entry.get("id") for content, entry in added.items() if content not in ids}
    more |= {token: number for token, number in after.items() if token not in ids}
    for token, number in sorted(more.items(), key=lambda item: str(item[1])):
        if not isinstance(number, int) or number >= rows:
            yield f"{token!r} was added with id {number}, but the table has {rows} rows"
        elif number in taken and taken[number] in after:
            yield f"{token!r} was added with id {number}, which {taken[number]!r} already has"
    if more:
        shown = ", ".join(f"{token!r} {number}" for token, number in islice(more.items(), 5))
        remarks.append(f"{len(more)} token(s) were added: {shown}{', ...' if len(more) > 5 else ''}")
    merges, others = (_merges(document) for document in (given, found))
    if merges != others:
        first = next((n for n, pair in enumerate(zip(merges, others, strict=False)) if pair[0] != pair[1]), None)
        at = f"the first difference is at number {first}" if first is not None else "one is a prefix of the other"
        yield f"has {len(others)} merges, the start's has {len(merges)}; {at}"
    models = [{**IDLE, **_without_tokens(document)} for document in (given, found)]
    for key in sorted(models[0].keys() | models[1].keys()):
        one, other = (model.get(key) or None for model in models)
        if one != other:
            yield f"model.{key} is {_short(other)}, expected {_short(one)}"


def _moved(before: Mapping[str, Any], after: Mapping[str, Any]) -> Iterator[str]:
    if before == after:
        return
    for token, number in before.items():
        if token not in after:
            yield f"token {token!r} is missing, its id was {number}"
        elif after[token] != number:
            yield f"token {token!r} has id {after[token]}, expected {number}"


def _marked(
    known: Mapping[str, Mapping[str, Any]], added: Mapping[str, Mapping[str, Any]], named: Collection[str]
) -> Iterator[str]:
    for content, entry in known.items():
        other = added.get(content)
        if other is None:
            yield f"added token {content!r} is missing"
            continue
        if other.get("id") != entry.get("id"):
            yield f"added token {content!r} has id {other.get('id')}, expected {entry.get('id')}"
        for flag in FLAGS:
            one, two = (bool(each.get(flag)) for each in (entry, other))
            # Loading makes the tokens that the settings name special, also with the start's file.
            if one != two and not (flag == "special" and two and content in named):
                yield f"added token {content!r} has {flag} {two}, expected {one}"


def _merges(document: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the merges, stored as pairs or as texts with a space between the two."""
    model = document.get("model")
    listed = model.get("merges") if isinstance(model, dict) else None
    return [tuple(each.split(" ", 1)) if isinstance(each, str) else tuple(each) for each in listed or ()]


def _without_tokens(document: Mapping[str, Any]) -> dict[str, Any]:
    model = document.get("model")
    return {key: value for key, value in (model or {}).items() if key not in ("vocab", "merges")}


def _step_faults(given: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[str]:
    for step in STEPS:
        one, other = (_plain(document.get(step)) for document in (given, found))
        if one != other:
            yield f"{step} is {_short(other)}, expected {_short(one)}"


def _plain(step: Any) -> Any:
    """Normalize a step: null if it has no effect, no list of one step, no null keys."""
    if isinstance(step, list):
        return [_plain(each) for each in step]
    if not isinstance(step, dict):
        return step
    plain = {key: _plain(value) for key, value in step.items() if value is not None}
    kind = plain.get("type")
    if kind == "TemplateProcessing":
        texts = [piece for form in ("single", "pair") for piece in plain.get(form) or ()]
        if not any("SpecialToken" in piece for piece in texts):
            return None
    if kind == "Sequence":
        (steps,) = [value for value in plain.values() if isinstance(value, list)] or [[]]
        steps = [each for each in steps if each is not None]
        if len(steps) < 2:
            return steps[0] if steps else None
    return plain


def _leftovers(found: Mapping[str, Any]) -> Iterator[str]:
    """Yield state that a tokenizer's last call left in its file; transformers sets it on every call."""
    truncation, padding = found.get("truncation"), found.get("padding")
    if isinstance(truncation, dict):
        cut = truncation.get("max_length")
        yield f"{TOKENIZER_FILE} truncates texts after {cut} tokens outside transformers"
    if isinstance(padding, dict):
        yield f"{TOKENIZER_FILE} pads texts outside transformers"


def _settings_faults(start: Path, target: Path, added: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Compare the tokens with a role (like bos_token) in all files that name them."""
    given, found = read_json_if_there(start, TOKENIZER_CONFIG_FILE), read_json_if_there(target, TOKENIZER_CONFIG_FILE)
    before, after = _named(given), _named(found)
    for name, content in before.items():
        if found and after.get(name) != content and not (name not in after and name not in NAMED[:4]):
            yield f"{TOKENIZER_CONFIG_FILE}: {name} is {after.get(name)!r}, expected {content!r}"
    expected = {**_named(read_json_if_there(start, SPECIAL_TOKENS_FILE)), **before}
    for name, content in _named(read_json_if_there(target, SPECIAL_TOKENS_FILE)).items():
        if expected.get(name, content) != content:
            yield f"{SPECIAL_TOKENS_FILE}: {name} is {content!r}, expected {expected[name]!r}"
    for switch in SWITCHES:
        # GemmaTokenizer ignores such switches: its post-processor, compared above, decides.
        if switch in found and bool(found[switch]) != bool(given.get(switch)):
            yield f"{TOKENIZER_CONFIG_FILE}: {switch} is {found[switch]!r}, expected {given.get(switch)!r}"
    kinds = [str(each["tokenizer_class"]) if each.get("tokenizer_class") else None for each in (given, found)]
    one, other = (None if kind is None else CLASSES.get(kind, kind) for kind in kinds)
    if found and given and one != other and one is not None:
        yield f"{TOKENIZER_CONFIG_FILE}: tokenizer_class is {other!r}, expected {one!r}"
    listed = found.get("added_tokens_decoder")
    for number, entry in listed.items() if isinstance(listed, dict) else ():
        token = entry.get("content") if isinstance(entry, dict) else None
        if str(added.get(str(token), {}).get("id")) != number:
            yield f"{TOKENIZER_CONFIG_FILE}: added_tokens_decoder has {token!r} as {number}, {TOKENIZER_FILE} does not"


def _named(document: Mapping[str, Any]) -> dict[str, str]:
    """Return tokens by role. A token is a text or an object with it; image tokens may be in a section of their own."""
    flat = dict(document)
    for section in NESTED:
        nested = document.get(section)
        flat = {**(nested if isinstance(nested, dict) else {}), **flat}
    found = {name: flat[name] for name in NAMED if flat.get(name) is not None}
    return {name: str(value.get("content") if isinstance(value, dict) else value) for name, value in found.items()}


def _template_faults(start: Path, target: Path) -> Iterator[str]:
    one, other = _template(start), _template(target)
    if one != other:
        told = "is gone" if other is None else "is another" if one is not None else "is new"
        yield f"the chat template {told}: copy the start's, or remove a template that it does not have"


def _template(folder: Path) -> Any:
    """Return the template that loaders use: a separate file takes precedence over the settings."""
    if is_there(folder / TEMPLATE_FILE):
        return read_json_file(folder / TEMPLATE_FILE).decode(errors="replace")
    found = read_json_if_there(folder, OLDER_TEMPLATE_FILE).get(
        "chat_template", read_json_if_there(folder, TOKENIZER_CONFIG_FILE).get("chat_template")
    )
    if isinstance(found, list):
        # Several templates by name; newer versions write all but one of them into a folder.
        found = next((each.get("template") for each in found if each.get("name") == "default"), found)
    return found


def _pixel_faults(start: Path, target: Path, remarks: list[str]) -> Iterator[str]:
    given, found = _pixels(start), _pixels(target)
    if given and not found:
        remarks.append(f"{PROCESSOR_FILE} is missing: copy the start's to process images")
    for key in PIXELS if given and found else ():
        if (given.get(key) or None) != (found.get(key) or None):
            yield f"{PROCESSOR_FILE}: {key} is {_short(found.get(key))}, expected {_short(given.get(key))}"


def _pixels(folder: Path) -> Mapping[str, Any]:
    image = read_json_if_there(folder, PROCESSOR_FILE).get("image_processor")
    return image if isinstance(image, dict) else read_json_if_there(folder, PREPROCESSOR_FILE)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else f"{text[:120]}..."
