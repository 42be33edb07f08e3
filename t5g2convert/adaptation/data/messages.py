"""The messages of a conversation, in the forms that data sets have, with their images in order.

==============  =====================================================================================================
a message       `{"role": ..., "content": ...}`, or `{"from": ..., "value": ...}`
a role          `system`, `developer`, `user`, `assistant` or `tool`; `human`, and `gpt` and `model`, are names of two
content         a text, or a list of parts; null if an assistant only calls tools
a part          `{"type": "text", "text": ...}`, `{"type": "image"}` with the image under `image`, `path` or `url`, or
                without one for the next image of the row, or `{"type": "image_url", "image_url": {"url": ...}}`
==============  =====================================================================================================
"""

import base64
import binascii
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.adaptation.data.image_columns import ImageBytes, ImageSource, image_source
from t5g2convert.adaptation.data.images import PLACEHOLDER

ROLES: Final = ("system", "developer", "user", "assistant", "tool")
OTHER_ROLES: Final = {"human": "user", "gpt": "assistant", "model": "assistant"}

DEEPEST: Final = 100
"""Most levels of lists and objects in a value of a message or tool."""

PLACES: Final = (PLACEHOLDER, "<image>")
"""Marks of images in contents without parts for them."""

IMAGE_PART: Final = {"type": "image"}

CheckText = Callable[[object, str], str]
"""Returns a value that is a text; raises ValueError with the given name."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation.

    Attributes:
        messages: Messages as chat templates read them: `role`, `content` (a text, or parts
            `{"type": "text", "text": ...}` and `{"type": "image"}`), and other keys that the row has.
        images: The images of each message.
    """

    messages: tuple[dict[str, Any], ...]
    images: tuple[tuple[ImageSource, ...], ...]


def conversation(
    value: object, images: Sequence[ImageSource], folder: Path | None, check_text: CheckText
) -> Conversation:
    """Return a conversation from a value of a row.

    Args:
        value: A list of messages.
        images: The images that the row has outside its messages.
        folder: The folder that names of image files are relative to; None if rows cannot name files.
        check_text: Checks the texts.

    Raises:
        ValueError: It is not a list of valid messages, or has another number of places than images.
    """
    if not isinstance(value, list):
        raise ValueError(f"the messages are {'null' if value is None else f'of type {type(value).__name__}'}")
    if not value:
        raise ValueError("the list of messages is empty")
    read = [_message(item, f"message {number}", folder, check_text) for number, item in enumerate(value, 1)]
    places = sum(own.count(None) for _, own in read)
    if images and not any(own for _, own in read):
        read = _placed(read, len(images))
    elif places != len(images):
        raise ValueError(f"has {len(images)} image(s) outside its messages, but {places} part(s) without an image")
    rest = iter(images)
    filled = tuple(tuple(next(rest) if image is None else image for image in own) for _, own in read)
    return Conversation(tuple(message for message, _ in read), filled)


_Read = tuple[dict[str, Any], list[ImageSource | None]]
"""A message and its images, None for one of the row."""


def _message(item: object, name: str, folder: Path | None, check_text: CheckText) -> _Read:
    if not isinstance(item, Mapping):
        raise ValueError(f"{name} is {'null' if item is None else f'of type {type(item).__name__}'}")
    fields = {key: value for key, value in item.items() if value is not None}
    for other, key in (("from", "role"), ("value", "content")):
        if key not in fields and other in fields:
            fields[key] = fields.pop(other)
    role = fields.pop("role", None)
    if isinstance(role, str):
        role = OTHER_ROLES.get(role, role)
    if role not in ROLES:
        raise ValueError(f"{name} has the role {role!r}, expected one of {', '.join(ROLES)}")
    calls = role == "assistant" and bool(fields.get("tool_calls"))
    content = fields.pop("content", "" if calls else None)
    name = f"{name} ({role})"
    images: list[ImageSource | None] = []
    if isinstance(content, list):
        parts = [_part(part, f"part {number} of {name}", folder, check_text) for number, part in enumerate(content, 1)]
        content = [part for part, _ in parts]
        images = [image for part, image in parts if part["type"] == "image"]
        empty = not images and not any(part.get("text", "").strip() for part in content)
    else:
        empty = not check_text(content, f"the content of {name}").strip()
    if empty and not calls and role in ("user", "assistant"):
        raise ValueError(f"{name} is empty")
    return {"role": role, "content": content, **checked_value(fields, name, check_text)}, images


