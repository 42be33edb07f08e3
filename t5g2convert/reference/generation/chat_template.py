"""The chat template of a folder, rendered as transformers renders it."""

import json
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.file_names import OLDER_TEMPLATE_FILE, TEMPLATE_FILE, TOKENIZER_CONFIG_FILE
from t5g2convert.checkpoint.folder import read_json_file, read_json_if_there
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.interrupts import raise_interruption

_NAMED_TOKENS: Final = ("bos_token", "eos_token", "unk_token", "pad_token", "boi_token", "eoi_token", "image_token")


class ChatTemplate:
    """The chat template of a folder: `chat_template.jinja`, or the one in tokenizer_config.json.

    Args:
        folder: The model's folder.

    Raises:
        CheckpointError: The template is not valid.
        UsageError: The folder has no template.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        settings = read_json_if_there(folder, TOKENIZER_CONFIG_FILE)
        text = _template(folder, settings)
        if text is None:
            raise UsageError(f"{folder} has no chat template", hint="omit --chat")
        self._tokens = {name: _content(settings[name]) for name in _NAMED_TOKENS if settings.get(name) is not None}
        self.text = text
        """The template."""
        self._template = self._guarded(lambda: _environment().from_string(text))

    def render(self, prompt: str, *, image: bool = False) -> str:
        """Return a user's turn and the beginning of the answer, with all special tokens as text.

        Args:
            prompt: The text of the turn.
            image: Put the place of an image before the text.

        Raises:
            CheckpointError: The template refuses the turn or fails.
        """
        content = [{"type": "image"}, {"type": "text", "text": prompt}] if image else prompt
        return self.render_messages([{"role": "user", "content": content}], answer_next=True)

    def render_messages(
        self, messages: list[dict[str, Any]], *, answer_next: bool, tools: list[Any] | None = None
    ) -> str:
        """Return a conversation with all special tokens as text.

        Args:
            messages: Messages with `role` and `content`, which is a text or a list of parts.
            answer_next: Add the beginning of an answer.
            tools: The tools to describe, if any.

        Raises:
            CheckpointError: The template refuses the messages or fails.
        """
        rendered = self._guarded(
            lambda: self._template.render(
                messages=messages, add_generation_prompt=answer_next, tools=tools, **self._tokens
            )
        )
        return str(rendered)

    def _guarded(self, run: Any) -> Any:
        try:
            return run()
        except Exception as error:  # noqa: BLE001 - a template can raise any error
            raise_interruption()
            raise CheckpointError(f"the chat template fails: {error}", where=self._folder) from None


def _template(folder: Path, settings: dict[str, Any]) -> str | None:
    if (folder / TEMPLATE_FILE).is_file():
        return read_json_file(folder / TEMPLATE_FILE).decode(errors="replace")
    found = settings.get("chat_template")
    if isinstance(found, list):
        named = {each.get("name"): each.get("template") for each in found if isinstance(each, dict)}
        found = named.get("default")
    if found is None:
        found = read_json_if_there(folder, OLDER_TEMPLATE_FILE).get("chat_template")
    return found if isinstance(found, str) else None


def _content(token: Any) -> str:
    """Return the text of a token of tokenizer_config.json, which is a string or an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _environment() -> Any:
    """Return jinja's sandbox with the settings and functions that transformers gives to templates."""
    from datetime import datetime

    from jinja2 import TemplateError
    from jinja2.ext import Extension
    from jinja2.nodes import Node, Scope
    from jinja2.parser import Parser
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The block `{% generation %}`, by which templates mark answers: its content is rendered as it is."""

        tags = {"generation"}  # noqa: RUF012 - jinja's name and form

        def parse(self, parser: Parser) -> Node:
            line = next(parser.stream).lineno
            scope = Scope(lineno=line)
            scope.body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return scope

    def raise_exception(message: str) -> None:
        raise TemplateError(message)

    def tojson(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=options.pop("ensure_ascii", False), **options)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    return environment
