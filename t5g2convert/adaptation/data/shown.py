"""Samples of packed data, token by token."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.adaptation.data.token_stream import END, mapped_array
from t5g2convert.checkpoint.file_names import TOKENIZER_FILE
from t5g2convert.printable import printable

FIRST_TOKENS: Final = 64
"""Tokens that are shown of a document without images, which training cuts into samples."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A sample.

    Attributes:
        kind: `document`, `image document` or `pair`.
        number: Its number among those of its kind, from 1.
        parts: Its token ids and their names, by part: `tokens`, or `input` and `target`.
        left_out: Tokens behind these.
        images: Its number of images.
    """

    kind: str
    number: int
    parts: dict[str, list[tuple[int, str]]]
    left_out: int
    images: int

    def lines(self) -> Iterator[str]:
        """Yield lines for people; repeated tokens are shown once with their number."""
        sizes = ", ".join(f"{name} {len(tokens):,}" for name, tokens in self.parts.items())
        more = f" and {self.left_out:,} more" if self.left_out else ""
        yield f"{self.kind} {self.number}: {sizes}{more}" + f", {self.images} image(s)" * bool(self.images)
        for name, tokens in self.parts.items():
            runs = ((token, len(list(run))) for token, run in groupby(tokens))
            texts = [f"{token}:{printable(text)}" + f" x{count}" * (count > 1) for (token, text), count in runs]
            yield f"  {name:<6}  {' '.join(texts)}"

    def to_json(self) -> dict[str, Any]:
        """Return the sample for `--json`."""
        parts = {name: [{"id": token, "token": text} for token, text in part] for name, part in self.parts.items()}
        return {"kind": self.kind, "number": self.number, **parts, "left_out": self.left_out, "images": self.images}


def first_samples(output: Path, model: Path, count: int) -> list[Shown]:
    """Return the first documents, documents with images, and pairs of packed data, `count` of each.

    Raises:
        DataError: The data is damaged.
    """
    from tokenizers import Tokenizer

    packed, tokenizer = Packed.open(output), Tokenizer.from_file(str(model / TOKENIZER_FILE))

    def named(tokens: NDArray[np.uint32]) -> list[tuple[int, str]]:
        return [(token, tokenizer.id_to_token(token) or "") for token in tokens.tolist()]

    found, start = [], 0
    ends = mapped_array(output / "text.doc", END, (packed.index.text.documents,))[:count].tolist()
    for number, end in enumerate(ends, 1):
        last = min(end, start + FIRST_TOKENS)
        found.append(Shown("document", number, {"tokens": named(packed.read(start, last))}, end - last, 0))
        start = end
    for number, document in enumerate(packed.images[:count], 1):
        source, target = document.tokens[: document.split], document.tokens[document.split :]
        parts = {"input": named(source), "target": named(target)}
        found.append(Shown("image document", number, parts, 0, len(document.images)))
    for number, pair in enumerate(packed.pairs[:count], 1):
        parts = {"input": named(pair.source), "target": named(pair.target)}
        found.append(Shown("pair", number, parts, 0, len(pair.images)))
    return found
