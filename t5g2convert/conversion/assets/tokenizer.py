"""tokenizer.json with a token moved to another id: some bytes of the file exchanged, the rest as it is.

The published file has 33 MB and would take several hundred as Python objects. It is read through once, in pieces, for
the few places where the tokens concerned stand as JSON strings: each added token is an object of its own in
`added_tokens`, and each token of the vocabulary a key of `model.vocab`. White space is left alone, so that a file as
the tokenizers library writes it stays one.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.header import FileIdentity
from t5g2convert.conversion.assets.aux_files import Splice, TokenChange
from t5g2convert.errors import CheckpointError

PIECE_BYTES: Final = 1 << 18
REACH: Final = 1 << 11
"""Bytes looked at on either side of a token; an added token's object takes 200."""


@dataclass(frozen=True, slots=True)
class TokenMove:
    """A token, its id in the source's config and in the target's, and the token that has that id in the source."""

    token: str
    replaces: str
    source: int
    target: int


@dataclass(frozen=True, slots=True)
class PatchedTokenizer:
    """What is exchanged in a tokenizer.json, what that changes, and the file as it was when it was read."""

    splices: tuple[Splice, ...]
    changes: tuple[TokenChange, ...]
    identity: FileIdentity


def patch_tokenizer(
    path: Path, moves: Sequence[TokenMove], special: Sequence[str], *, rows: int, required: bool
) -> PatchedTokenizer | None:
    """Find the bytes of a tokenizer.json that moved tokens exchange.

    Args:
        path: The source's tokenizer.json.
        moves: The tokens that move.
        special: Added tokens that become special as well.
        rows: Rows of the target's embedding table.
        required: Whether the model reads images. One that does not can do without the tokens: what has none of them
            beyond the table stays as it is.

    Returns:
        The exchange; nothing to exchange where all is in place; None for a tokenizer that stays as it is.

    Raises:
        CheckpointError: A token is not where it should be, or stands in more places; or the file cannot be read.
    """
    names = [name for move in moves for name in (move.token, move.replaces)]
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            identity = FileIdentity.of(fd)
            places = {name: _Places() for name in (*names, *special)}
            _scan(fd, places)
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error
    splices: list[Splice] = []
    changes: list[TokenChange] = []
    foreign = not required and all(_is_foreign(move, places, rows) for move in moves)
    if not foreign:
        for move in moves:
            _move(move, places, splices, changes, path)
        for name in special:
            for entry in places[name].entries:
                if not entry.special:
                    splices.append(entry.made_special())
                    changes.append(TokenChange(name, entry.id, entry.id, None))
    if foreign:
        return None
    return PatchedTokenizer(tuple(sorted(splices, key=lambda splice: splice.start)), tuple(changes), identity)


@dataclass(frozen=True, slots=True)
class _Entry:
    """An added token: its id, whether it is special, and where its object, name and flag stand in the file."""

    id: int
    special: bool
    name: tuple[int, int]
    flag: tuple[int, int]
    removal: tuple[int, int]

    def made_special(self) -> Splice:
        return Splice(*self.flag, b"true")


@dataclass(slots=True)
class _Places:
    """Where a token stands: as an added token, as a key of the vocabulary (its id, start and end), and elsewhere."""

    entries: list[_Entry] = field(default_factory=list)
    keys: list[tuple[int, int, int]] = field(default_factory=list)
    others: int = 0

    def __str__(self) -> str:
        told = [f"added token {entry.id}" for entry in self.entries]
        told += [f"{number} in the vocabulary" for number, _, _ in self.keys]
        told += [f"{self.others} other place(s)"] if self.others else []
        return ", ".join(told) or "nowhere"


def _is_foreign(move: TokenMove, places: dict[str, _Places], rows: int) -> bool:
    """Whether a tokenizer does without the token, or has it at an id of its own that the table has a row for.

    One without the token may have the token that would give way at another id, as trimmed vocabularies do.
    """
    ids, others = _ids(places[move.token]), _ids(places[move.replaces])
    if ids:
        return move.target not in ids and all(number < rows for number in ids)
    return move.target not in others


def _ids(place: _Places) -> list[int]:
    return [entry.id for entry in place.entries] + [number for number, _, _ in place.keys]


