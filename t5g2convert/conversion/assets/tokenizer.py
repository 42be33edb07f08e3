"""Moves of tokens to other ids in tokenizer.json and tokenizer_config.json.

tokenizer.json is edited as text: an added token is an object in `added_tokens`, and a token of the vocabulary is a key
of `model.vocab`. A few substitutions move a token; the rest of the file, including white space, stays as the tokenizers
library wrote it.
"""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.tokenizer.files import TokenizerJson
from t5g2convert.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class TokenMove:
    """A token that moves, its id in the source and in the target, and the token of the source that it replaces."""

    token: str
    replaces: str
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class TokenChange:
    """A token that becomes special, with the id `target` in the output's tokenizer.

    Attributes:
        token: Its name.
        source: Its id as an added token of the source; None if it was not one.
        target: Its id in the output.
        replaces: The name that the id had in the source; None if the name does not change.
    """

    token: str
    source: int | None
    target: int
    replaces: str | None


@dataclass(frozen=True, slots=True)
class _AddedToken:
    """An added token: its id, whether it is special, and the spans of its name, its flag and its whole entry."""

    id: int
    special: bool
    name: tuple[int, int]
    flag: tuple[int, int]
    removal: tuple[int, int]


@dataclass(slots=True)
class _Places:
    """The places of a token in the text: as an added token, as a key of the vocabulary (id, start, end), elsewhere."""

    added: list[_AddedToken] = field(default_factory=list)
    keys: list[tuple[int, int, int]] = field(default_factory=list)
    others: int = 0

    @property
    def ids(self) -> tuple[list[int], list[int]]:
        """Return its ids as an added token, and its ids in the vocabulary."""
        return [entry.id for entry in self.added], [number for number, _, _ in self.keys]

    def __str__(self) -> str:
        found = [f"added token {entry.id}" for entry in self.added]
        found += [f"{number} in the vocabulary" for number, _, _ in self.keys]
        found += [f"{self.others} other place(s)"] if self.others else []
        return ", ".join(found) or "nowhere"


class _Edit:
    """The substitutions in one text: bytes by the span that they replace."""

    def __init__(self) -> None:
        self.substitutions: dict[tuple[int, int], bytes] = {}
        self.changes: list[TokenChange] = []

    def make_special(self, entry: _AddedToken) -> None:
        """Set the flag of an added token."""
        if not entry.special:
            self.substitutions[entry.flag] = b"true"

    def applied(self, text: bytes) -> bytes:
        """Return the text with all substitutions made."""
        pieces: list[bytes | memoryview] = []
        at, view = 0, memoryview(text)
        for (start, end), new in sorted(self.substitutions.items()):
            pieces += [view[at:start], new]
            at = end
        return b"".join([*pieces, view[at:]])


def edit_tokenizer(
    tokenizer: TokenizerJson, moves: Sequence[TokenMove], special: Sequence[str], *, rows: int, required: bool
) -> tuple[bytes, tuple[TokenChange, ...]] | None:
    """Move tokens of a tokenizer.json to their new ids.

    Args:
        tokenizer: The source's tokenizer.json.
        moves: The tokens that move.
        special: Other added tokens that become special.
        rows: Number of rows of the target's embedding table.
        required: Whether the model reads images. Other models do not need the tokens: their tokenizer stays unchanged
            if none of these tokens has an id past the table.

    Returns:
        The new text and the changes; the old text and no changes if every token is already in place. None for a
        tokenizer that stays unchanged because it lacks the tokens.

    Raises:
        CheckpointError: A token is not where it is expected, or is also in other places.
    """
    places = {name: _find(tokenizer.text, name) for move in moves for name in (move.token, move.replaces)}
    if not required and all(_lacks(move, places, rows) for move in moves):
        return None
    edit = _Edit()
    for move in moves:
        _move(move, places[move.token], places[move.replaces], edit, tokenizer.path)
    for name in special:
        for entry in _find(tokenizer.text, name).added:
            if not entry.special:
                edit.make_special(entry)
                edit.changes.append(TokenChange(name, entry.id, entry.id, None))
    return edit.applied(tokenizer.text), tuple(edit.changes)


def _lacks(move: TokenMove, places: Mapping[str, _Places], rows: int) -> bool:
    """Return whether a tokenizer lacks the token, or has it under another id with a row in the table.

    A tokenizer that lacks the token may have the replaced token at another id, as trimmed vocabularies do.
    """
    added, keys = places[move.token].ids
    if ids := added + keys:
        return move.target not in ids and all(number < rows for number in ids)
    return not any(move.target in ids for ids in places[move.replaces].ids)


def _move(move: TokenMove, token: _Places, replaced: _Places, edit: _Edit, path: Path) -> None:
    """Give the replaced token's id to the token, and remove its old id."""
    elsewhere = token.others + replaced.others
    if token.ids == ([move.target], [move.target]) and replaced.ids == ([], []) and not elsewhere:
        if not token.added[0].special:
            edit.make_special(token.added[0])
            edit.changes.append(TokenChange(move.token, move.target, move.target, None))
        return
    if token.ids not in (([move.source], []), ([], [])) or replaced.ids != ([move.target], [move.target]) or elsewhere:
        raise CheckpointError(
            f"expected {move.token} as added token {move.source} or not at all, and {move.replaces} as added token "
            f"{move.target} and in the vocabulary; found {move.token}: {token}; {move.replaces}: {replaced}",
            where=path,
            hint="save it with the tokenizers library, or use a map that moves the token elsewhere (--mapping)",
        )
    (entry,), ((_, start, end),) = replaced.added, replaced.keys
    edit.substitutions |= {span: _quoted(move.token) for span in (entry.name, (start, end))}
    edit.make_special(entry)
    edit.substitutions |= {old.removal: b"" for old in token.added}
    source = move.source if token.added else None
    edit.changes.append(TokenChange(move.token, source, move.target, move.replaces))


