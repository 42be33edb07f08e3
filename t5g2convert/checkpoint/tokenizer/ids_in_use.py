"""The ids that the tokenizer files of a folder make, whichever file makes them.

Ids are in `model.vocab` and `added_tokens` of tokenizer.json, in the pieces of tokenizer.model where there is no
tokenizer.json, in `added_tokens_decoder` of tokenizer_config.json, and in added_tokens.json. The other keys of
tokenizer_config.json and special_tokens_map.json have names alone: one that the vocabulary lacks gets the next free id
when the tokenizer is loaded.
"""

import json
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families.config_section import MAX_INTEGER
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.hub.model import fetch, read_held
from t5g2convert.checkpoint.tokenizer.jsonstream import JsonStream
from t5g2convert.errors import CheckpointError

TOKENIZER_FILE: Final = "tokenizer.json"
PIECES_FILE: Final = "tokenizer.model"
SETTINGS_FILE: Final = "tokenizer_config.json"
ADDED_FILE: Final = "added_tokens.json"
NAMES_FILE: Final = "special_tokens_map.json"

NAME_LISTS: Final = ("additional_special_tokens", "extra_special_tokens")
"""Keys with several names; all others that hold a name end in `_token`."""


@dataclass(frozen=True, slots=True)
class UsedId:
    """An id in use.

    Attributes:
        number: The id.
        what: What has it: a token, or a field of a config.
        where: The file that says so.
        given: Whether the file has no such id for it, and a loader gives it this one.
    """

    number: int
    what: str
    where: Path
    given: bool = False

    def __str__(self) -> str:
        return f"{self.where.name} {self.finding}"

    @property
    def finding(self) -> str:
        """What the file has, without its name."""
        if self.given:
            return f"has {self.what}, to which a loader gives the id {self.number}"
        return f"has {self.what} as {self.number}"


@dataclass(slots=True)
class IdsInUse:
    """The ids in use that a table might have no row for.

    Only the lowest id of each range is kept, so that a folder with millions of them takes no memory.

    Attributes:
        start: Ids below are not looked at.
        rows: Rows of the table.
        moved: Tokens that move elsewhere, with their ids: those do not count.
        spare: The lowest id in a file, or else given by a loader, from `start` on that the table has a row for.
        beyond: The same of those that the table has no row for.
        at_moved: The tokens that files have at the ids that move, and those files.
        tells: Whether a tokenizer with a vocabulary was found.
        remarks: What could not be read.
    """

    start: int
    rows: int
    moved: Mapping[str, int] = field(default_factory=dict)
    spare: UsedId | None = None
    beyond: UsedId | None = None
    at_moved: dict[str, UsedId] = field(default_factory=dict)
    tells: bool = False
    remarks: list[str] = field(default_factory=list)

    def add(self, used: UsedId) -> None:
        """Take note of an id."""
        if used.number >= self.rows:
            self.beyond = min(used, self.beyond or used, key=_rank)
        elif used.number >= self.start:
            self.spare = min(used, self.spare or used, key=_rank)

    def add_tokenizer(self, checkpoint: Checkpoint) -> None:
        """Take note of all ids that the tokenizer files of a checkpoint make.

        Raises:
            CheckpointError: A file cannot be read, or has an id that is not one; the error names the token or the id.
            HubError: The Hub does not give a file out, or cannot be reached.
        """
        where = {name: checkpoint.path / name for name in (SETTINGS_FILE, ADDED_FILE, NAMES_FILE)}
        settings, listed, special = (read_held(checkpoint, name) or {} for name in where)
        later = dict(sorted(_decoder(settings, where[SETTINGS_FILE])))
        tokens = [(number, token, where[SETTINGS_FILE]) for number, token in later.items()]
        tokens += [(_id(number, _quoted(name), where[ADDED_FILE]), name, where[ADDED_FILE])
                   for name, number in listed.items()]  # fmt: skip
        for number, token, path in tokens:
            self._add_token(token, number, path)
        named = [(name, path) for document, path in ((settings, where[SETTINGS_FILE]), (special, where[NAMES_FILE]))
                 for name in _names(document)]  # fmt: skip
        # A loader gives new ids to what the vocabulary lacks, in this order.
        order = [(token, path) for _, token, path in tokens]
        order += named
        if checkpoint.holds(TOKENIZER_FILE):
            fetch(checkpoint, [TOKENIZER_FILE])
            path = checkpoint.path / TOKENIZER_FILE
            vocabulary = _Vocabulary({token for token, _ in order})
            for token, number in vocabulary.read(path, self._add_token, self.start).items():
                self._add_token(token, number, path)
            order = [*((token, path) for token in vocabulary.added), *order]
        elif checkpoint.holds(PIECES_FILE):
            fetch(checkpoint, [PIECES_FILE])
            vocabulary = self._pieces(checkpoint.path / PIECES_FILE, {token for token, _ in order})
        else:
            return
        self.tells = vocabulary.size > 0
        if self.tells:
            for token, number, path in vocabulary.continued(order):
                self._add_token(token, number, path, given=True)

    def _add_token(self, token: str, number: int, where: Path, *, given: bool = False) -> None:
        used = UsedId(number, f"the token {_quoted(token)}", where, given)
        if number in self.moved.values() and not given:
            self.at_moved.setdefault(token, used)
        if self.moved.get(token) != number:
            self.add(used)

    def _pieces(self, path: Path, wanted: set[str]) -> "_Vocabulary":
        from t5g2convert.checkpoint.tokenizer.sentencepiece import read_pieces

        vocabulary = _Vocabulary(wanted)
        pieces = read_pieces(path)
        if pieces is None:
            self.remarks.append(f"{PIECES_FILE} is not a SentencePiece model: its pieces were not looked at")
        for number, piece in enumerate(pieces or ()):
            name = piece.decode(errors="replace")
            vocabulary.take(name, number)
            if number >= self.start:
                self._add_token(name, number, path)
        return vocabulary


