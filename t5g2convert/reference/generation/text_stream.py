"""Text from tokens as they arrive: whole characters, up to a stop text."""

from collections.abc import Sequence

from t5g2convert.reference.prompts import TextCodec

INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
"""The end of a text with a part of a character."""


class TextStream:
    """The text of a sequence of tokens.

    `push` returns text that no later token changes: never a part of a character that several tokens spell, and never
    the beginning of a stop text. What several calls return, and then `finish`, is the whole text.

    Args:
        codec: The tokenizer.
        stops: Texts before which the text ends.
        special: Show special tokens.

    Attributes:
        stopped: Whether a stop text was found.

    Example:
        >>> stream = TextStream(codec, stops=("END",))
        >>> [stream.push(token) for token in tokens], stream.finish(), stream.stopped
    """

    def __init__(self, codec: TextCodec, stops: Sequence[str] = (), *, special: bool = False) -> None:
        self.stopped = False
        self.special = special
        self._codec, self._stops = codec, stops
        self._before: list[int] = []
        self._pending: list[int] = []
        self._held = ""

    def push(self, token: int) -> str:
        """Add a token; return the text that is certain now."""
        self._pending.append(token)
        text = self._decode()
        if text.endswith(INCOMPLETE):
            return ""
        return self._released(text)

    def finish(self) -> str:
        """Return the rest of the text, also of an incomplete character."""
        text = self._released(self._decode()) if self._pending else ""
        rest, self._held = ("" if self.stopped else self._held), ""
        return text + rest

    def _decode(self) -> str:
        """Return the text of the pending tokens; a tokenizer may decode them differently after others."""
        before = self._text(self._before)
        text = self._text([*self._before, *self._pending])
        # Bytes that end as no character change the text of bytes before them, but that was returned already.
        return text[len(before) :] if text.startswith(before) else self._text(self._pending)

    def _text(self, tokens: list[int]) -> str:
        return self._codec.decode(tokens, special=self.special) if tokens else ""

    def _released(self, text: str) -> str:
        """Move the pending tokens to those before; return the text up to a stop text, without a possible beginning."""
        self._before, self._pending = self._pending, []
        held = self._held + text
        found = [at for stop in self._stops if (at := held.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            return held[: min(found)]
        kept = max((_overlap(held, stop) for stop in self._stops), default=0)
        cut = len(held) - kept
        self._held = held[cut:]
        return held[:cut]


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of a text that is a beginning of a stop text."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if stop.startswith(text[-size:])), 0)
