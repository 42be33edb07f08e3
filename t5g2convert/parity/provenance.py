"""provenance: every byte of the target is what the map says of the source, and nothing of the source is lost.

The one check that asks the converter for its plan; it takes from it which tensor should come from where, and looks at
the bytes itself. Casts and the scaled row are computed anew, with torch.
"""

import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from t5g2convert.checkpoint.dtypes import element_bytes
from t5g2convert.checkpoint.folder import INDEX_FILE, SINGLE_FILE, Checkpoint, read_json_object
from t5g2convert.checkpoint.roles import Folders
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.conversion.options import Options, recorded_options
from t5g2convert.conversion.plan import (
    Content,
    Kind,
    Plan,
    PlannedAlignment,
    PlannedSource,
    PlannedTable,
    PlannedTensor,
)
from t5g2convert.conversion.planner import build_plan
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.parity.alignment import aligned_projector, projector_faults
from t5g2convert.parity.parent import Parent
from t5g2convert.parity.report import Check, refused
from t5g2convert.reference.weights import DTYPES

PIECE_BYTES: Final = 1 << 24
"""Bytes of the source that are compared at once; a multiple of every element's size."""

WIDENED: Final = {("BF16", "F32"), ("F16", "F32")}
"""Casts that lose nothing: the source can be had back."""


def replay(sources: Sources, manifest: Mapping[str, Any], mapping: str | None) -> Plan:
    """The plan that the converter makes today of this source, with the options that the manifest tells of.

    Raises:
        CheckpointError: The source is not what its config implies.
        MappingError: The map is faulty, or does not fill the target.
    """
    options = recorded_options(manifest.get("options", {}))
    options["mapping"] = mapping
    source, options["vision_from"] = sources.origins
    return build_plan(source, **options)


def check_options(manifest: Mapping[str, Any]) -> None:
    """Refuse a manifest that tells of options which no conversion can have had.

    Raises:
        CheckpointError: With the option.
    """
    options = recorded_options(manifest["options"])
    options["vision_from"] = Path() if "vision_from" in manifest else None
    try:
        Options(**options)
    except UsageError as error:
        raise CheckpointError(f"tells of an option without meaning: {error.message}") from None


def judge_provenance(
    plan: Plan, parent: Parent, target: Checkpoint, manifest: Mapping[str, Any], progress: Callable[[str], None]
) -> Check:
    """Compare the target's bytes with the source's, and account for every byte of the source.

    Args:
        plan: What the converter would do with this source and map today.
        parent: The source, and the donor of its tower if it has one.
        target: The target, open.
        manifest: The target's manifest, or nothing if it has none.
        progress: Told what is being done.
    """
    folders = parent.folders
    faults = [*_header_faults(plan, target), *_file_faults(plan, target, manifest), *_manifest_faults(plan, manifest)]
    if not faults:
        with ExitStack() as files:
            reader = _Reader(files)
            faults += _byte_faults(plan, folders, target, reader, progress)
            faults += _repeated_faults(plan, folders, reader)
        faults += _carried_faults(plan, folders, target.path)
    accounts = _accounts(plan, parent.checkpoint)
    faults += [f"{name} of the source cannot be rebuilt, and that is not declared" for name in accounts["lost"]]
    if faults:
        return refused("provenance", "fault(s)", faults)
    return Check("provenance", True, _told(plan, accounts))


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


def _header_faults(plan: Plan, target: Checkpoint) -> Iterator[str]:
    """Names, dtypes and shapes first."""
    planned = {tensor.name: tensor for tensor in plan.tensors}
    yield from (f"{name} is missing" for name in planned if name not in target.tensors)
    for name, stored in target.tensors.items():
        if name not in planned:
            yield f"{name} does not come from the source"
        elif (stored.entry.dtype, stored.entry.shape) != (planned[name].dtype, planned[name].shape):
            yield (
                f"{name} is {stored.entry.dtype} {list(stored.entry.shape)}, "
                f"expected {planned[name].dtype} {list(planned[name].shape)}"
            )


def _file_faults(plan: Plan, target: Checkpoint, manifest: Mapping[str, Any]) -> Iterator[str]:
    """The files are those that a conversion writes: a loader takes up whatever else it knows the name of."""
    count = len(target.files)
    shards = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    weights = {SINGLE_FILE} if count == 1 else {*shards, INDEX_FILE}
    expected = {"config.json", "generation_config.json", *weights, *(file.name for file in plan.files)}
    found = set(manifest["files"]) if manifest else expected
    yield from (f"{name} is no file of this conversion" for name in sorted(found - expected))
    yield from (f"{name} is not in t5g2.json" for name in sorted(expected - found))
    for name, header in target.files.items():
        if header.metadata != {"format": "pt"}:
            yield f"{name} has metadata {dict(header.metadata)!r}, expected format pt"
    if count > 1:
        metadata = read_json_object(target.path / INDEX_FILE).get("metadata")
        size = sum(tensor.nbytes for tensor in plan.tensors)
        if metadata != {"total_parameters": plan.parameters["total"], "total_size": size}:
            yield f"{INDEX_FILE} has metadata {metadata!r}, expected the counts of parameters and bytes"


