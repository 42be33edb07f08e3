"""The forms of a row, recognised by its keys: a document, a pair of texts, or a conversation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.adaptation.data.image_columns import IMAGE_KEYS, ImageSource, images_of
from t5g2convert.adaptation.data.messages import Conversation, checked_value, conversation
from t5g2convert.checkpoint.strictjson import is_text

LONGEST: Final = 16 << 20
"""Most bytes of a document, or of a line of JSON. The tokenizer takes whole documents and needs about 120 bytes of
memory per character, 2 GB at this limit (measured with tokenizers 0.23)."""

TOOLS: Final = "tools"
"""The key of the tools that a conversation may call, for the chat template."""

SYSTEM: Final = "system"
"""The key of a conversation's system message, if that is not among its messages."""

INSTRUCTION: Final = "instruction"
"""The key that some data sets have beside an input; it is not read by itself."""

BESIDE: Final = (TOOLS, SYSTEM, INSTRUCTION)
"""The keys that a row may have beside those of its form."""


@dataclass(frozen=True, slots=True)
class Document:
    """A text with its images.

    Attributes:
        where: The file with the line or row, for errors.
        text: The text.
        images: Images, in the order of their positions.
    """

    where: str
    text: str
    images: tuple[ImageSource, ...] = ()


@dataclass(frozen=True, slots=True)
class PairRow:
    """An input and a target that no chat template changes.

    Attributes:
        where: The file with the line or row, for errors.
        source: The input.
        target: The target.
        images: The images of the input, in the order of their positions.
    """

    where: str
    source: str
    target: str
    images: tuple[ImageSource, ...] = ()


@dataclass(frozen=True, slots=True)
class ChatRow:
    """A conversation for the chat template.

    Attributes:
        where: The file with the line or row, for errors.
        conversation: The messages with their images.
        tools: The tools that the template describes, if any.
        only_last: Only the last turn is an answer to learn, as the completion of a prompt is.
    """

    where: str
    conversation: Conversation
    tools: list[Any] | None = None
    only_last: bool = False


@dataclass(frozen=True, slots=True)
class Fault:
    """A row that cannot be packed, and why."""

    where: str
    reason: str


Row = Document | PairRow | ChatRow | Fault


@dataclass(frozen=True, slots=True)
class Form:
    """A form of rows: `text`, `pair` or `messages`, and its keys."""

    kind: str
    keys: tuple[str, ...]

    def __str__(self) -> str:
        return " and ".join(map(repr, self.keys))

    @property
    def option(self) -> str:
        """The options of the command line that choose it."""
        if self.kind == "pair":
            return f"--input-column {self.keys[0]} --target-column {self.keys[1]}"
        return f"--{'column' if self.kind == 'text' else 'messages-column'} {self.keys[0]}"


DEFAULT_FORMS: Final = (
    Form("text", ("text",)),
    Form("pair", ("input", "target")),
    Form("pair", ("prompt", "completion")),
    Form("messages", ("messages",)),
    Form("messages", ("conversations",)),
)


