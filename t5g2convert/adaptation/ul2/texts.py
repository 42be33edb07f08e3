"""The texts of one corpus: stretches across documents (`Chunks`), or pieces of single documents (`Pieces`).

An epoch reads each text once, in an order that is computed from the seed, the epoch and the text's place.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from t5g2convert.adaptation.ul2.mixture import Mixture
from t5g2convert.adaptation.ul2.permutation import (
    CHUNKS,
    PIECES,
    ROUNDS,
    permutation_keys,
    permuted,
    philox,
    words,
)
from t5g2convert.errors import DataError, UsageError

GROUP: Final = 128
"""Documents between two stored counts of pieces: 100 million documents take 6 MB."""

AT_ONCE: Final = 1 << 20
"""Documents counted at once."""


class Chunks:
    """Texts that run on across documents, each as long as its task allows.

    The corpus is cut into `chunks` chunks of `chunk` tokens, and each chunk into one text for each slot of the
    mixture's cycle. Each slot has its own random order of the chunks, so that the texts of a block, and of a step, come
    from all over the corpus. Without that, a step would read a few documents in long runs. The order of the texts in
    the chunks differs by epoch. The rest of the corpus, less than a chunk, is skipped: some of it before the first
    chunk and some after the last, differently in each epoch.

    Args:
        mixture: The tasks.
        raw_lengths: Raw tokens per sample, by task.
        tokens: Tokens in the corpus.
        seed: 0 to 2**64 - 1.
        corpus: Number of the corpus.

    Attributes:
        sequences: Independent sequences of texts: one per slot.
        per_epoch: Texts of an epoch.
        read: Tokens of an epoch.

    Raises:
        DataError: The corpus is smaller than a chunk.
        UsageError: The number of lengths is wrong.
    """

    def __init__(
        self, mixture: Mixture, raw_lengths: Sequence[int], tokens: int, seed: int, *, corpus: int = 0
    ) -> None:
        if len(raw_lengths) != len(mixture.tasks):
            raise UsageError(f"expected {len(mixture.tasks)} raw lengths, one per task, got {len(raw_lengths)}")
        self.tokens, self.corpus, self._seed = tokens, corpus, seed
        self._lengths = [raw_lengths[task] for task in mixture.cycle]
        self.sequences = len(self._lengths)
        self.chunk = sum(self._lengths)
        self.chunks = tokens // self.chunk
        if not self.chunks:
            raise DataError(
                f"the corpus has {tokens} tokens, but a block of {self.sequences} samples needs {self.chunk}",
                hint="pack more text, or reduce --encoder-length and --decoder-length",
            )
        self.per_epoch, self.read = self.chunks * self.sequences, self.chunks * self.chunk
        # Slots begin an epoch nearly together, so keeping two epochs suffices.
        self._epochs: dict[int, _Epoch] = {}

    def text(self, slot: int, number: int) -> tuple[int, int]:
        """Return a text of a slot: tokens [start, stop) of the corpus."""
        epoch, place = divmod(number, self.chunks)
        order = self._epoch(epoch)
        start = permuted(place, self.chunks, order.keys[slot]) * self.chunk + order.starts[slot]
        return start, start + self._lengths[slot]

    def length(self, slot: int, number: int) -> int:
        """Return the number of tokens of a text."""
        return self._lengths[slot]

    def _epoch(self, number: int) -> "_Epoch":
        if number not in self._epochs:
            source = philox(self._seed, number, CHUNKS, corpus=self.corpus)
            offset = int(words(source, 1)[0]) % (self.tokens - self.read + 1)
            starts = [0] * self.sequences
            for slot in np.argsort(words(source, self.sequences), kind="stable").tolist():
                starts[slot] = offset
                offset += self._lengths[slot]
            keys = tuple(words(source, ROUNDS).tolist() for _ in range(self.sequences))
            kept = [*self._epochs.items()][-1:]
            self._epochs = {**dict(kept), number: _Epoch(tuple(starts), keys)}
        return self._epochs[number]


@dataclass(frozen=True, slots=True)
class _Epoch:
    """An epoch: by slot of the cycle, where its text starts in the first chunk, and the keys of its order of chunks."""

    starts: tuple[int, ...]
    keys: tuple[list[int], ...]


class Pieces:
    """Texts that are whole documents, or equal pieces of long ones.

    A document of n tokens is cut into ceil(n / longest) pieces, which differ by at most one token. A document shorter
    than `shortest` is skipped. All pieces of the corpus have one random order per epoch.

    Args:
        ends: The end of each document in tokens from the start, uint64 [documents]; read again for each piece.
        longest: Most tokens of a piece.
        shortest: Fewest tokens of a document that is read; at most half of `longest`, so that no piece is shorter.
        seed: 0 to 2**64 - 1.
        corpus: Number of the corpus.

    Attributes:
        sequences: Independent sequences of texts: one.
        per_epoch: Pieces of all documents.
        read: Tokens of all pieces.
        skipped: Documents that are shorter than `shortest`.

    Raises:
        DataError: No document is long enough.
    """

    def __init__(self, ends: NDArray[Any], longest: int, shortest: int, seed: int, *, corpus: int = 0) -> None:
        assert 2 * shortest <= longest + 1, "pieces would be shorter than the shortest document"
        self.sequences = 1
        self._ends, self._longest, self._shortest = ends, longest, shortest
        self.corpus, self._seed = corpus, seed
        self._last_keys: tuple[int, list[int]] | None = None
        self.skipped = self.read = 0
        counts = []
        for start in range(0, len(ends), AT_ONCE):
            starts, pieces = self._documents(start, start + AT_ONCE)
            lengths = np.diff(starts)
            self.skipped += int((pieces == 0).sum())
            self.read += int(lengths[pieces > 0].sum())
            counts.append(np.add.reduceat(pieces, np.arange(0, len(pieces), GROUP)))
        self._before = np.cumsum([0, *np.concatenate([np.zeros(0, np.int64), *counts]).tolist()])
        self.per_epoch = int(self._before[-1])
        if not self.per_epoch:
            raise DataError(f"the corpus has no document of {shortest} tokens or more", hint="pack more text")

    def text(self, slot: int, number: int) -> tuple[int, int]:
        """Return a piece: tokens [start, stop) of the corpus. There is one slot, 0."""
        epoch, place = divmod(number, self.per_epoch)
        if self._last_keys is None or self._last_keys[0] != epoch:
            self._last_keys = epoch, permutation_keys(self._seed, epoch, PIECES, corpus=self.corpus)
        return self.piece(permuted(place, self.per_epoch, self._last_keys[1]))

    def length(self, slot: int, number: int) -> int:
        """Return the number of tokens of a piece."""
        start, stop = self.text(slot, number)
        return stop - start

    def piece(self, number: int) -> tuple[int, int]:
        """Return a piece by its number in the order of the corpus: tokens [start, stop)."""
        group = int(np.searchsorted(self._before, number, side="right")) - 1
        starts, pieces = self._documents(group * GROUP, (group + 1) * GROUP)
        last = np.cumsum(pieces)
        at = number - int(self._before[group])
        document = int(np.searchsorted(last, at, side="right"))
        count = int(pieces[document])
        at -= int(last[document]) - count
        start, length = int(starts[document]), int(starts[document + 1] - starts[document])
        return start + at * length // count, start + (at + 1) * length // count

    def _documents(self, first: int, stop: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return where documents start, and the end of the last of them; and the number of pieces of each; int64."""
        before = np.array([self._ends[first - 1] if first else 0]).astype(np.int64)
        starts = np.concatenate([before, np.asarray(self._ends[first:stop]).astype(np.int64)])
        lengths = np.diff(starts)
        return starts, np.where(lengths < self._shortest, 0, -(-lengths // self._longest))
