"""The token ids in use, from all tokenizer files of a checkpoint.

Ids are given by `model.vocab` and `added_tokens` of tokenizer.json, by the pieces of tokenizer.model if there is no
tokenizer.json, by `added_tokens_decoder` of tokenizer_config.json, and by added_tokens.json. Other keys of
tokenizer_config.json and special_tokens_map.json hold only names: when the tokenizer is loaded, a name that the
vocabulary lacks gets the next free id.
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families.config_section import MAX_INTEGER
from t5g2convert.checkpoint.file_names import ADDED_TOKENS_FILE, PIECES_FILE, SPECIAL_TOKENS_FILE, TOKENIZER_CONFIG_FILE
from t5g2convert.checkpoint.hub.open_and_fetch import fetch
from t5g2convert.checkpoint.tokenizer.files import Tokenizer, TokenizerJson
from t5g2convert.errors import CheckpointError

NAME_LISTS: Final = ("additional_special_tokens", "extra_special_tokens")
"""Keys that hold several names; keys that hold one name end in `_token`."""


@dataclass(frozen=True, slots=True)
class UsedId:
    """An id in use.

    Attributes:
        number: The id.
        what: The token or the config field with this id.
        where: The file that names it.
        assigned: Whether loaders assign the id, because the file gives none.
    """

    number: int
    what: str
    where: Path
    assigned: bool = False

    def __str__(self) -> str:
        return f"{self.where.name} {self.finding}"

    @property
    def finding(self) -> str:
        """The use as the predicate of a sentence, without the name of the file."""
        if self.assigned:
            return f"has {self.what} (loaders assign it the id {self.number})"
        return f"has {self.what} as {self.number}"


@dataclass(slots=True)
class IdsInUse:
    """The ids in use that an embedding table may have no row for.

    Attributes:
        start: Ids below this one are ignored.
        rows: Number of rows of the table.
        moved: Tokens that the conversion moves, with their ids; these are ignored.
        spare: The lowest id from `start` to the last row; ids in files take precedence over ids that loaders assign.
        beyond: The same for ids past the last row.
        at_moved: The tokens that files have at the ids in `moved`.
        has_vocabulary: Whether a tokenizer with a vocabulary was found.
        remarks: Notes on files that could not be read.
    """

    start: int
    rows: int
    moved: Mapping[str, int] = field(default_factory=dict)
    spare: UsedId | None = None
    beyond: UsedId | None = None
    at_moved: dict[str, UsedId] = field(default_factory=dict)
    has_vocabulary: bool = False
    remarks: list[str] = field(default_factory=list)

    def add(self, used: UsedId) -> None:
        """Record an id in use."""
        if used.number >= self.rows:
            self.beyond = min(used, self.beyond or used, key=_rank)
        elif used.number >= self.start:
            self.spare = min(used, self.spare or used, key=_rank)

    def add_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Record all ids in the tokenizer files of a checkpoint.

        Raises:
            CheckpointError: A file cannot be read, or lacks an id or a token where one is expected.
            HubError: The Hub does not provide a file, or cannot be reached.
        """
        folder = tokenizer.checkpoint.path
        settings, special = tokenizer.settings or {}, tokenizer.special_tokens or {}
        path = folder / TOKENIZER_CONFIG_FILE
        tokens = [(token, number, path) for number, token in sorted(dict(_decoder(settings, path)).items())]
        path, listed = folder / ADDED_TOKENS_FILE, tokenizer.added_tokens or {}
        tokens += [(name, _id(number, _quoted(name), path), path) for name, number in listed.items()]
        for token, number, path in tokens:
            self._add_token(token, number, path)
        # A loader assigns new ids, in this order, to the tokens that the vocabulary lacks.
        order = [(token, path) for token, _, path in tokens]
        order += [(name, folder / TOKENIZER_CONFIG_FILE) for name in _names(settings)]
        order += [(name, folder / SPECIAL_TOKENS_FILE) for name in _names(special)]
        if tokenizer.json is not None:
            vocabulary, size, added = self._add_json(tokenizer.json)
            order = [*((token, tokenizer.json.path) for token in added), *order]
        elif tokenizer.checkpoint.holds(PIECES_FILE):
            fetch(tokenizer.checkpoint, [PIECES_FILE])
            vocabulary, size = self._add_pieces(folder / PIECES_FILE)
        else:
            return
        self.has_vocabulary = size > 0
        if self.has_vocabulary:
            for token, number, path in _assigned(order, vocabulary, size):
                self._add_token(token, number, path, assigned=True)

    def _add_json(self, tokenizer: TokenizerJson) -> tuple[Mapping[str, int], int, Mapping[str, int]]:
        """Record the ids of tokenizer.json; return its vocabulary, the vocabulary's size, and its added tokens."""
        document, path = tokenizer.parse(), tokenizer.path
        added = dict(_added_token(entry, path) for entry in _section(document, "added_tokens", list, path))
        for token, number in written_ids([document.get("post_processor"), document.get("padding")]):
            if number >= self.start:
                self._add_token(token, number, path)
        vocabulary, size = _vocabulary(_section(document, "model", dict, path).get("vocab", {}), path)
        for token, number in vocabulary.items():
            if number >= self.start:
                self._add_token(token, number, path)
        for token, number in added.items():
            self._add_token(token, number, path)
        return vocabulary, size, added

    def _add_pieces(self, path: Path) -> tuple[Mapping[str, int], int]:
        """Record the ids of tokenizer.model; return its vocabulary and the vocabulary's size."""
        from t5g2convert.checkpoint.tokenizer.files import read_pieces

        if (pieces := read_pieces(path)) is None:
            self.remarks.append(f"{PIECES_FILE} is not a SentencePiece model and was not read")
            return {}, 0
        vocabulary: dict[str, int] = {}
        for number, piece in enumerate(pieces):
            name = piece.decode(errors="replace")
            vocabulary[name] = number
            if number >= self.start:
                self._add_token(name, number, path)
        return vocabulary, len(pieces)

    def _add_token(self, token: str, number: int, where: Path, *, assigned: bool = False) -> None:
        used = UsedId(number, f"the token {_quoted(token)}", where, assigned)
        if number in self.moved.values() and not assigned:
            self.at_moved.setdefault(token, used)
        if self.moved.get(token) != number:
            self.add(used)


