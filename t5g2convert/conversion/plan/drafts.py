"""Target tensors with their contents, before they are assigned to shards."""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from t5g2convert.checkpoint.folder import StoredTensor
from t5g2convert.checkpoint.header import element_bytes, tensor_bits
from t5g2convert.checkpoint.sources import SOURCE, VISION_FROM, Role, named
from t5g2convert.conversion.options import PlanOptions
from t5g2convert.conversion.plan.types import (
    Content,
    ContentKind,
    PlannedAlignment,
    PlannedTable,
    SourceRange,
)
from t5g2convert.conversion.plan.vocabulary import shared_rows
from t5g2convert.errors import CheckpointError
from t5g2convert.mapping.name_patterns import expand
from t5g2convert.mapping.operations import Aligned, Copy, ScaledRow, TakeRows, Zeros
from t5g2convert.mapping.resolution import Resolution
from t5g2convert.mapping.row_resolution import Resolved
from t5g2convert.mapping.schema import WeightMap


@dataclass(frozen=True, slots=True)
class Draft:
    """A target tensor that is not yet assigned to a shard."""

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    origin: str | None
    content: Content
    merged_attention: bool


def draft_tensor(
    item: Resolved, resolution: Resolution, weight_map: WeightMap, options: PlanOptions, cast_to: str | None
) -> Draft:
    """Return a target tensor with its content; zeros get the model's dtype later, others keep or cast their own."""
    operation = item.row.op
    source_dtype = "" if item.source is None else item.source.entry.dtype
    target_dtype = cast_to or source_dtype
    match operation:
        case Copy() if item.factor is not None:
            # All norms of these families multiply by 1 + weight.
            content = Content("filled", None, target_dtype, value=_float32(item.factor - 1))
        case Copy() | TakeRows():
            assert item.source is not None, "the schema gives every row but zeros a source"
            start = item.source.entry.start
            kind: ContentKind = "copy" if target_dtype == source_dtype else "cast"
            end = start + tensor_bits(source_dtype, item.shape) // 8
            content = Content(kind, SourceRange(named(item.role, item.source.file), start, end), source_dtype)
        case ScaledRow():
            assert item.source is not None, "the schema gives every row but zeros a source"
            content = _scaled_row(operation, item, item.source, resolution.dims)
        case Zeros():
            content = Content("zeros", None, target_dtype)
        case Aligned():
            assert item.source is not None, "the schema gives every row but zeros a source"
            alignment = _alignment(operation, resolution, weight_map, options.ridge)
            content = Content("aligned", whole_range(item.source, item.role), source_dtype, alignment)
        case _:
            raise NotImplementedError(f"no content for {operation!r}")
    return Draft(
        item.target,
        item.part,
        target_dtype,
        item.shape,
        None if item.source is None or item.factor is not None else named(item.role, item.source.entry.name),
        content,
        item.row.merged_attention,
    )


def _float32(value: float) -> float:
    """Round to float32, so that another dtype is reached by the same two roundings everywhere."""
    (rounded,) = struct.unpack("<f", struct.pack("<f", value))
    return float(rounded)


def _scaled_row(operation: ScaledRow, item: Resolved, source: StoredTensor, dims: Mapping[str, int]) -> Content:
    """Return the row of one of the target's tokens; zeros if the table does not have that row."""
    token = operation.scaled_row
    row = dims[token] if isinstance(token, str) else token
    entry = source.entry
    if not 0 <= row < entry.shape[0]:
        return Content("zeros", None, entry.dtype)
    width = entry.shape[1] * element_bytes(entry.dtype)
    start = entry.start + row * width
    return Content("scaled_row", SourceRange(named(item.role, source.file), start, start + width), entry.dtype)


def _alignment(operation: Aligned, resolution: Resolution, weight_map: WeightMap, ridge: float) -> PlannedAlignment:
    tables = []
    for role in (VISION_FROM, resolution.table[0]):
        ((_, name),) = expand(operation.aligned.tables, resolution.layouts[role], {})
        stored = resolution.checkpoints[role].tensors[name]
        tables.append(PlannedTable(name, whole_range(stored, role), stored.entry.dtype, *stored.entry.shape))
    donor, target = tables
    rows = shared_rows(resolution, weight_map, donor.rows)
    if rows < donor.width and not ridge:
        raise CheckpointError(
            f"{rows} rows of width {donor.width} do not determine the map",
            where=resolution.checkpoints[VISION_FROM].path,
            hint="try --ridge 1e-6",
        )
    return PlannedAlignment(donor, target, rows, ridge)


def whole_range(tensor: StoredTensor, role: Role = SOURCE) -> SourceRange:
    return SourceRange(named(role, tensor.file), tensor.entry.start, tensor.entry.end)