def _rank(used: UsedId) -> tuple[bool, int]:
    """What is named first: the lowest id that stands in a file."""
    return used.given, used.number


TokenSeen = Callable[[str, int, Path], None]


class _Vocabulary:
    """What is kept of a vocabulary: its size, and the ids of the tokens that other files name.

    Args:
        wanted: Those tokens.
    """

    def __init__(self, wanted: Collection[str]) -> None:
        self._wanted = {*wanted}
        self.size = 0
        self.ids: dict[str, int] = {}
        self.added: dict[str, int] = {}

    def take(self, name: str, number: int) -> None:
        """Count a token."""
        self.size += 1
        if name in self._wanted:
            self.ids[name] = number

    def continued(self, order: Iterable[tuple[str, Path]]) -> Iterator[tuple[str, int, Path]]:
        """Yield the tokens that are not in the vocabulary with the ids that the tokenizers library gives them."""
        highest, seen = -1, set[str]()
        for token, where in order:
            if token in seen:
                continue
            seen.add(token)
            number = self.ids.get(token)
            if number is None:
                number = max(highest + 1, self.size)
                yield token, number, where
            highest = max(highest, number)

    def read(self, path: Path, seen: TokenSeen, start: int) -> dict[str, int]:
        """Read a tokenizer.json, and return its added tokens with the ids that stand there.

        Args:
            path: The file.
            seen: Called with each token of the vocabulary that has an id from `start` on.
            start: The first id of interest.
        """
        if not self._read(path, seen, start):
            # The vocabulary came first, and is read again for the tokens that are known now.
            self.size, self.ids = 0, {}
            self._read(path, seen, start)
        return self.added

    def _read(self, path: Path, seen: TokenSeen, start: int) -> bool:
        """Read the file once; whether all added tokens were known when the vocabulary was read."""
        known = True
        try:
            with path.open("rb") as file:
                stream = JsonStream(file, path)
                for key in stream.members():
                    if key == "added_tokens" and stream.peek() == b"[":
                        for _ in stream.items():
                            token, number = _added(stream.value(), path)
                            known = known and (not self.size or token in self._wanted)
                            self.added[token] = number
                            self._wanted.add(token)
                    elif key == "model" and stream.peek() == b"{":
                        for name in stream.members():
                            if name == "vocab":
                                self._read_vocabulary(stream, seen, start, path)
                            else:
                                stream.skip()
                    elif key in ("added_tokens", "model"):
                        kind = "a list" if key == "added_tokens" else "an object"
                        raise CheckpointError(f"{key} is not {kind}", where=path)
                    elif key in ("post_processor", "padding"):
                        for token, number in written_ids(stream.value()):
                            if number >= start:
                                seen(token, number, path)
                    else:
                        stream.skip()
                stream.finish()
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error
        return known

    def _read_vocabulary(self, stream: JsonStream, seen: TokenSeen, start: int, path: Path) -> None:
        """Read `model.vocab`: names with their ids, or for Unigram a list of names with their scores."""
        if stream.peek() == b"{":
            for members in stream.numbered():
                self.size += len(members)
                self.ids |= {name: members[name] for name in self._wanted & members.keys()}
                if max(members.values()) >= start:
                    for name, number in members.items():
                        if number >= start:
                            seen(name, _id(number, _quoted(name), path), path)
        elif stream.peek() == b"[":
            for number in stream.items():
                piece = stream.value()
                if not isinstance(piece, list) or not piece or type(piece[0]) is not str:
                    raise CheckpointError(f"model.vocab has no text as token {number}", where=path)
                self.take(piece[0], number)
                if number >= start:
                    seen(piece[0], number, path)
        else:
            stream.skip()
            raise CheckpointError("model.vocab is not an object or a list", where=path)


