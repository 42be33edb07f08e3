"""Infilling: the model writes the spans that masks in a text stand for.

As in UL2, mask k becomes the sentinel `first - k`, and the decoder writes `s0 N0 s1 N1 ...`: each sentinel, then the
text that it replaces. The encoder's input begins with bos and has no eos (notebook Research/[T5Gemma_2]Example.ipynb in
google-gemma/cookbook).
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.families.t5gemma2 import FIRST_SENTINEL
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest
from t5g2convert.errors import UsageError
from t5g2convert.reference.prompts import TextCodec

MASK: Final = "[MASK]"
_UNUSED: Final = re.compile(r"<unused\d+>")
_MASKS: Final = re.compile(rf"(\[MASK\]|{_UNUSED.pattern})")


@dataclass(frozen=True, slots=True)
class Masked:
    """A text with masks.

    Attributes:
        pieces: The texts around the masks, one more than there are masks.
        masks: The masks as they were written.
        sentinels: The token that replaces each mask.
    """

    pieces: tuple[str, ...]
    masks: tuple[str, ...]
    sentinels: tuple[int, ...]

    def tokens(self, codec: TextCodec) -> list[int]:
        """Return the encoder's input."""
        found = codec.encode(self.pieces[0])
        for sentinel, piece in zip(self.sentinels, self.pieces[1:], strict=True):
            found += [sentinel, *codec.encode(piece, special=False)]
        return found

    def spans(self, tokens: Sequence[int], codec: TextCodec, *, special: bool = False) -> tuple[str | None, ...]:
        """Return the text of each span that was written; None for a span that was not."""
        written: dict[int, list[int]] = {}
        span: list[int] | None = None
        for token in tokens:
            if token in self.sentinels and token not in written:
                span = written.setdefault(token, [])
            elif span is not None:
                span.append(token)
        return tuple(
            codec.decode(written[sentinel], special=special) if sentinel in written else None
            for sentinel in self.sentinels
        )

    def filled(self, spans: Sequence[str | None]) -> str:
        """Return the whole text; a mask without a span stays."""
        rest = zip(spans, self.masks, self.pieces[1:], strict=True)
        return self.pieces[0] + "".join((mask if span is None else span) + piece for span, mask, piece in rest)


class Masks:
    """The masks of a model: its sentinels.

    Args:
        folder: The model's folder. `t5g2.json` names the first sentinel of a training; other models have Google's.
        codec: Its tokenizer.
        reserved: Ids of tokens with another meaning.

    Raises:
        CheckpointError: `t5g2.json` is not valid.
        UsageError: The tokenizer does not have the first sentinel.
    """

    def __init__(self, folder: Path, codec: TextCodec, reserved: Collection[int]) -> None:
        named = _first(folder, codec, reserved)
        first = codec.token_id(named) if isinstance(named, str) else named
        if first is None or first >= codec.rows:
            raise UsageError(f"--infill needs the first sentinel, but the tokenizer of {folder} has no token {named}")
        self._first, self._codec = first, codec
        last = first
        while last >= 0 and last not in reserved and _UNUSED.fullmatch(codec.token_name(last) or ""):
            last -= 1
        if last == first:
            raise UsageError(
                f"--infill needs sentinels with names such as <unused0>, but the first of {folder} is "
                f"{codec.token_name(first) or first}"
            )
        self._run = range(first, last, -1)

    def read(self, text: str) -> Masked:
        """Find the masks of a text: `[MASK]`, or sentinels by name, from the first one downwards.

        Raises:
            UsageError: There is no mask, both kinds occur, or the sentinels are not in order.
        """
        parts = _MASKS.split(text)
        pieces, masks = parts[::2], parts[1::2]
        if not masks:
            raise UsageError("--infill needs a text with masks", hint=f"write {MASK} where a span is missing")
        if len(masks) > len(self._run):
            raise UsageError(f"the text has {len(masks)} masks, but the model has {len(self._run)} sentinels")
        named = [mask for mask in masks if mask != MASK]
        if named and len(named) < len(masks):
            raise UsageError(f"the text has both {MASK} and {named[0]}", hint="use one kind of mask")
        for mask, token in zip(named, self._run, strict=False):
            if self._codec.token_id(mask) != token:
                expected = self._codec.token_name(token)
                raise UsageError(f"the text has {mask} where {expected} is expected: sentinels descend without a gap")
        return Masked(tuple(pieces), tuple(masks), tuple(self._run[: len(masks)]))

    def after(self, masked: Masked) -> frozenset[int]:
        """Return the sentinels that a text does not have; the decoder's text ends before them."""
        return frozenset(self._run[len(masked.sentinels) :])


def _first(folder: Path, codec: TextCodec, reserved: Collection[int]) -> str | int:
    """Return the first sentinel's name or id."""
    manifest = read_manifest(folder) if is_there(folder / MANIFEST_FILE) else None
    ul2 = None if manifest is None or manifest.adaptation is None else manifest.adaptation.ul2
    if ul2 is None:
        return FIRST_SENTINEL
    # Version 0.1.0 trained with the highest id and did not record it.
    highest = max(token for token in range(codec.rows) if token not in reserved)
    recorded = ul2.mixture.first_sentinel
    return highest if recorded is None else recorded
