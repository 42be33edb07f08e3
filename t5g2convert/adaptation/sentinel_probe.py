"""Which rows of the embedding table moved between a Gemma 3 and a T5Gemma 2: what tokens a release was trained with.

Sentinels and mode tokens of Google's training are not established. But a token that was read or written has moved its
row far more than one that never was. Rows of tokens without a use of their own are therefore compared: `<unused…>`, and
every id from 256000 on; without a tokenizer, all rows.

A row's distance is ||t - g|| / ||g||, of the T5Gemma 2's row t from the Gemma 3's row g. With one matrix for embedding
and softmax every row drifts a little in training, used or not. So a row counts as moved where its distance is more than
`factor` times what the stillest tenth of the compared rows stays below; where more than a tenth of them are exactly
equal, any other row counts. Thousands of sentinels may thus have moved, and do not hide each other.
"""

import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from t5g2convert.checkpoint.dtypes import CONFIG_NAMES
from t5g2convert.checkpoint.file_names import TOKENIZER_FILE
from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor
from t5g2convert.checkpoint.hub.model import Origin, fetch, open_source
from t5g2convert.conversion.plan.vocabulary import vocabulary_of
from t5g2convert.conversion.write.embedding_tables import Table, paired_blocks
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.progress import Progress, silent

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

FIRST_RESERVED: Final = 256_000
"""From here on Gemma 3's table has rows that no text uses."""

FACTOR: Final = 10.0
"""How many times the drift of still rows a row must have moved; not established, our default."""

STILL: Final = 0.1
"""The share of the compared rows that is taken to be still."""

KNOWN: Final = {
    255_999: "begin of image", 256_000: "end of image", 256_001: "the image token of T5Gemma 2",
    262_144: "the image token of Gemma 3",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class MovedRange:
    """Rows side by side that moved: the first and last id, their count, and their median and largest distance."""

    first: int
    last: int
    count: int
    median: float
    largest: float
    known: str | None


@dataclass(frozen=True, slots=True)
class Probe:
    """What was found.

    Attributes:
        rows: Rows that both tables have.
        compared: Those that were looked at, as they have no use of their own.
        equal: Those of them that are exactly the same.
        still: Distance that the stillest tenth of the compared rows stays below.
        median: Median of their distances.
        largest: The largest of them.
        threshold: Distance above which a row counts as moved.
        ranges: The rows that moved, by runs of ids, the last first: sentinels would descend from the last id.
        notes: What a reader must know.
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
        """How many rows moved."""
        return sum(item.count for item in self.ranges)

    def to_json(self) -> dict[str, Any]:
        """What `t5g2 probe-sentinels --json` prints; a row of zeros that moved has no distance, which is null."""
        document = {**asdict(self), "moved": self.moved, "ranges": [asdict(item) for item in self.ranges]}
        return {**_finite(document), "ranges": [_finite(item) for item in document["ranges"]]}


def probe(gemma3: Origin, t5gemma2: Origin, *, factor: float = FACTOR, progress: Progress = silent) -> Probe:
    """Compare the embedding tables of two checkpoints, a block of rows at a time.

    Args:
        gemma3: A folder; as a str also a model of the Hub, of which the file with the table is downloaded.
        t5gemma2: The same, of what was made of it and trained; or any later checkpoint.
        factor: How many times the distance of the stillest tenth of rows a row must have moved.
        progress: Told of the bytes that were read.

    Raises:
        CheckpointError: A checkpoint is not sound, has no table or another width, or holds NaN or infinity there.
        HubError: The Hub does not have a model or give it out, or cannot be reached.
        UsageError: The factor has no meaning.
    """
    import numpy as np

    if not factor >= 0:
        raise UsageError(f"a factor of {factor} has no meaning", hint="0 or more")
    checkpoints = [open_source(origin) for origin in (gemma3, t5gemma2)]
    found = [_table_of(checkpoint) for checkpoint in checkpoints]
    sizes = [stored.entry.shape for _, stored in found]
    if sizes[0][1] != sizes[1][1]:
        raise CheckpointError(
            f"its rows have {sizes[1][1]} values, those of {checkpoints[0].name} {sizes[0][1]}: no common space",
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
    """The name of the embedding table, and where it lies; of an encoder-decoder that has it twice the encoder's."""
    found = {name: stored for name, stored in checkpoint.tensors.items() if name.endswith("embed_tokens.weight")}
    encoders = {name: stored for name, stored in found.items() if "decoder." not in name}
    found = encoders or found
    if len(found) != 1:
        told = "no embedding table" if not found else f"{len(found)} embedding tables"
        raise CheckpointError(f"has {told}, expected one embed_tokens.weight", where=checkpoint.path)
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
    """The rows of tokens without a use of their own; all, where no checkpoint tells the names of its tokens."""
    import numpy as np

    named = next((each for each in checkpoints if each.holds(TOKENIZER_FILE)), None)
    if named is None:
        return np.ones(rows, np.bool_), ["neither has a tokenizer.json: all rows are compared, used or not"]
    fetch(named, [TOKENIZER_FILE])
    path = named.path / TOKENIZER_FILE
    chosen = np.arange(rows) >= FIRST_RESERVED
    try:
        with path.open("rb") as file:
            unused = [number for name, number in vocabulary_of(file) if name.startswith(b"<unused")]
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
    except ValueError as error:
        raise CheckpointError(f"is not valid JSON: {error}", where=path) from None
    chosen[[number for number in unused if number < rows]] = True
    told = [] if chosen.any() else [f"{Path(path).name} names no unused token, and there is no id from 256000 on"]
    return chosen, told


def _distances(before: Table, after: Table, rows: int, progress: Progress) -> "NDArray[np.float64]":
    """||after - before|| / ||before|| by row; infinite where a row of zeros has moved."""
    import numpy as np

    distances, at = np.empty(rows), 0
    for one, other in paired_blocks(before, after, rows, progress):
        # Before the square: a difference of small numbers is not to vanish in it.
        size, way = np.linalg.norm(one, axis=1), np.linalg.norm(other - one, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            distances[at : at + len(one)] = np.where((one == other).all(axis=1), 0.0, way / size)
        at += len(one)
    return distances


def _ranges(moved: "NDArray[np.int64]", distances: "NDArray[np.float64]") -> Iterator[MovedRange]:
    """Runs of ids that moved, in their order; one that is known for something stands alone."""
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
