"""provenance: every byte of the target is what the map says of the source, and nothing of the source is lost.

The one check that asks the converter for its plan; it takes from it which tensor should come from where, and looks at
the bytes itself. Casts and the scaled row are computed anew, with torch.
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from t5g2convert.checkpoint.dtypes import element_bytes
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.inputs import Folders
from t5g2convert.checkpoint.manifest import Manifest
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.conversion.options import PlanOptions
from t5g2convert.conversion.plan.builder import build_plan, open_sources
from t5g2convert.conversion.plan.types import (
    Content,
    Plan,
    PlannedAlignment,
    PlannedTable,
    PlannedTensor,
)
from t5g2convert.conversion.trained_model import named_by, plan_adapted
from t5g2convert.errors import CheckpointError, MappingError, UsageError
from t5g2convert.parity.checks.aligned_projector import aligned_projector, projector_faults
from t5g2convert.parity.checks.manifest_check import (
    file_faults,
    header_faults,
    manifest_faults,
    mapping_faults,
    weights_faults,
)
from t5g2convert.parity.checks.repeated_tensors import Stored, repeats
from t5g2convert.parity.checks.source_coverage import account, accounts_of
from t5g2convert.parity.checks.trained_values import given_faults
from t5g2convert.parity.parents import Parent
from t5g2convert.parity.reports.report import Check, refused
from t5g2convert.reference.weights import DTYPES

PIECE_BYTES: Final = 1 << 24
"""Bytes of the source that are compared at once; a multiple of every element's size."""


def replay(sources: Sources, recorded: Mapping[str, Any], mapping: str | None, part: str | None = None) -> Plan:
    """The plan that the converter makes today of this source, with the options that the manifest tells of.

    Args:
        sources: What was converted.
        recorded: The options that the manifest records.
        mapping: The map, if not the shipped one for the source.
        part: What was taken out of the source, if it was not converted whole.

    Raises:
        CheckpointError: The source is not what its config implies.
        MappingError: The map is faulty, or does not fill the target.
    """
    options = PlanOptions.of_record(recorded, mapping=mapping, part=part, **sources.other_origins)
    return build_plan(open_sources(sources.origin, options), options)


def planned(
    sources: Sources, manifest: Manifest | None, mapping: str | None, part: str | None = None
) -> tuple[Plan, str | None]:
    """The plan as `replay` makes it, or without the options that the manifest tells of, with what is wrong with them.

    Raises:
        CheckpointError: The source is not what its config implies.
        MappingError: The map is faulty, or does not fill the target.
    """
    recorded = {} if manifest is None else manifest.options
    try:
        return replay(sources, recorded, mapping, part), None
    except (CheckpointError, MappingError, UsageError) as error:
        with_heads = None if manifest is None else _replayed_with_heads_dropped(sources, recorded, mapping, part)
        if with_heads is not None:
            return with_heads, "t5g2.json does not tell of drop_heads, and without that option this source is refused"
        if not recorded:
            raise
        # What cannot be done without options either is no fault of the manifest.
        plan = replay(sources, {}, mapping, part)
        return plan, f"t5g2.json tells of options that this source was not converted with: {error.message}"


def _replayed_with_heads_dropped(
    sources: Sources, recorded: Mapping[str, Any], mapping: str | None, part: str | None
) -> Plan | None:
    """The plan with one more option than the manifest tells of; None where that is not possible either."""
    if recorded.get("drop_heads"):
        return None
    try:
        return replay(sources, {**recorded, "drop_heads": True}, mapping, part)
    except (CheckpointError, MappingError, UsageError):
        return None


