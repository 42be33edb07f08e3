"""Probing sentinels: which rows of the embedding table moved between a Gemma 3 and a T5Gemma 2.

Google's models have their sentinels from `<unused6237>`, id 262139, downwards; whether other unused tokens, such as
262140 to 262143, have a use is not established. The row of a token that was read or written has moved far more than the
row of an unused token. The probe compares rows of tokens without a use of their own, `<unused...>` and every id from
256000 on; without a tokenizer, all rows.

The distance of a row is ||t - g|| / ||g||, with the T5Gemma 2's row t and the Gemma 3's row g. Embedding and softmax
share one matrix, so every row drifts a little in training. A row counts as moved if its distance exceeds `factor` times
the 10% quantile of the compared distances; if more than 10% of the rows are exactly equal, any other row counts.
Thousands of moved sentinels do not hide each other.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from t5g2convert.checkpoint.file_names import TOKENIZER_FILE
from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor
from t5g2convert.checkpoint.header import CONFIG_NAMES
from t5g2convert.checkpoint.hub.open_and_fetch import Origin, fetch, open_source
from t5g2convert.checkpoint.tokenizer.files import Tokenizer
from t5g2convert.conversion.write.aligned_projector import Table, paired_blocks
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.progress import Progress, silent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FIRST_RESERVED: Final = 256_000
"""From this id on, Gemma 3's table has rows that no text uses."""

FACTOR: Final = 10.0
"""Multiple of the drift of still rows that counts as moved; not established, our default."""

STILL: Final = 0.1
"""Share of the compared rows that is assumed to be still."""

