"""Pairs of rows and conversations, before they are tokenized.

A conversation is rendered by the tokenizer's chat template, as `t5g2 generate --chat` renders a prompt: all before the
assistant's turn, with the beginning of the answer, is the input, and what the template adds for the turn is the target.
Names of special tokens that the template writes become these tokens, those in contents stay plain characters.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Final

from t5g2convert.adaptation.data.images import text_pieces
from t5g2convert.adaptation.data.pair_documents import PairDocument, Part, with_places
from t5g2convert.adaptation.data.rows import LONGEST, ChatRow, Document, Fault, PairRow, Row
from t5g2convert.adaptation.data.tokens import UNUSED, ModelTokens
from t5g2convert.checkpoint.file_names import OLDER_TEMPLATE_FILE, TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from t5g2convert.checkpoint.file_store import sha256_of
from t5g2convert.errors import CheckpointError, DataError, UsageError
from t5g2convert.reference.generation.chat_template import ChatTemplate

BLANK: Final = "\n\n"
"""What Gemma 3's processor puts on both sides of an image."""

MOST_REPEATED: Final = 64
"""Most characters of all inputs of one conversation, in documents of the largest length: a gigabyte."""


HELD: Final = LONGEST
"""Most characters of the pairs of one conversation in memory; further pairs are rendered again."""


def template_sha256(model: Path) -> str:
    """Return the sha256 of the files that may hold a model's chat template and its tokens, hexadecimal."""
    found = hashlib.sha256()
    for name in (TEMPLATE_FILE, TOKENIZER_CONFIG_FILE, OLDER_TEMPLATE_FILE):
        path = model / name
        digest = sha256_of(path) if path.is_file() else ""
        found.update(f"{name} {digest}\n".encode())
    return found.hexdigest()