def planned_adapted(sources: Sources, manifest: Manifest | None) -> tuple[Plan, str | None]:
    """The plan that puts trained values into a model, as the manifest tells of them, with what is wrong with that.

    Raises:
        CheckpointError: The source is not what its config implies.
    """
    source = sources.source
    if manifest is None or manifest.adaptation is None:
        return plan_adapted(source, {}, None), "t5g2.json tells of no adaptation"
    facts = {key: value for key, value in manifest.adaptation.document().items() if key not in ("trained", "frozen")}
    names = named_by(manifest.adaptation.trained, source.tensors)
    shapes = {name: source.tensors[name].entry.shape if name in source.tensors else () for name in names}
    try:
        return plan_adapted(source, shapes, facts, dtype=PlanOptions.of_record(manifest.options).dtype), None
    except CheckpointError as error:
        # What cannot be done without training either is no fault of the manifest.
        plan = plan_adapted(source, {}, None)
        reason = error.details[0] if error.details else error.message
        return plan, f"t5g2.json tells of a training that this source cannot have had: {reason}"


def check_options(manifest: Manifest) -> None:
    """Refuse a manifest that tells of options which no conversion can have had.

    Raises:
        CheckpointError: With the option.
    """
    given = {"decoder_from": manifest.decoder_from, "vision_from": manifest.vision_from}
    others = {role: Path() for role, record in given.items() if record is not None}
    try:
        PlanOptions.of_record(manifest.options, **others)
    except UsageError as error:
        raise CheckpointError(f"tells of an option without meaning: {error.message}") from None


def judge_provenance(
    plan: Plan,
    parent: Parent,
    target: Checkpoint,
    manifest: Manifest | None,
    progress: Callable[[str], None],
    *,
    shipped: bool = True,
) -> Check:
    """Compare the target's bytes with the source's, and account for every byte of the source.

    Args:
        plan: What the converter would do with this source and map today.
        parent: The source, and the donor of its tower if it has one.
        target: The target, open.
        manifest: The target's manifest; None if it has none.
        progress: Told what is being done.
        shipped: Whether the map is one that ships, and may change from version to version.
    """
    folders = parent.folders
    residuals: list[tuple[float, float]] = []
    unmoved: list[str] = []
    faults = [*header_faults(plan, target), *file_faults(plan, target, manifest), *manifest_faults(plan, manifest)]
    faults += mapping_faults(plan, manifest, shipped=shipped)
    if not faults:
        with ExitStack() as files:
            reader = _Reader(files)
            faults += _byte_faults(plan, folders, target, reader, residuals, progress)
            faults += _repeated_faults(plan, folders, reader)
            faults += _given_faults(plan, parent.checkpoint, target, reader, unmoved)
        progress("sha256 of the source's weights")
        faults += weights_faults(plan, folders, manifest)
        faults += _carried_faults(plan, folders, target.path)
    accounts = accounts_of(plan, parent.checkpoint)
    faults += [f"{name} of the source cannot be rebuilt, and that is not declared" for name in accounts["lost"]]
    if faults:
        return refused("provenance", "fault(s)", faults)
    return Check("provenance", True, account(plan, accounts, residuals, unmoved))


class _Reader:
    """Reads ranges of files, which stay open until the check is done."""

    def __init__(self, files: ExitStack) -> None:
        self._files = files
        self._descriptors: dict[Path, int] = {}

    def __call__(self, path: Path, start: int, size: int) -> bytes:
        """`size` bytes from `start` on, fewer at the end of a file."""
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
    read: _Reader,
    residuals: list[tuple[float, float]],
    progress: Callable[[str], None],
) -> Iterator[str]:
    """Every range of the source is read once, and compared with all targets that it fills.

    The bounds of the residual of every alignment are added to `residuals`.
    """
    fills: dict[object, list[PlannedTensor]] = defaultdict(list)
    for tensor in (tensor for tensor in plan.tensors if tensor.content.kind != "given"):
        fills[tensor.content, tensor.dtype, tensor.name if tensor.content.source is None else None].append(tensor)
    for number, tensors in enumerate(fills.values()):
        if number % 100 == 0:
            progress(f"bytes of tensor {number} of {len(fills)}")
        if tensors[0].content.alignment is not None:
            progress("least squares between the embedding tables")
            alignment = tensors[0].content.alignment
            yield from _alignment_faults(tensors[0], alignment, folders, target, read, residuals)
            continue
        content, size, scale = tensors[0].content, tensors[0].nbytes, 1.0
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


