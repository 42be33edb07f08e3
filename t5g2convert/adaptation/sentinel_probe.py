"""Probing sentinels: which rows of the embedding table moved between a Gemma 3 and a T5Gemma 2.

Google's models have their sentinels from `<unused6237>`, id 262139, downwards; whether other unused tokens, such as
262140 to 262143, have a use is not established. The row of a token that was read or written has moved far more than the
row of an unused token, if the premise below holds. The probe compares rows of tokens without a use of their own,
`<unused...>` and every id from 256000 on; without a tokenizer, all rows.

The distance of a row is ||t - g|| / ||g||, with the T5Gemma 2's row t and the Gemma 3's row g. Embedding and softmax
share one matrix, so every row drifts a little in training. A row counts as moved if its distance exceeds `factor` times
the 10% quantile of the compared distances and what rounding to the T5Gemma 2's dtype can add, and is above the next gap
in the sorted distances: still rows must not be split in two. Thousands of moved sentinels do not hide each other.

The premise is that unused rows stay behind. The softmax gives every row a gradient. AdamW divides it by its own size,
so an unused row stays only if its gradient is far below AdamW's epsilon: if the model gives unused tokens almost no
probability. In a model with a small vocabulary, or with an optimizer without such an epsilon, rows that nothing uses
move as far as the others. Therefore the premise is measured with rows that text certainly used: of the rows of ordinary
tokens, those that moved most. If they are not above the same threshold, or there is no gap, the probe has no answer.
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

GAP: Final = 1.5
"""How many times as far as any still row the stillest moved row has moved; not established, our default."""

ROUNDOFF: Final = {"BF16": 2.0**-8, "F16": 2.0**-11, "F32": 2.0**-24}
"""The largest relative error of rounding to a dtype, and so of a rounded row."""

TEXT_ROWS: Final = 100
"""How many rows of ordinary tokens stand for text, or a tenth of them if that is less. Text of one language uses few of
262,144 tokens, but certainly these."""

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
class Premise:
    """Whether rows that were used moved more than rows that were not.

    Attributes:
        holds: Whether it does.
        reason: The numbers, in one sentence.
        ordinary: Rows of ordinary tokens; 0 without a tokenizer.
        text_rows: The rows among them that moved most and stand for text; without a tokenizer, the one row of all
            that moved most.
        text: Median of their distances.
        ratio: `text` divided by the distance of the stillest compared rows; None if these did not move at all.
    """

    holds: bool
    reason: str
    ordinary: int
    text_rows: int
    text: float
    ratio: float | None


@dataclass(frozen=True, slots=True)
class Probe:
    """The result of a probe.

    Attributes:
        premise: Whether the distances tell used rows from unused ones.
        rows: Rows that both tables have.
        compared: Compared rows, without a use of their own.
        equal: Exactly equal rows among them.
        still: 10% quantile of their distances.
        median: Median of their distances.
        largest: Largest of their distances.
        threshold: Distance above which a row counts as moved.
        ranges: Moved rows as runs of ids, last first, since sentinels descend; empty if the premise does not hold.
        notes: Notes for the reader.
    """

    premise: Premise
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
    def moved(self) -> int | None:
        """Number of moved rows; None if the premise does not hold."""
        return sum(item.count for item in self.ranges) if self.premise.holds else None

    def to_json(self) -> dict[str, Any]:
        """Return what `t5g2 probe-sentinels --json` prints; an infinite distance, of a row of zeros, is null."""
        document = {**_finite(asdict(self)), "moved": self.moved, "premise": _finite(asdict(self.premise))}
        return {**document, "ranges": [_finite(asdict(item)) for item in self.ranges]}


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
    candidates, ordinary, notes = _candidates(checkpoints, rows)
    if sizes[0][0] != sizes[1][0]:
        notes.append(f"the tables have {sizes[0][0]} and {sizes[1][0]} rows: the {rows} that both have are compared")
    with ExitStack() as stack:
        tables = [_opened(checkpoint, *each, stack) for checkpoint, each in zip(checkpoints, found, strict=True)]
        distances = _distances(tables[0], tables[1], rows, progress)
    compared = distances[candidates]
    still, median = map(float, np.quantile(compared, (STILL, 0.5))) if len(compared) else (0.0, 0.0)
    threshold, has_gap = _threshold(compared, max(factor * still, ROUNDOFF[found[1][1].entry.dtype]))
    premise = _premise(distances[ordinary], compared, still=still, threshold=threshold, has_gap=has_gap)
    moved = np.flatnonzero(candidates & (distances > threshold))
    return Probe(
        premise=premise,
        rows=rows,
        compared=len(compared),
        equal=int((compared == 0).sum()),
        still=still,
        median=median,
        largest=float(compared.max(initial=0.0)),
        threshold=threshold,
        ranges=tuple(reversed(list(_ranges(moved, distances)))) if premise.holds else (),
        notes=tuple(notes),
    )


def _threshold(compared: "NDArray[np.float64]", lowest: float) -> tuple[float, bool]:
    """Return the distance below the first gap from `lowest` on, and whether there is one, or no row that far."""
    import numpy as np

    ordered = np.sort(compared)
    first = int(np.searchsorted(ordered, lowest, side="right"))
    if first == len(ordered):
        return lowest, True
    below = np.concatenate([[0.0], ordered[:-1]])[first:]
    gaps = np.flatnonzero(ordered[first:] >= GAP * below)
    return (max(lowest, float(below[gaps[0]])), True) if len(gaps) else (lowest, False)


def _premise(
    ordinary: "NDArray[np.float64]",
    compared: "NDArray[np.float64]",
    *,
    still: float,
    threshold: float,
    has_gap: bool,
) -> Premise:
    """Compare the rows that text certainly used with the stillest of the compared rows.

    Args:
        ordinary: Distances of the rows of ordinary tokens; empty if they are not known.
        compared: Distances of the compared rows.
        still: Their 10% quantile.
        threshold: Distance above which a row counts as moved.
        has_gap: Whether there is a gap between still and moved rows.
    """
    import numpy as np

    if not len(compared):
        return Premise(False, "there are no rows of unused tokens", len(ordinary), 0, 0.0, None)
    if len(ordinary):
        count, pool, who = max(1, min(TEXT_ROWS, len(ordinary) // 10)), ordinary, "rows of text"
    else:
        count, pool, who = 1, compared, "the farthest row"
    text = float(np.median(np.sort(pool)[-count:]))
    holds, ratio = has_gap and text > threshold, text / still if still else None
    if not text:
        reason = f"{who} did not move{'' if compared.any() else ': the table was not trained'}"
    else:
        others = f"moved {still:.3g} or less" if still else "did not move"
        times = "" if ratio is None else f", a ratio of {ratio:.3g}"
        needed = "" if text > threshold else f"; to differ from unused rows, {who} must move more than {threshold:.3g}"
        if not has_gap:
            needed += (
                f"; from {threshold:.3g} to {compared.max():.3g} the distances have no gap between still and moved"
            )
        reason = f"{who} moved {text:.3g}, the stillest tenth of the compared rows {others}{times}{needed}"
    return Premise(holds, reason, len(ordinary), count, text, ratio)


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


def _candidates(checkpoints: list[Checkpoint], rows: int) -> tuple["NDArray[np.bool_]", "NDArray[np.bool_]", list[str]]:
    """Return the rows of tokens without a use of their own, and those of ordinary tokens.

    Without a tokenizer, all rows are the former and none the latter.
    """
    import numpy as np

    found = next((tokenizer for each in checkpoints if (tokenizer := Tokenizer(each).json) is not None), None)
    chosen, ordinary = np.arange(rows) >= FIRST_RESERVED, np.zeros(rows, np.bool_)
    if found is None:
        note = "neither has a tokenizer.json, so all rows are compared, and rows of text are not known"
        return np.ones(rows, np.bool_), ordinary, [note]
    vocabulary = {token: number for token, number in found.vocabulary().items() if 0 <= number < rows}
    chosen[[number for token, number in vocabulary.items() if token.startswith("<unused")]] = True
    ordinary[[*vocabulary.values()]] = True
    ordinary &= ~chosen
    told = [] if chosen.any() else [f"{TOKENIZER_FILE} defines no unused tokens, and no ids from 256000 on"]
    return chosen, ordinary, told


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