_ID: Final = re.compile(rb"\s*:\s*(\d{1,18})(?=[\s,}])")
_CONTENT: Final = re.compile(rb'"content"\s*:\s*\Z')
_SPECIAL: Final = re.compile(rb'"special"\s*:\s*(true|false)(?=[\s,}])')
_COMMA_BEFORE: Final = re.compile(rb",\s*\Z")
_COMMA_AFTER: Final = re.compile(rb"\s*,\s*")
_NEAR: Final = 1 << 11
"""Bytes around a token that contain its object; an added token's object has 200."""


def _find(text: bytes, name: str) -> _Places:
    """Find all places of a token in the text of a tokenizer.json."""
    places = _Places()
    for found in re.finditer(re.escape(_quoted(name)), text):
        start, end = found.span()
        if text[start - 1 : start] == b"\\":
            continue  # the match is a quote inside another string
        if number := _ID.match(text, end):
            places.keys.append((int(number[1]), start, end))
        elif _CONTENT.search(text[max(start - _NEAR, 0) : start]) and (entry := _added_token(text, start, end)):
            places.added.append(entry)
        else:
            places.others += 1
    return places


def _added_token(text: bytes, start: int, end: int) -> _AddedToken | None:
    """Return the added token with its name at this span of the text, if there is one."""
    opening, closing = text.rfind(b"{", max(start - _NEAR, 0), start), text.find(b"}", end, end + _NEAR) + 1
    if opening < 0 or not closing:
        return None
    try:
        fields = json.loads(text[opening:closing])
    except ValueError:
        return None
    flag = _SPECIAL.search(text, opening, closing)
    if type(fields.get("id")) is not int or flag is None:
        return None
    if before := _COMMA_BEFORE.search(text[max(opening - _NEAR, 0) : opening]):
        removal = opening - len(before[0]), closing
    else:
        after = _COMMA_AFTER.match(text, closing)
        removal = opening, after.end() if after else closing
    return _AddedToken(fields["id"], flag[1] == b"true", (start, end), flag.span(1), removal)


def _quoted(name: str) -> bytes:
    return json.dumps(name, ensure_ascii=False).encode()


def tokenizer_config(
    settings: Mapping[str, Any],
    additions: Mapping[str, Any],
    moves: Sequence[TokenMove],
    special: Sequence[str],
    where: Path,
) -> dict[str, Any]:
    """Return tokenizer_config.json of the output.

    Args:
        settings: The source's tokenizer_config.json; empty if it has none.
        additions: Keys to add if a token moves and the source lacks them; null removes a key in any case.
        moves: The tokens that move.
        special: Tokens that become special with them.
        where: The source's file, for errors.

    Raises:
        CheckpointError: The settings name another token than the moved one, or use the replaced one.
    """
    config = {key: value for key, value in settings.items() if key not in additions or additions[key] is not None}
    if not moves:
        return config
    refuse_replaced(config, moves, where)
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


def refuse_replaced(document: Mapping[str, Any], moves: Sequence[TokenMove], where: Path) -> None:
    """Refuse settings that use a replaced token: loaders would add it again, with an id past the table.

    Raises:
        CheckpointError: A setting uses a replaced token; the error names the token and the key.
    """
    for move in moves:
        for key, value in document.items():
            if key != "added_tokens_decoder" and move.replaces in _strings(value):
                raise CheckpointError(
                    f"{key} uses {move.replaces}, which {move.token} replaces",
                    where=where,
                    hint="use a map that moves the token elsewhere (--mapping)",
                )


def _strings(node: Any) -> Iterator[str]:
    if isinstance(node, str):
        yield node
    elif isinstance(node, list | dict):
        for item in node.values() if isinstance(node, dict) else node:
            yield from _strings(item)


def _content(token: Any) -> Any:
    """Return the text of a token, which may be stored in an object with its flags."""
    return token.get("content") if isinstance(token, dict) else token


def _decoder(
    decoder: Mapping[str, Any], moves: Sequence[TokenMove], special: Sequence[str], where: Path
) -> dict[str, Any]:
    """Return `added_tokens_decoder` (tokens by id) with the tokens moved."""
    result = dict(decoder)
    for move in moves:
        for number, allowed in ((move.source, [move.token]), (move.target, [move.token, move.replaces])):
            if str(number) in result and _content(result[str(number)]) not in allowed:
                raise CheckpointError(
                    f"added_tokens_decoder has {_content(result[str(number)])!r} as {number}, "
                    f"expected {' or '.join(sorted(allowed))}",
                    where=where,
                )
        result.pop(str(move.source), None)
        if str(move.target) in result:
            entry = result[str(move.target)]
            flags = entry if isinstance(entry, dict) else {}
            result[str(move.target)] = {**flags, "content": move.token, "special": True}
    for key, token in result.items():
        if isinstance(token, dict) and token.get("content") in special:
            result[key] = {**token, "special": True}
    return result