def _given_faults(
    plan: Plan, source: Checkpoint, target: Checkpoint, read: _Reader, unmoved: list[str]
) -> Iterator[str]:
    """Trained tensors hold numbers; those that training has left as they were are added to `unmoved`."""

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
        yield from given_faults(name, pairs, unmoved)


def _alignment_faults(
    tensor: PlannedTensor,
    alignment: PlannedAlignment,
    folders: Folders,
    target: Checkpoint,
    read: _Reader,
    residuals: list[tuple[float, float]],
) -> Iterator[str]:
    """Whether a projector is the donor's, carried over; computed anew from the tables."""

    def rows_of(table: PlannedTable) -> Callable[[int, int], Tensor]:
        def rows(start: int, stop: int) -> Tensor:
            row = table.width * element_bytes(table.dtype)
            data = read(folders.path(table.source.file), table.source.start + start * row, (stop - start) * row)
            return _values(data, table.dtype).view(-1, table.width)

        return rows

    source = tensor.content.source
    assert source is not None, "what is aligned has a source"
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


def _values(data: bytes, dtype: str) -> Tensor:
    """The numbers of stored bytes; torch makes no tensor of none."""
    return torch.frombuffer(bytearray(data), dtype=DTYPES[dtype]) if data else torch.empty(0, dtype=DTYPES[dtype])


def _expected(content: Content, tensor: PlannedTensor, folders: Folders, at: int, size: int, read: _Reader) -> bytes:
    """What a target must hold where these bytes of its source go."""
    if content.source is None:
        return bytes(size)
    piece = read(folders.path(content.source.file), content.source.start + at, size)
    if content.kind == "copy":
        return piece
    values = _values(piece, content.dtype).to(DTYPES[tensor.dtype])
    if content.kind == "scaled_row":
        # Rounded as the model rounds it: the scale to the dtype of the table first, then the product.
        values = values * torch.tensor(len(values) ** 0.5).to(values.dtype)
    return _bytes(values)


def _bytes(values: Tensor) -> bytes:
    return bytes(values.view(torch.uint8).numpy().data)


def _byte_fault(tensor: PlannedTensor, expected: bytes, found: bytes, start: int) -> str:
    if len(found) != len(expected):
        return f"{tensor.name} ends too early"
    first = next(number for number, (one, other) in enumerate(zip(expected, found, strict=True)) if one != other)
    element = (start + first) // element_bytes(tensor.dtype)
    place = []
    for extent in reversed(tensor.shape):
        place.append(element % extent)
        element //= extent
    told = {"copy": "is not", "cast": "is not the rounded", "scaled_row": "is not the scaled", "zeros": "is not zero:"}
    origin = f" {tensor.origin}" if tensor.origin is not None else ""
    return f"{tensor.name}{place[::-1]} {told[tensor.content.kind]}{origin}"


def _repeated_faults(plan: Plan, folders: Folders, read: _Reader) -> Iterator[str]:
    """A dropped copy, like lm_head, must be one."""
    for drop in plan.dropped:
        if drop.must_equal is not None:
            one, other = (
                Stored(folders.path(span.file), span.start, span.end, dtype)
                for span, dtype in ((drop.content, drop.dtype), (drop.must_equal.source, drop.must_equal.dtype))
            )
            if not repeats(one, other, read, PIECE_BYTES):
                yield f"{drop.name} of the source was dropped as a copy and is not one"


def _carried_faults(plan: Plan, folders: Folders, target: Path) -> Iterator[str]:
    """Files that are copied are the source's; those that are made are judged by `tokenizer`."""
    for name in (file.name for file in plan.files if file.how == "copied"):
        try:
            if folders.path(name).read_bytes() != (target / name).read_bytes():
                yield f"{name} is not the source's"
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"