def _rank(used: UsedId) -> tuple[bool, int]:
    """Return the sort key of an id: ids in files first, then the lowest."""
    return used.assigned, used.number


def _assigned(
    order: Iterable[tuple[str, Path]], vocabulary: Mapping[str, int], size: int
) -> Iterator[tuple[str, int, Path]]:
    """Yield the tokens that the vocabulary lacks, with the ids that the tokenizers library assigns to them."""
    highest, seen = -1, set[str]()
    for token, where in order:
        if token in seen:
            continue
        seen.add(token)
        number = vocabulary.get(token)
        if number is None:
            number = max(highest + 1, size)
            yield token, number, where
        highest = max(highest, number)


def _section(document: Mapping[str, Any], key: str, kind: type, where: Path) -> Any:
    """Return a list or an object of tokenizer.json; an empty one if the key is absent."""
    section = document.get(key, kind())
    if not isinstance(section, kind):
        raise CheckpointError(f"{key} is not {'a list' if kind is list else 'an object'}", where=where)
    return section


def _vocabulary(vocab: Any, where: Path) -> tuple[Mapping[str, int], int]:
    """Return `model.vocab` as ids by token, and its size; a Unigram model has a list of tokens with their scores."""
    if isinstance(vocab, list):
        for number, piece in enumerate(vocab):
            if not (isinstance(piece, list) and piece and type(piece[0]) is str):
                raise CheckpointError(f"model.vocab has no string as token {number}", where=where)
        return {piece[0]: number for number, piece in enumerate(vocab)}, len(vocab)
    if not isinstance(vocab, dict):
        raise CheckpointError("model.vocab is not an object or a list", where=where)
    numbers = vocab.values()
    if {*map(type, numbers)} - {int} or min(numbers, default=0) < 0 or max(numbers, default=0) > MAX_INTEGER:
        for name, number in vocab.items():
            _id(number, _quoted(name), where)
    return vocab, len(vocab)


def _decoder(settings: Mapping[str, Any], where: Path) -> Iterator[tuple[int, str]]:
    """Yield the ids and tokens of `added_tokens_decoder`.

    Raises:
        CheckpointError: A key is not an id, or its value is not a token; the error names the key.
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


def _added_token(entry: Any, where: Path) -> tuple[str, int]:
    """Return the name and id of an entry of `added_tokens` in tokenizer.json."""
    fields = entry if isinstance(entry, dict) else {}
    token = fields.get("content")
    if type(token) is not str:
        found = f"with id {fields['id']!r}"[:60] if "id" in fields else _kind(entry)
        raise CheckpointError(f"added_tokens has an entry without content ({found})", where=where)
    return token, _id(fields.get("id"), f"the added token {_quoted(token)}", where)


def written_ids(node: Any) -> Iterator[tuple[str, int]]:
    """Yield the tokens, with their ids, that the post-processor or the padding of tokenizer.json adds to texts."""
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


def _id(value: Any, owner: str, where: Path) -> int:
    if type(value) is not int or not 0 <= value <= MAX_INTEGER:
        found = json.dumps(value) if type(value) is not int or abs(value) < 10**30 else "a number of over 30 digits"
        raise CheckpointError(f"{owner} has id {found[:60]}, expected an integer from 0 to {MAX_INTEGER}", where=where)
    return value


def _names(document: Mapping[str, Any]) -> Iterator[str]:
    """Yield the special tokens that tokenizer_config.json or special_tokens_map.json names."""
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
    """Name the type of a JSON value."""
    kinds: dict[type, str] = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else kinds.get(type(value), "a number")


def _quoted(text: str) -> str:
    return repr(text if len(text) <= 60 else f"{text[:60]}...")
