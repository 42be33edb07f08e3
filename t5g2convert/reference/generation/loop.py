"""The decoding of a batch, step by step.

No text depends on the texts in its batch. The encoder's padding is hidden by its mask. The decoder has no padding: all
rows start with the tokens of the shortest prompt, and a longer prompt is read on while the other rows write.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal

import torch
from torch import Tensor

from t5g2convert.reference.generation.decoding import Decoding
from t5g2convert.reference.generation.engines import Engine
from t5g2convert.reference.generation.infill import Masked
from t5g2convert.reference.generation.sampling import Chooser
from t5g2convert.reference.generation.text_stream import TextStream

Finish = Literal["end", "stop", "length"]
"""Why a text ended: an end token, a stop text, or the largest number of tokens."""

PADDING: Final = 0
"""The token at hidden positions and after the end of a text; it has no effect."""

MOST_ROOM: Final = 1024
"""Most tokens to reserve in the caches at the start; longer texts let them grow."""


@dataclass
class Row:
    """A text that is being written.

    Attributes:
        encoder: The encoder's input; empty if the encoder is hidden.
        decoder: The tokens that the decoder starts with.
        chooser: Chooses its next tokens.
        stream: Its text.
        pixels: The images of the encoder's input.
        ends: Tokens that end this text, besides those that end all texts.
        masked: The masks that it fills, with `infill`.
        tokens: The tokens written so far, without the end token.
        finish: Why it ended; None if it has not.
    """

    encoder: Sequence[int]
    decoder: Sequence[int]
    chooser: Chooser
    stream: TextStream
    pixels: Tensor | None = None
    ends: frozenset[int] = frozenset()
    masked: Masked | None = None
    tokens: list[int] = field(default_factory=list)
    finish: Finish | None = None

    def write(self, token: int, decoding: Decoding) -> str:
        """Add a token; return the text that is certain now."""
        if token in decoding.ends or token in self.ends:
            text = (self.stream.push(token) if self.stream.special else "") + self.stream.finish()
            self.finish = "stop" if self.stream.stopped else "end"
            return text
        self.tokens.append(token)
        text = self.stream.push(token)
        if self.stream.stopped:
            self.finish = "stop"
        elif len(self.tokens) == decoding.max_new_tokens:
            text += self.stream.finish()
            self.finish = "stop" if self.stream.stopped else "length"
        return text


def write_batch(
    engine: Engine, rows: Sequence[Row], decoding: Decoding, device: str, refuse: Callable[[Tensor], None]
) -> Iterator[tuple[int, str]]:
    """Write the texts of a batch; yield each piece of text with the number of its row.

    Args:
        engine: The model.
        rows: The texts; either all or none have a hidden encoder.
        decoding: The settings.
        device: The device of the token ids.
        refuse: Raises an error for logits that are not finite.
    """
    read = min(len(row.decoder) for row in rows)
    room = min(max(len(row.decoder) for row in rows) + decoding.max_new_tokens, MOST_ROOM)
    step = _started(engine, rows, device, room)
    next_BT = torch.tensor([list(row.decoder[:read]) for row in rows], device=device)
    while any(row.finish is None for row in rows):
        logits_BV = step(next_BT)
        refuse(logits_BV)
        best_B = logits_BV.argmax(-1).tolist() if decoding.greedy else None
        following = []
        for number, row in enumerate(rows):
            token = PADDING
            if read < len(row.decoder):
                token = row.decoder[read]
            elif row.finish is None:
                token = row.chooser.choose(logits_BV[number]) if best_B is None else best_B[number]
                if piece := row.write(token, decoding):
                    yield number, piece
            following.append([token])
        next_BT = torch.tensor(following, device=device)
        read += 1


def _started(engine: Engine, rows: Sequence[Row], device: str, room: int) -> Callable[[Tensor], Tensor]:
    if not rows[0].encoder:
        return engine.start_hidden(len(rows), room=room)
    longest = max(len(row.encoder) for row in rows)
    padded = [[*row.encoder, *[PADDING] * (longest - len(row.encoder))] for row in rows]
    lengths = torch.tensor([len(row.encoder) for row in rows], device=device)
    kept_BM = torch.arange(longest, device=device) < lengths[:, None]
    pixels = [row.pixels for row in rows if row.pixels is not None]
    return engine.start(torch.tensor(padded, device=device), kept_BM, torch.cat(pixels) if pixels else None, room=room)
