"""The stored bytes of an output, compared for provenance with its plan and source.

Casts, the scaled row and the aligned projector are recomputed here with torch.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch
from torch import Tensor

from t5g2convert.checkpoint.adapter import Adapter
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.header import BITS, element_bytes
from t5g2convert.checkpoint.sources import Folders
from t5g2convert.conversion.plan.types import Content, Plan, PlannedAlignment, PlannedTable, PlannedTensor
from t5g2convert.errors import CheckpointError
from t5g2convert.parity.checks.aligned_projector import aligned_projector, projector_faults
from t5g2convert.parity.checks.merged_values import merged_faults
from t5g2convert.reference.weights import DTYPES

PIECE_BYTES: Final = 1 << 24
"""Bytes of the source to compare at once; a multiple of every element size."""

ReadRange = Callable[[Path, int, int], bytes]
"""Returns the bytes of a range: its path, first byte and number of bytes."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """The result of comparing all bytes.

    Attributes:
        faults: Every tensor that differs from the plan.
        residuals: For each aligned projector, bounds of the residual of its embedding tables.
        unmoved: Trained tensors that still have the source's values.
    """

    faults: list[str]
    residuals: list[tuple[float, float]]
    unmoved: list[str]


def compare_bytes(
    plan: Plan,
    folders: Folders,
    source: Checkpoint,
    target: Checkpoint,
    progress: Callable[[str], None],
    adapter: Adapter | None = None,
) -> Comparison:
    """Compare every tensor of an output with its plan and source.

    Args:
        plan: The plan of the conversion.
        folders: The folders of the checkpoints that the conversion read.
        source: The source, open.
        target: The output, open.
        progress: Called at every hundredth tensor.
        adapter: The adapter that was merged into the source, if one was.

    Raises:
        CheckpointError: A file cannot be read.
    """
    found = Comparison([], [], [])
    with ExitStack() as files:
        read = _Reader(files)
        found.faults.extend(_byte_faults(plan, folders, target, read, found.residuals, progress))
        found.faults.extend(_repeated_faults(plan, folders, read))
        found.faults.extend(_trained_faults(plan, source, target, read, found.unmoved))
        if adapter is not None:
            found.faults.extend(merged_faults(adapter, source, target, read, found.unmoved, progress))
    return found


class _Reader:
    """Reads ranges of files, which stay open until the comparison is done."""

    def __init__(self, files: ExitStack) -> None:
        self._files = files
        self._descriptors: dict[Path, int] = {}

    def __call__(self, path: Path, start: int, size: int) -> bytes:
        """Return `size` bytes from `start` on, fewer at the end of a file."""
        if path not in self._descriptors:
            try:
                self._descriptors[path] = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
            self._files.callback(os.close, self._descriptors[path])
        return os.pread(self._descriptors[path], size, start)


def _byte_faults(
    plan: Plan,
    folders: Folders,
    target: Checkpoint,
    read: ReadRange,
    residuals: list[tuple[float, float]],
    progress: Callable[[str], None],
) -> Iterator[str]:
    """Read every range of the source once, and yield the faults of all targets that it fills."""
    fills: dict[object, list[PlannedTensor]] = defaultdict(list)
    for tensor in (tensor for tensor in plan.tensors if tensor.content.kind not in ("given", "merged")):
        fills[tensor.content, tensor.dtype, tensor.name if tensor.content.source is None else None].append(tensor)
    for number, tensors in enumerate(fills.values()):
        if number % 100 == 0:
            progress(f"bytes of tensor {number} of {len(fills)}")
        content = tensors[0].content
        if content.alignment is not None:
            progress("least squares between the embedding tables")
            yield from _alignment_faults(tensors[0], content.alignment, folders, target, read, residuals)
            continue
        size, scale = tensors[0].nbytes, 1.0
        if content.source is not None:
            size = content.source.end - content.source.start
            scale = element_bytes(tensors[0].dtype) / element_bytes(content.dtype)
        faulty: set[str] = set()
        for at in range(0, size, PIECE_BYTES):
            expected = _expected(content, tensors[0], folders, at, min(PIECE_BYTES, size - at), read)
            for tensor in tensors:
                if tensor.name in faulty:
                    continue
                stored, start = target.tensors[tensor.name], int(at * scale)
                found = read(target.path / stored.file, stored.entry.start + start, len(expected))
                if found != expected:
                    faulty.add(tensor.name)
                    yield _byte_fault(tensor, expected, found, start)


def _expected(content: Content, tensor: PlannedTensor, folders: Folders, at: int, size: int, read: ReadRange) -> bytes:
    """Return the expected bytes of a target for `size` bytes of its source."""
    if content.value is not None:
        return _bytes(torch.full((size // element_bytes(tensor.dtype),), content.value).to(DTYPES[tensor.dtype]))
    if content.source is None:
        return bytes(size)
    piece = read(folders.path(content.source.file), content.source.start + at, size)
    if content.kind == "copy":
        return piece
    values = _values(piece, content.dtype).to(DTYPES[tensor.dtype])
    if content.kind == "scaled_row":
        # Round as the model does: first the scale to the dtype of the table, then the product.
        values = values * torch.tensor(len(values) ** 0.5).to(values.dtype)
    return _bytes(values)


def _byte_fault(tensor: PlannedTensor, expected: bytes, found: bytes, start: int) -> str:
    if len(found) != len(expected):
        return f"{tensor.name} ends too early"
    first = next(number for number, (one, other) in enumerate(zip(expected, found, strict=True)) if one != other)
    element = (start + first) // element_bytes(tensor.dtype)
    index = []
    for extent in reversed(tensor.shape):
        index.append(element % extent)
        element //= extent
    verb = {"copy": "is not", "cast": "is not the rounded", "scaled_row": "is not the scaled", "zeros": "is not zero:"}
    verb["filled"] = "is not the declared value"
    origin = f" {tensor.origin}" if tensor.origin is not None else ""
    return f"{tensor.name}{index[::-1]} {verb[tensor.content.kind]}{origin}"


def _alignment_faults(
    tensor: PlannedTensor,
    alignment: PlannedAlignment,
    folders: Folders,
    target: Checkpoint,
    read: ReadRange,
    residuals: list[tuple[float, float]],
) -> Iterator[str]:
    """Recompute an aligned projector from the embedding tables, and compare it with the stored one."""

    def rows_of(table: PlannedTable) -> Callable[[int, int], Tensor]:
        def rows(start: int, stop: int) -> Tensor:
            row = table.width * element_bytes(table.dtype)
            data = read(folders.path(table.source.file), table.source.start + start * row, (stop - start) * row)
            return _values(data, table.dtype).view(-1, table.width)

        return rows

    source = tensor.content.source
    assert source is not None, "an aligned projector has a source"
    projector = _values(read(folders.path(source.file), source.start, source.end - source.start), tensor.content.dtype)
    expected = aligned_projector(
        projector.view(-1, alignment.donor.width),
        rows_of(alignment.donor),
        rows_of(alignment.target),
        rows=alignment.rows,
        ridge=alignment.ridge,
    )
    residuals.append(expected.residual)
    stored = target.tensors[tensor.name]
    found = read(target.path / stored.file, stored.entry.start, stored.entry.nbytes)
    if len(found) != tensor.nbytes:
        yield f"{tensor.name} ends too early"
        return
    yield from projector_faults(tensor.name, _values(found, tensor.dtype).view(tensor.shape), expected)


def _trained_faults(
    plan: Plan, source: Checkpoint, target: Checkpoint, read: ReadRange, unmoved: list[str]
) -> Iterator[str]:
    """Require finite trained tensors; add the names of tensors that still have the source's values to `unmoved`."""

    def values(checkpoint: Checkpoint, name: str, at: int, count: int) -> Tensor:
        stored, size = checkpoint.tensors[name], element_bytes(checkpoint.tensors[name].entry.dtype)
        data = read(checkpoint.path / stored.file, stored.entry.start + at * size, count * size)
        return _values(data[: len(data) // size * size], stored.entry.dtype)

    step = PIECE_BYTES // 4
    for name, count in ((each.name, each.elements) for each in plan.tensors if each.content.kind == "given"):
        pairs = (
            (values(source, name, at, min(step, count - at)), values(target, name, at, min(step, count - at)))
            for at in range(0, count, step)
        )
        fault, moved = _trained_fault(name, pairs)
        if fault is not None:
            yield fault
        elif not moved:
            unmoved.append(name)


def _trained_fault(name: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> tuple[str | None, bool]:
    """Return the fault of a trained tensor, if any, and whether it differs from the source's."""
    moved, at = False, 0
    for source, target in pairs:
        if len(source) != len(target):
            return f"{name} ends too early", moved
        finite = torch.isfinite(target)
        if not bool(finite.all()):
            return f"{name} was trained, but element {at + int((~finite).nonzero()[0])} is not finite", moved
        moved |= not torch.equal(source.to(target.dtype), target)
        at += len(target)
    return None, moved


def _repeated_faults(plan: Plan, folders: Folders, read: ReadRange) -> Iterator[str]:
    """Require that a tensor dropped as a copy, like lm_head, really is a copy."""
    for drop in plan.dropped:
        if drop.must_equal is not None:
            one, other = (
                StoredNumbers(folders.path(span.file), span.start, span.end, dtype)
                for span, dtype in ((drop.content, drop.dtype), (drop.must_equal.source, drop.must_equal.dtype))
            )
            if not repeats(one, other, read, PIECE_BYTES):
                yield f"{drop.name} of the source was dropped as a copy, but is not one"


@dataclass(frozen=True, slots=True)
class StoredNumbers:
    """The bytes of a tensor: their file, the first, the one after the last, and their safetensors dtype."""

    file: Path
    start: int
    end: int
    dtype: str

    @property
    def elements(self) -> int:
        """Number of values."""
        return (self.end - self.start) * 8 // BITS[self.dtype]

    def piece(self, first: int, count: int, read: ReadRange) -> bytes:
        """Return the bytes of some of the values."""
        bits = BITS[self.dtype]
        return read(self.file, self.start + first * bits // 8, -(-count * bits // 8))


def repeats(one: StoredNumbers, other: StoredNumbers, read: ReadRange, piece_bytes: int) -> bool:
    """Return whether two tensors hold the same numbers; either may have a wider dtype than the other.

    Args:
        one: The first tensor.
        other: The second tensor.
        read: Reads a range of a file.
        piece_bytes: Bytes to compare at once.
    """
    if one.elements != other.elements:
        return False
    step = piece_bytes * 8 // max(BITS[one.dtype], BITS[other.dtype])
    for first in range(0, one.elements, step):
        count = min(step, one.elements - first)
        pieces = [side.piece(first, count, read) for side in (one, other)]
        if one.dtype != other.dtype:
            # float32 holds the numbers of every dtype that a model can run in.
            pieces = [
                _bytes(_values(piece, side.dtype).float()) for piece, side in zip(pieces, (one, other), strict=True)
            ]
        if pieces[0] != pieces[1]:
            return False
    return True


def _values(data: bytes, dtype: str) -> Tensor:
    """Return the numbers of stored bytes; `torch.frombuffer` refuses an empty buffer."""
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]) if data else torch.empty(0, dtype=DTYPES[dtype])


def _bytes(values: Tensor) -> bytes:
    return bytes(values.view(torch.uint8).numpy().data)