class PairMaker:
    """Makes pairs of rows.

    Args:
        model: The folder of the model, with the chat template.
        tokens: Its token ids.
        special: Ids and names of the tokens that text never becomes.
        all_turns: Make a pair of each turn of an assistant, not only of the last.
    """

    def __init__(self, model: Path, tokens: ModelTokens, special: Mapping[int, str], *, all_turns: bool) -> None:
        self._model, self._tokens, self._all_turns = model, tokens, all_turns
        self._ids = {name: token for token, name in special.items() if name}
        # Thousands of unused tokens as one pattern: a list of all names would be tried at each "<" of a text.
        names = sorted((name for name in self._ids if not UNUSED.fullmatch(name)), key=len, reverse=True)
        self._names = re.compile("|".join([*map(re.escape, names), UNUSED.pattern]))
        self._special = special
        self._image = special.get(tokens.boi) or None
        self._template: ChatTemplate | None = None

    def documents(self, rows: Iterable[Row | PairDocument]) -> Iterator[Document | PairDocument | Fault]:
        """Yield documents and faults as they are, and the pairs of each other row, or why it has none.

        Raises:
            CheckpointError: The chat template is not valid.
            DataError: A row is a conversation, but the model has no chat template.
        """
        for row in rows:
            if isinstance(row, Document | PairDocument | Fault):
                yield row
                continue
            try:
                made = [self._plain(row)] if isinstance(row, PairRow) else self._pairs(row)
            except ValueError as error:
                yield Fault(row.where, str(error))
            else:
                yield from made

    def _plain(self, row: PairRow) -> PairDocument:
        texts = text_pieces(row.source, len(row.images), at_end=True) if row.images else [row.source]
        return PairDocument(row.where, tuple(with_places(texts, self._tokens)), (row.target,), row.images)

    def _pairs(self, row: ChatRow) -> Iterable[PairDocument]:
        """Return the pairs of a conversation. All are rendered before the first is used: one fault refuses the row.

        Raises:
            ValueError: It cannot be learnt.
        """
        turns, every = self._turns(row)
        held, size = list[PairDocument](), 0
        for number in turns:
            pair = self._turn(row, number, named=every)
            size += sum(len(part) for part in (*pair.source, *pair.target) if isinstance(part, str))
            if size <= HELD:
                held.append(pair)
        return chain(held, (self._turn(row, number, named=every) for number in turns[len(held) :]))

    def _turns(self, row: ChatRow) -> tuple[list[int], bool]:
        """Return the numbers of the messages to learn, and whether these are all turns.

        Raises:
            ValueError: There are none, or too many for their length.
        """
        messages = row.conversation.messages
        if (last := messages[-1]["role"]) != "assistant":
            raise ValueError(f"ends with a message of {last!r}, expected one of 'assistant' to learn")
        # An answer to nothing cannot be learnt; it may begin a conversation.
        answers = [number for number, message in enumerate(messages) if number and message["role"] == "assistant"]
        turns = [number for number in answers if messages[number].get("weight") != 0]
        if answers and not turns:
            raise ValueError("has only answers of weight 0, which are not to be learnt")
        if not turns:
            raise ValueError("has only an answer, but no message before it")
        every = self._all_turns and not row.only_last
        if not every and turns[-1] != answers[-1]:
            raise ValueError(
                "ends with an answer of weight 0, which is not to be learnt; --all-turns learns the others"
            )
        if every and len(turns) * len(repr(messages)) > MOST_REPEATED * LONGEST:
            raise ValueError(f"is too long for {len(turns)} pairs that each repeat all before them; split it")
        return (turns if every else turns[-1:]), every

    def _turn(self, row: ChatRow, number: int, *, named: bool) -> PairDocument:
        """Return the pair of one turn.

        Raises:
            ValueError: The template refuses the conversation, or what it renders cannot be split.
        """
        template = self._loaded(row)
        found = row.conversation
        mark = _unused_mark(found.messages, row.tools)
        messages, tools = (self._protected(value, mark) for value in (found.messages[: number + 1], row.tools))
        if "developer" not in template.text:
            messages = [{**each, "role": "system"} if each["role"] == "developer" else each for each in messages]
        before = _rendered(template, messages[:-1], tools, answer_next=True)
        whole = _rendered(template, messages, tools, answer_next=False)
        if len(whole) > LONGEST:
            raise ValueError(f"is longer than {LONGEST} characters, the limit for a document; split it")
        if not whole.startswith(before):
            raise ValueError(
                f"cannot be split before message {number + 1}: with it, the chat template renders other text before it"
            )
        source, target = (self._parts(text, mark) for text in (before, whole[len(before) :].rstrip()))
        images = tuple(image for own in found.images[:number] for image in own)
        self._check(source, target, number + 1, len(images))
        return PairDocument(f"{row.where} (message {number + 1})" if named else row.where, source, target, images)

    def _check(self, source: tuple[Part, ...], target: tuple[Part, ...], number: int, images: int) -> None:
        tokens = self._tokens
        if not any(isinstance(part, str) and part.strip() for part in target):
            raise ValueError(f"the chat template renders no text for message {number}")
        if tokens.boi in target or tokens.image in target:
            raise ValueError(f"message {number} is to be learnt, but has an image")
        if (places := source.count(tokens.boi)) != images:
            raise ValueError(f"has {images} image(s), but the chat template renders {places}")
        if tokens.eoi in (*source, *target) or tokens.image in source:
            raise ValueError("the chat template renders the tokens inside an image itself")

    def _loaded(self, row: ChatRow) -> ChatTemplate:
        if self._template is None:
            try:
                self._template = ChatTemplate(self._model)
            except UsageError:
                raise DataError(
                    f"is a conversation, but {self._model} has no chat template",
                    where=row.where,
                    hint="put a chat_template.jinja there, or pack prompts and completions that are texts",
                ) from None
        return self._template

    def _protected(self, value: Any, mark: str) -> Any:
        """Return messages or tools with a mark in place of each name of a special token."""
        if isinstance(value, str):
            return self._names.sub(
                lambda found: f"{mark}{self._ids[found[0]]}x" if found[0] in self._ids else found[0], value
            )
        if isinstance(value, Mapping):
            return {key: self._protected(each, mark) for key, each in value.items()}
        return [self._protected(each, mark) for each in value] if isinstance(value, list | tuple) else value

    def _parts(self, rendered: str, mark: str) -> tuple[Part, ...]:
        """Split rendered text at the special tokens of the template, and put the names in contents back."""
        if self._image is not None:
            rendered = rendered.replace(self._image, f"{BLANK}{self._image}{BLANK}")
        parts: list[Part] = []
        end = 0
        for found in self._names.finditer(rendered):
            if found[0] in self._ids:
                parts += [rendered[end : found.start()], self._ids[found[0]]]
                end = found.end()
        parts.append(rendered[end:])
        hidden = re.compile(f"{mark}([0-9]+)x")
        return tuple(
            hidden.sub(lambda found: self._special[int(found[1])], part) if isinstance(part, str) else part
            for part in parts
            if part != ""
        )


def _unused_mark(*values: Any) -> str:
    """Return a text of letters and digits that occurs nowhere in the values."""
    text, number = repr(values), 0
    while f"t5g2name{number}x" in text:
        number += 1
    return f"t5g2name{number}x"


def _rendered(template: ChatTemplate, messages: Any, tools: Any, *, answer_next: bool) -> str:
    """Render messages.

    Raises:
        ValueError: The template refuses them.
    """
    try:
        return template.render_messages(messages, tools=tools, answer_next=answer_next)
    except CheckpointError as error:
        raise ValueError(error.message) from None