def _manifest_faults(plan: Plan, manifest: Mapping[str, Any]) -> Iterator[str]:
    """What the manifest tells of the source and of what was left behind."""
    if not manifest:
        return
    document = plan.to_json()
    made_with = manifest["mapping"]["name"]
    if made_with != plan.mapping:
        yield f"t5g2.json was made with mapping {made_with!r}, not {plan.mapping!r}: give that one with --mapping"
    for key in ("dtype", "parameters", "options", "changes", "tokens"):
        if manifest[key] != document[key]:
            yield f"t5g2.json says {key} {manifest[key]!r}, expected {document[key]!r}"
    # By name: why a tensor is dropped may be worded anew.
    dropped, expected = ([drop["name"] for drop in told["dropped"]] for told in (manifest, document))
    if dropped != expected:
        yield f"t5g2.json says dropped {dropped!r}, expected {expected!r}"
    for role, source in plan.sources.items():
        yield from _source_faults(role, source, manifest.get(role))


def _source_faults(role: str, planned: PlannedSource, told: Mapping[str, Any] | None) -> Iterator[str]:
    """What the manifest tells of a checkpoint that was read."""
    if told is None:
        yield f"t5g2.json does not tell of a {role}"
        return
    for key, expected in (("family", planned.family), ("layout", dict(planned.layout))):
        if told[key] != expected:
            yield f"t5g2.json says {role} {key} {told[key]!r}, expected {expected!r}"
    files = told["files"]
    sizes = {file.name.rpartition("/")[2]: file.identity.size for file in planned.files}
    sizes["config.json"] = planned.config.size
    if {name: facts["bytes"] for name, facts in files.items()} != sizes:
        yield f"t5g2.json was made from files of other names or sizes: {', '.join(files) or 'none'}"
    elif files["config.json"]["sha256"] != planned.config.sha256:
        yield f"t5g2.json was made from a {role} with another config.json"


def _byte_faults(
    plan: Plan, folders: Folders, target: Checkpoint, read: _Reader, progress: Callable[[str], None]
) -> Iterator[str]:
    """Every range of the source is read once, and compared with all targets that it fills."""
    fills: dict[object, list[PlannedTensor]] = defaultdict(list)
    for tensor in plan.tensors:
        fills[tensor.content, tensor.dtype, tensor.name if tensor.content.source is None else None].append(tensor)
    for number, tensors in enumerate(fills.values()):
        if number % 100 == 0:
            progress(f"bytes of tensor {number} of {len(fills)}")
        if tensors[0].content.alignment is not None:
            progress("least squares between the embedding tables")
            yield from _alignment_faults(tensors[0], tensors[0].content.alignment, folders, target, read)
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


def _alignment_faults(
    tensor: PlannedTensor, alignment: PlannedAlignment, folders: Folders, target: Checkpoint, read: _Reader
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
        if drop.must_equal is None:
            continue
        size = drop.content.end - drop.content.start
        for at in range(0, size, PIECE_BYTES):
            count = min(PIECE_BYTES, size - at)
            pieces = [read(folders.path(part.file), part.start + at, count) for part in (drop.content, drop.must_equal)]
            if pieces[0] != pieces[1]:
                yield f"{drop.name} of the source was dropped as a copy and is none"
                break


def _carried_faults(plan: Plan, folders: Folders, target: Path) -> Iterator[str]:
    """Files that are copied are the source's; those that are made are judged by `tokenizer`."""
    for name in (file.name for file in plan.files if file.how == "copied"):
        try:
            if folders.path(name).read_bytes() != (target / name).read_bytes():
                yield f"{name} is not the source's"
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"


def _accounts(plan: Plan, source: Checkpoint) -> dict[str, list[str]]:
    """The source's tensors by what became of them: whole, rounded, cut, dropped, or lost without a word."""
    exact: dict[str, list[tuple[int, int]]] = defaultdict(list)
    rounded: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for tensor in plan.tensors:
        content = tensor.content
        if content.source is not None and content.kind in ("copy", "cast"):
            whole = content.kind == "copy" or (content.dtype, tensor.dtype) in WIDENED
            (exact if whole else rounded)[content.source.file].append((content.source.start, content.source.end))
    declared = {drop.name for drop in plan.dropped}
    cut = any(change.field == "vocab_size" for change in plan.changes)
    accounts: dict[str, list[str]] = {kind: [] for kind in ("whole", "rounded", "cut", "dropped", "lost")}
    for name, stored in source.tensors.items():
        start, end = stored.entry.start, stored.entry.end
        held = [
            max((stop for first, stop in ranges[stored.file] if first == start), default=start)
            for ranges in (exact, rounded)
        ]
        if held[0] == end:
            kind = "whole"
        elif held[1] == end:
            kind = "rounded"
        elif max(held) > start and cut:
            kind = "cut"
        else:
            kind = "dropped" if name in declared else "lost"
        accounts[kind].append(name)
    return accounts


def _told(plan: Plan, accounts: Mapping[str, list[str]]) -> str:
    kinds = Counter(tensor.content.kind for tensor in plan.tensors)
    said: dict[Kind, str] = {
        "copy": "tensors are the source's byte for byte",
        "cast": f"are the source's in {plan.dtype}, as declared",
        "scaled_row": "is a row of it, scaled",
        "zeros": "are zeros",
        "aligned": "is the donor's, aligned",
    }
    told = ", ".join(f"{kinds[kind]} {what}" for kind, what in said.items() if kinds[kind])
    if accounts["whole"]:
        told += f"; {len(accounts['whole'])} of the source can be rebuilt"
    if accounts["rounded"]:
        told += f"; {len(accounts['rounded'])} of the source were rounded"
    if accounts["cut"]:
        told += f"; the rows that were cut from {', '.join(accounts['cut'])} are left behind, as declared"
    if accounts["dropped"]:
        told += f"; {len(accounts['dropped'])} were dropped, as declared"
    return told