KNOWN: Final = {
    255_999: "begin of image", 256_000: "end of image", 256_001: "the image token of T5Gemma 2",
    262_144: "the image token of Gemma 3",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MovedRange:
    """Adjacent rows that moved: first and last id, count, and median and largest distance."""

    first: int
    last: int
    count: int
    median: float
    largest: float
    known: str | None


@dataclass(frozen=True, slots=True)
class Probe:
    """The result of a probe.

    Attributes:
        rows: Rows that both tables have.
        compared: Compared rows, without a use of their own.
        equal: Exactly equal rows among them.
        still: 10% quantile of their distances.
        median: Median of their distances.
        largest: Largest of their distances.
        threshold: Distance above which a row counts as moved.
        ranges: Moved rows as runs of ids, last first, since sentinels descend.
        notes: Notes for the reader.
    """

    rows: int
    compared: int
    equal: int
    still: float
    median: float
    largest: float
    threshold: float
    ranges: tuple[MovedRange, ...]
    notes: tuple[str, ...]

    @property
    def moved(self) -> int:
        """Number of moved rows."""
        return sum(item.count for item in self.ranges)

    def to_json(self) -> dict[str, Any]:
        """Return what `t5g2 probe-sentinels --json` prints; an infinite distance, of a row of zeros, is null."""
        document = {**asdict(self), "moved": self.moved, "ranges": [asdict(item) for item in self.ranges]}
        return {**_finite(document), "ranges": [_finite(item) for item in document["ranges"]]}


def probe(gemma3: Origin, t5gemma2: Origin, *, factor: float = FACTOR, progress: Progress = silent) -> Probe:
    """Compare the embedding tables of two checkpoints, a block of rows at a time.

    Args:
        gemma3: A folder, or as a str also a model of the Hub; only the file with the table is downloaded.
        t5gemma2: The same for the trained model, or any later checkpoint.
        factor: Multiple of the 10% quantile that counts as moved.
        progress: Called with the number of bytes just read.

    Raises:
        CheckpointError: A checkpoint is damaged, has no table or another width, or has NaN or infinity in it.
        HubError: The Hub does not have a model, denies access, or cannot be reached.
        UsageError: The factor is negative.
    """
    import numpy as np

    if not factor >= 0:
        raise UsageError(f"--factor must be 0 or more, got {factor}")
    checkpoints = [open_source(origin) for origin in (gemma3, t5gemma2)]
    found = [_table_of(checkpoint) for checkpoint in checkpoints]
    sizes = [stored.entry.shape for _, stored in found]
    if sizes[0][1] != sizes[1][1]:
        raise CheckpointError(
            f"its rows have {sizes[1][1]} values, but the rows of {checkpoints[0].name} have {sizes[0][1]}",
            where=checkpoints[1].path,
        )
    rows = min(sizes[0][0], sizes[1][0])
    candidates, notes = _candidates(checkpoints, rows)
    if sizes[0][0] != sizes[1][0]:
        notes.append(f"the tables have {sizes[0][0]} and {sizes[1][0]} rows: the {rows} that both have are compared")
    with ExitStack() as stack:
        tables = [_opened(checkpoint, *each, stack) for checkpoint, each in zip(checkpoints, found, strict=True)]
        distances = _distances(tables[0], tables[1], rows, progress)
    compared = distances[candidates]
    still, median = map(float, np.quantile(compared, (STILL, 0.5))) if len(compared) else (0.0, 0.0)
    threshold = factor * still
    moved = np.flatnonzero(candidates & (distances > threshold))
    return Probe(
        rows=rows,
        compared=len(compared),
        equal=int((compared == 0).sum()),
        still=still,
        median=median,
        largest=float(compared.max(initial=0.0)),
        threshold=threshold,
        ranges=tuple(reversed(list(_ranges(moved, distances)))),
        notes=tuple(notes),
    )


def _table_of(checkpoint: Checkpoint) -> tuple[str, StoredTensor]:
    """Return the name and location of the embedding table; of two in an encoder-decoder, the encoder's."""
    found = {name: stored for name, stored in checkpoint.tensors.items() if name.endswith("embed_tokens.weight")}
    encoders = {name: stored for name, stored in found.items() if "decoder." not in name}
    found = encoders or found
    if len(found) != 1:
        count = "no embedding table" if not found else f"{len(found)} embedding tables"
        raise CheckpointError(f"has {count}, expected one embed_tokens.weight", where=checkpoint.path)
    ((name, stored),) = found.items()
    if len(stored.entry.shape) != 2 or stored.entry.dtype not in CONFIG_NAMES:
        raise CheckpointError(f"{name} is {stored.entry.dtype} {list(stored.entry.shape)}", where=checkpoint.path)
    fetch(checkpoint, [stored.file])
    return name, stored


def _opened(checkpoint: Checkpoint, name: str, stored: StoredTensor, stack: ExitStack) -> Table:
    path = checkpoint.path / stored.file
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
    stack.callback(os.close, fd)
    rows, width = stored.entry.shape
    return Table(name, stored.entry.dtype, rows, width, str(path), fd, stored.entry.start)


def _candidates(checkpoints: list[Checkpoint], rows: int) -> tuple["NDArray[np.bool_]", list[str]]:
    """Return the rows of tokens without a use of their own; all rows without a tokenizer."""
    import numpy as np

    found = next((tokenizer for each in checkpoints if (tokenizer := Tokenizer(each).json) is not None), None)
    if found is None:
        return np.ones(rows, np.bool_), ["neither has a tokenizer.json, so all rows are compared"]
    chosen = np.arange(rows) >= FIRST_RESERVED
    unused = [number for token, number in found.vocabulary().items() if token.startswith("<unused")]
    chosen[[number for number in unused if number < rows]] = True
    told = [] if chosen.any() else [f"{TOKENIZER_FILE} defines no unused tokens, and no ids from 256000 on"]
    return chosen, told


def _distances(before: Table, after: Table, rows: int, progress: Progress) -> "NDArray[np.float64]":
    """Return ||after - before|| / ||before|| by row; infinite if a row of zeros moved."""
    import numpy as np

    distances, at = np.empty(rows), 0
    for one, other in paired_blocks(before, after, rows, progress):
        # Subtract before squaring, so that small differences do not vanish.
        size, way = np.linalg.norm(one, axis=1), np.linalg.norm(other - one, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            distances[at : at + len(one)] = np.where((one == other).all(axis=1), 0.0, way / size)
        at += len(one)
    return distances


def _ranges(moved: "NDArray[np.int64]", distances: "NDArray[np.float64]") -> Iterator[MovedRange]:
    """Yield runs of moved ids in order; an id with a known meaning is its own run."""
    import numpy as np

    breaks = [
        at for at in range(1, len(moved)) if moved[at] != moved[at - 1] + 1 or {*moved[at - 1 : at + 1]} & KNOWN.keys()
    ]
    for run in np.split(moved, breaks) if len(moved) else ():
        far = distances[run]
        first, last = int(run[0]), int(run[-1])
        yield MovedRange(first, last, len(run), float(np.median(far)), float(far.max()), KNOWN.get(first))


def _finite(document: dict[str, Any]) -> dict[str, Any]:
    return {key: None if value == float("inf") else value for key, value in document.items()}