def _decoder(settings: Mapping[str, Any], where: Path) -> Iterator[tuple[int, str]]:
    """Yield the ids and tokens of `added_tokens_decoder`.

    Raises:
        CheckpointError: A key is not an id, or what it leads to is not a token; the error names the key.
    """
    decoder = settings.get("added_tokens_decoder")
    if decoder is None:
        return
    if not isinstance(decoder, dict):
        raise CheckpointError(f"added_tokens_decoder is {_kind(decoder)}, expected an object", where=where)
    for key, value in decoder.items():
        if not (key.isascii() and key.isdigit() and len(key) <= 10 and int(key) <= MAX_INTEGER):
            raise CheckpointError(f"added_tokens_decoder has the key {_quoted(key)}, expected an id", where=where)
        token = value.get("content") if isinstance(value, dict) else value
        if type(token) is not str:
            found = f"an object with {_kind(token)} as content" if isinstance(value, dict) else _kind(value)
            raise CheckpointError(f"added_tokens_decoder has {found} as {key}, expected a token", where=where)
        yield int(key), token


def _added(entry: Any, where: Path) -> tuple[str, int]:
    """Return name and id of one of the `added_tokens` of tokenizer.json."""
    fields = entry if isinstance(entry, dict) else {}
    token = fields.get("content")
    if type(token) is not str:
        told = f"with id {fields['id']!r}"[:60] if "id" in fields else f"{_kind(entry)}"
        raise CheckpointError(f"added_tokens has an entry without content ({told})", where=where)
    return token, _id(fields.get("id"), f"the added token {_quoted(token)}", where)


def written_ids(node: Any) -> Iterator[tuple[str, int]]:
    """Yield tokens and ids that the post-processor or the padding of a tokenizer.json writes into every text."""
    if isinstance(node, list):
        for item in node:
            yield from written_ids(item)
    for key, value in node.items() if isinstance(node, dict) else ():
        token = node.get("pad_token" if key == "pad_id" else "id")
        numbers = value if key == "ids" and isinstance(value, list) else [value] if key == "pad_id" else []
        if key in ("sep", "cls") and isinstance(value, list):
            token, numbers = value[0] if value else None, value[1:]
        yield from ((str(token), number) for number in numbers if type(number) is int)
        yield from written_ids(value)


def _id(value: Any, whose: str, where: Path) -> int:
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        told = json.dumps(value) if type(value) is not int or abs(value) < 10**30 else "a number without end"
        raise CheckpointError(
            f"{whose} has id {told[:60]}, expected a whole number from 0 to {MAX_INTEGER}", where=where
        )
    return value


def _names(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the names of special tokens in tokenizer_config.json or special_tokens_map.json."""
    for key, value in document.items():
        listed: Iterable[Any]
        if key in NAME_LISTS:
            listed = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        elif key.endswith("_token"):
            listed = (value,)
        else:
            continue
        for item in listed:
            name = item.get("content") if isinstance(item, dict) else item
            if type(name) is str and name:
                yield name


def _kind(value: Any) -> str:
    """What a JSON value is, in words."""
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a text", bool: "true or false"}
    return "nothing" if value is None else kinds.get(type(value), "a number")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