def _part(
    part: object, name: str, folder: Path | None, check_text: CheckText
) -> tuple[dict[str, Any], ImageSource | None]:
    if not isinstance(part, Mapping):
        raise ValueError(f"{name} is {'null' if part is None else f'of type {type(part).__name__}'}")
    kind = part.get("type")
    if kind == "text":
        return {"type": "text", "text": check_text(part.get("text"), f"the text of {name}")}, None
    if kind not in ("image", "image_url"):
        raise ValueError(f"{name} has the type {kind!r}, expected 'text' or 'image'")
    keys = ("image_url",) if kind == "image_url" else ("image", "path", "url")
    found = [part[key] for key in keys if part.get(key) is not None]
    if len(found) > 1:
        raise ValueError(f"{name} has several images")
    if kind == "image_url" and not found:
        raise ValueError(f"{name} has no address")
    return dict(IMAGE_PART), _image(found[0], name, folder) if found else None


def _image(value: object, name: str, folder: Path | None) -> ImageSource:
    if isinstance(value, Mapping) and value.get("url") is not None:
        value = value["url"]
    if isinstance(value, bytes):
        return ImageBytes(name, value)
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise ValueError(f"{name} is an address, which is not fetched; store the image with the data")
    if isinstance(value, str) and value.startswith("data:"):
        try:
            return ImageBytes(name, base64.b64decode(value.partition("base64,")[2], validate=True))
        except (binascii.Error, ValueError):
            raise ValueError(f"{name} is not valid base64") from None
    return image_source(value, name, folder)


def checked_value(value: Any, name: str, check_text: CheckText, *, depth: int = 0) -> Any:
    """Return a value of a message or tool after a check of all texts in it.

    Raises:
        ValueError: A text is not valid, a value has a type that JSON lacks, or it is nested too deeply.
    """
    if depth > DEEPEST:
        raise ValueError(f"{name} is nested more than {DEEPEST} deep")
    if isinstance(value, str):
        return check_text(value, name)
    if isinstance(value, Mapping):
        return {
            check_text(key, name): checked_value(each, name, check_text, depth=depth + 1) for key, each in value.items()
        }
    if isinstance(value, list):
        return [checked_value(each, name, check_text, depth=depth + 1) for each in value]
    if value is None or isinstance(value, bool | int | float):
        return value
    raise ValueError(f"{name} has a value of type {type(value).__name__}")


def without_nulls(value: Any) -> Any:
    """Return a value of a table without the keys that are null: its objects have all keys of the column."""
    if isinstance(value, Mapping):
        return {key: without_nulls(each) for key, each in value.items() if each is not None}
    return [without_nulls(each) for each in value] if isinstance(value, list) else value


def _placed(read: list[_Read], count: int) -> list[_Read]:
    """Put the images of a row where contents have a mark for each, or without marks first in the first user message.

    Raises:
        ValueError: Contents have another number of marks, or there is no user message.
    """
    texts = ["\n".join(_texts(message["content"])) for message, _ in read if message["role"] != "assistant"]
    marks = {place: sum(text.count(place) for text in texts) for place in PLACES}
    place = next((place for place, number in marks.items() if number == count), None)
    if place is not None:
        return [_split(message, place) if message["role"] != "assistant" else (message, own) for message, own in read]
    for mark, number in marks.items():
        if number:
            raise ValueError(f"has {count} image(s), but {mark} {number} time(s)")
    first = next((number for number, (message, _) in enumerate(read) if message["role"] == "user"), None)
    if first is None:
        raise ValueError("has images, but no user message to put them in")
    message, _ = read[first]
    parts = [dict(IMAGE_PART) for _ in range(count)] + _as_parts(message["content"])
    return [*read[:first], ({**message, "content": parts}, [None] * count), *read[first + 1 :]]


def _split(message: dict[str, Any], place: str) -> _Read:
    if not any(place in text for text in _texts(message["content"])):
        return message, []
    parts: list[dict[str, Any]] = []
    for part in _as_parts(message["content"]):
        for number, text in enumerate(part["text"].split(place)):
            parts += [dict(IMAGE_PART)] * (number > 0) + [{"type": "text", "text": text}] * bool(text.strip())
    return {**message, "content": parts}, [None] * parts.count(IMAGE_PART)


def _as_parts(content: Any) -> list[dict[str, Any]]:
    return list(content) if isinstance(content, list) else [{"type": "text", "text": content}]


def _texts(content: Any) -> list[str]:
    return [part["text"] for part in _as_parts(content)]