def _move(
    move: TokenMove,
    places: dict[str, _Places],
    splices: list[Splice],
    changes: list[TokenChange],
    path: Path,
) -> None:
    """Exchange the two tokens' names, and take the old id away."""
    token, other = places[move.token], places[move.replaces]
    at = [entry.id for entry in token.entries], [number for number, _, _ in token.keys]
    free = [entry.id for entry in other.entries], [number for number, _, _ in other.keys]
    elsewhere = token.others + other.others
    if at == ([move.target], [move.target]) and free == ([], []) and not elsewhere:
        if not token.entries[0].special:
            splices.append(token.entries[0].made_special())
            changes.append(TokenChange(move.token, move.target, move.target, None))
        return
    if at not in (([move.source], []), ([], [])) or free != ([move.target], [move.target]) or elsewhere:
        raise CheckpointError(
            f"expected {move.token} as added token {move.source} or not at all, and {move.replaces} as added token "
            f"{move.target} and in the vocabulary; found {move.token}: {token}; {move.replaces}: {other}",
            where=path,
            hint="save it with the tokenizers library, or move the token elsewhere with a map of your own (--mapping)",
        )
    (entry,), ((_, start, end),) = other.entries, other.keys
    name = json.dumps(move.token, ensure_ascii=False).encode()
    splices += [Splice(*entry.name, name), Splice(start, end, name)]
    if not entry.special:
        splices.append(entry.made_special())
    splices += [Splice(*old.removal, b"") for old in token.entries]
    changes.append(
        TokenChange(move.token, move.source if token.entries else None, move.target, move.replaces),
    )


def _scan(fd: int, places: dict[str, _Places]) -> None:
    """Sort the places of tokens."""
    needles = {json.dumps(name, ensure_ascii=False).encode(): place for name, place in places.items()}
    for needle, at in _occurrences(fd, [*needles]):
        first = max(at - REACH, 0)
        window = os.pread(fd, 2 * REACH, first)
        start = at - first
        if not _is_escaped(window, start):
            _sort(window, first, start, needle, needles[needle])


_NUMBER: Final = re.compile(rb"\s*:\s*(\d{1,18})(?=[\s,}])")
_CONTENT: Final = re.compile(rb'"content"\s*:\s*\Z')
_SPECIAL: Final = re.compile(rb'"special"\s*:\s*(true|false)(?=[\s,}])')
_COMMA_BEFORE: Final = re.compile(rb",\s*\Z")
_COMMA_BEHIND: Final = re.compile(rb"\s*,\s*")


def _is_escaped(window: bytes, start: int) -> bool:
    """Whether the quote there is one inside a string, and what follows only looks like a string of its own."""
    backslashes = len(window[:start]) - len(window[:start].rstrip(b"\\"))
    return backslashes % 2 == 1


def _sort(window: bytes, first: int, start: int, needle: bytes, place: _Places) -> None:
    """Say what the string at `start` of a window is; the window starts at `first` of the file."""
    end = start + len(needle)
    if number := _NUMBER.match(window, end):
        place.keys.append((int(number[1]), first + start, first + end))
    elif _CONTENT.search(window[:start]) and (entry := _entry(window, first, start, end)):
        place.entries.append(entry)
    else:
        place.others += 1


def _entry(window: bytes, first: int, start: int, end: int) -> _Entry | None:
    """The added token whose name stands from `start` to `end` of a window, if it is one."""
    opening, closing = window.rfind(b"{", 0, start), window.find(b"}", end) + 1
    if opening < 0 or not closing:
        return None
    try:
        fields: Any = json.loads(window[opening:closing])
    except ValueError:
        return None
    flag = _SPECIAL.search(window, opening, closing)
    if type(fields.get("id")) is not int or flag is None:
        return None
    if before := _COMMA_BEFORE.search(window[:opening]):
        removal = before.start(), closing
    else:
        behind = _COMMA_BEHIND.match(window, closing)
        removal = opening, behind.end() if behind else closing
    return _Entry(
        fields["id"],
        flag[1] == b"true",
        (first + start, first + end),
        (first + flag.start(1), first + flag.end(1)),
        (first + removal[0], first + removal[1]),
    )


def _occurrences(fd: int, needles: Sequence[bytes]) -> Iterator[tuple[bytes, int]]:
    """Every place where one of some byte strings starts, in no order."""
    overlap = max(map(len, needles)) - 1
    kept, at = b"", 0
    while piece := os.pread(fd, PIECE_BYTES, at):
        text = kept + piece
        for needle in needles:
            start = text.find(needle)
            while start >= 0:
                if start + len(needle) > len(kept):
                    yield needle, at - len(kept) + start
                start = text.find(needle, start + 1)
        at += len(piece)
        kept = text[-overlap:]