@dataclass(frozen=True, slots=True)
class Columns:
    """The keys that decide the form of a row. If any is given, rows have only the forms of those given.

    Attributes:
        text: Key of the text of a document.
        input: Key of the input of a pair; `input` if only `target` is given.
        target: Key of the target of a pair; `target` if only `input` is given.
        messages: Key of a conversation.
    """

    text: str | None = None
    input: str | None = None
    target: str | None = None
    messages: str | None = None

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms that rows may have."""
        found = []
        if self.text is not None:
            found.append(Form("text", (self.text,)))
        if self.input is not None or self.target is not None:
            found.append(Form("pair", (self.input or "input", self.target or "target")))
        if self.messages is not None:
            found.append(Form("messages", (self.messages,)))
        return tuple(found) or DEFAULT_FORMS

    def fitting(self, keys: Iterable[str]) -> list[Form]:
        """Return the forms that have all their keys in a row or table."""
        present = set(keys)
        return [form for form in self.forms if present.issuperset(form.keys)]

    def absence(self, keys: Iterable[str], what: str = "") -> str:
        """Return why a row or table has none of the forms; `what` is `column ` for a table."""
        forms, found = self.forms, named(keys)
        if len(forms) == 1:
            return f"has no {what}{forms[0]}, but {found}"
        expected = ", or ".join(map(str, forms))
        return (
            f"has {found}, expected {expected}; --column, --input-column and --target-column, or --messages-column "
            "name others"
        )

    def form_of(self, row: Mapping[str, Any]) -> Form:
        """Return the form of a row; a form with only nulls does not count if another fits.

        Raises:
            ValueError: None fits, or several.
        """
        fitting = self.fitting(row)
        filled = [form for form in fitting if any(row[key] is not None for key in form.keys)]
        if len(filled or fitting) > 1:
            fitting = filled or fitting
            choices = " or ".join(form.option for form in fitting)
            raise ValueError(f"has {', and '.join(map(str, fitting))}: choose with {choices}")
        if not fitting:
            raise ValueError(self.absence(row))
        return (filled or fitting)[0]


DOCUMENTS: Final = Columns(text="text")


def row_of(
    where: str, row: Mapping[str, Any], columns: Columns, folder: Path | None, keys: Sequence[str] = IMAGE_KEYS
) -> Row:
    """Return a row in its form, or a fault if it is not valid.

    Args:
        where: The file with the line or row, for errors.
        row: Values by key.
        columns: The keys that decide the form.
        folder: The folder that names of image files are relative to; None if rows cannot name files.
        keys: The keys of images.
    """
    try:
        form = columns.form_of(row)
        images = images_of(row, [key for key in keys if key not in form.keys], folder)
        if form.kind == "text":
            return checked_document(where, row[form.keys[0]], images)
        if form.kind == "messages":
            messages = _with_system(row[form.keys[0]], row.get(SYSTEM))
            return ChatRow(where, conversation(messages, images, folder, check_text), _tools(row))
        if columns == Columns():
            _refuse_unread(row, form)
        return _pair(where, row, form, images, folder)
    except ValueError as error:
        return Fault(where, str(error))
    except RecursionError:
        return Fault(where, "is nested too deeply")


def checked_document(where: str, text: object, images: tuple[ImageSource, ...] = ()) -> Document | Fault:
    """Return a document, or a fault if its text is not valid."""
    try:
        return Document(where, check_text(text, "the text"), images)
    except ValueError as error:
        return Fault(where, str(error))


def check_text(value: object, name: str) -> str:
    """Return a value that is a text.

    Raises:
        ValueError: It is not a text, or too long.
    """
    if not isinstance(value, str):
        raise ValueError(f"{name} is {'null' if value is None else f'of type {type(value).__name__}'}")
    if "\0" in value:
        raise ValueError(f"{_in(name)}contains NUL at character {value.index(chr(0))}: it is not text")
    if not is_text(value):
        raise ValueError(f"{_in(name)}contains half of a surrogate pair")
    if len(value) > LONGEST:
        raise ValueError(f"{_in(name)}is longer than {LONGEST} characters, the limit for a document; split it")
    return value


def named(columns: Iterable[str]) -> str:
    """Return keys for an error, at most eight."""
    shown = sorted(map(str, columns))
    return ", ".join(map(repr, shown[:8])) + (f" and {len(shown) - 8} more" if len(shown) > 8 else "") or "nothing"


def _in(name: str) -> str:
    return "" if name == "the text" else f"{name} "


def _pair(
    where: str, row: Mapping[str, Any], form: Form, images: tuple[ImageSource, ...], folder: Path | None
) -> PairRow | ChatRow:
    """Return a pair of texts, or of messages and the answer to them.

    Raises:
        ValueError: A value is empty, or not a text or a list of messages; or only one is a text.
    """
    source, target = (row[key] for key in form.keys)
    (first, second), listed = form.keys, [isinstance(value, list) for value in (source, target)]
    if all(listed):
        if len(target) != 1:
            raise ValueError(f"{second!r} has {len(target)} messages, expected one of 'assistant'")
        if not source:
            raise ValueError(f"{first!r} is empty")
        found = conversation([*source, *target], images, folder, check_text)
        return ChatRow(where, found, _tools(row), only_last=True)
    if any(listed):
        raise ValueError(f"only one of {form} is a list of messages")
    source, target = (check_text(row[key], repr(key)) for key in form.keys)
    if not target.strip():
        raise ValueError(f"{second!r} is empty: there is nothing to learn")
    if not source.strip() and not images:
        raise ValueError(f"{first!r} is empty; pack a text without an input as a document, with --column {second}")
    return PairRow(where, source, target, images)


def _with_system(messages: Any, system: object) -> Any:
    """Return messages with the system message that stands outside them, unless it is empty.

    Raises:
        ValueError: It is not a text, or the messages have one too.
    """
    if system is None or not isinstance(messages, list) or not check_text(system, repr(SYSTEM)).strip():
        return messages
    first = messages[0] if messages else None
    if isinstance(first, Mapping) and SYSTEM in (first.get("role"), first.get("from")):
        raise ValueError(f"has {SYSTEM!r}, and a message with this role")
    return [{"role": SYSTEM, "content": system}, *messages]


def _refuse_unread(row: Mapping[str, Any], form: Form) -> None:
    """Refuse an instruction or a system message beside a pair of texts, which would be lost.

    Raises:
        ValueError: There is one.
    """
    for key in (SYSTEM, INSTRUCTION):
        if row.get(key):
            raise ValueError(
                f"has {key!r} beside {form}, which is not read: put it into the input, or choose with {form.option}"
            )


def _tools(row: Mapping[str, Any]) -> list[Any] | None:
    tools = row.get(TOOLS)
    if tools is None or tools == []:
        return None
    if not isinstance(tools, list):
        raise ValueError(f"{TOOLS!r} is of type {type(tools).__name__}, expected a list")
    found: list[Any] = checked_value(tools, repr(TOOLS), check_text)
    return found
