"""The plan of a conversion: frozen data that states the origin of every byte of the output.

The dry run, the tables, the writer, the manifest and the tests all read this object. This module opens no files.
"""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from t5g2convert.checkpoint.file_store import HubOrigin
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.header import FileIdentity, element_bytes
from t5g2convert.checkpoint.merge_record import MergeRecord
from t5g2convert.checkpoint.sources import SOURCE, Role, plain_name, role_in
from t5g2convert.checkpoint.training_record import AdaptationRecord
from t5g2convert.conversion.assets.aux_files import PlannedFile, downloaded
from t5g2convert.conversion.assets.tokenizer import TokenChange
from t5g2convert.conversion.plan.source_files import SourceItem

ContentKind = Literal["copy", "cast", "scaled_row", "zeros", "aligned", "filled", "given", "merged"]


@dataclass(frozen=True, slots=True)
class SourceRange:
    """A range of bytes in a source file.

    Attributes:
        file: The name of the file; for a checkpoint other than the source, with the role in front: `decoder_from/NAME`.
        start: The first byte, counted from the start of the file.
        end: The byte after the last.
    """

    file: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class PlannedTable:
    """An embedding table: its tensor, its bytes and their safetensors dtype, the number of rows, and the width."""

    tensor: str
    source: SourceRange
    dtype: str
    rows: int
    width: int


@dataclass(frozen=True, slots=True)
class PlannedAlignment:
    """The inputs of an aligned projector; see `conversion.write.aligned_projector`.

    Attributes:
        donor: The donor's table: the projector maps to its space.
        target: The source's table: the aligned projector will map to its space.
        rows: The number of leading rows that are the same tokens in both tables.
        ridge: The weight of the penalty on large maps.
    """

    donor: PlannedTable
    target: PlannedTable
    rows: int
    ridge: float

    @property
    def nbytes(self) -> int:
        """Bytes to read of both tables."""
        return sum(self.rows * table.width * element_bytes(table.dtype) for table in (self.donor, self.target))


@dataclass(frozen=True, slots=True)
class Content:
    """The content of a target tensor.

    Attributes:
        kind: copy (the bytes unchanged), cast (element by element), scaled_row (the range is one row), zeros, filled
            (with one value), aligned (the range is a projector, mapped into another space), given (trained values that
            are passed to the writer; see `conversion.trained_model`), or merged (plus an adapter's product, passed).
        source: The bytes to read; None for zeros, one value, and given values.
        dtype: The safetensors dtype of those bytes.
        alignment: The inputs of an aligned projector.
        value: The value of a filled tensor, before it is rounded to the tensor's dtype.
    """

    kind: ContentKind
    source: SourceRange | None
    dtype: str
    alignment: PlannedAlignment | None = None
    value: float | None = None

    @property
    def spans(self) -> tuple[SourceRange, ...]:
        """All ranges to read."""
        own = () if self.source is None else (self.source,)
        tables = () if self.alignment is None else (self.alignment.donor.source, self.alignment.target.source)
        return own + tables


@dataclass(frozen=True, slots=True)
class PlannedTensor:
    """A target tensor: its name, type and shape, the bytes of the shard that it fills, and its content.

    `origin` is the source tensor; for a checkpoint other than the source, with the role in front, as for files.
    """

    name: str
    part: str
    dtype: str
    shape: tuple[int, ...]
    shard: str
    start: int
    end: int
    origin: str | None
    content: Content
    merged_attention: bool = False

    @property
    def nbytes(self) -> int:
        """Number of bytes in the shard."""
        return self.end - self.start

    @property
    def work(self) -> int:
        """Number of bytes that progress counts: the tensor's in the shard, and the tables' that an alignment reads."""
        return self.nbytes + (0 if self.content.alignment is None else self.content.alignment.nbytes)

    @property
    def elements(self) -> int:
        """Number of parameters."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """A target file: its final name, its size in bytes, and the size of its header."""

    name: str
    size: int
    header_size: int


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file to read, named as in a `SourceRange`, with its identity at the time its header was read."""

    name: str
    identity: FileIdentity


@dataclass(frozen=True, slots=True)
class SourceConfig:
    """The config.json of a source: its size in bytes and its sha256."""

    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class PlannedSource:
    """A checkpoint that the conversion reads.

    Attributes:
        name: Its folder's name.
        family: The `model_type` of its config.
        layout: The spelling of each root in its tensor names.
        config: Its config.json.
        files: The weight files to read.
        hub: The model on the Hub, if it is one.
    """

    name: str
    family: str
    layout: Mapping[str, str]
    config: SourceConfig
    files: tuple[SourceFile, ...]
    hub: HubOrigin | None = None

    def to_json(self) -> dict[str, Any]:
        """Return the checkpoint as `t5g2 plan --json` prints it."""
        hub = {} if self.hub is None else {"hub": self.hub.to_json()}
        return {"name": self.name, "family": self.family, "layout": dict(self.layout), **hub}


@dataclass(frozen=True, slots=True)
class Repeated:
    """A tensor that a dropped tensor must equal, value by value: its name, its bytes and their safetensors dtype."""

    name: str
    source: SourceRange
    dtype: str


@dataclass(frozen=True, slots=True)
class Dropped:
    """A source tensor that is dropped, and the tensor, if any, that it must equal for this to be allowed.

    Tensors of other checkpoints are listed only if they must equal another tensor, or if an option drops them.
    """

    name: str
    because: str
    content: SourceRange
    dtype: str
    shape: tuple[int, ...]
    must_equal: Repeated | None = None


@dataclass(frozen=True, slots=True)
class Change:
    """A setting of config.json that differs from the source's, with both values."""

    field: str
    source: Any
    target: Any


@dataclass(frozen=True, slots=True)
class Plan:
    """A complete conversion before its first byte is written.

    `mapping` is the map that it follows; None if trained values are put into a model: `adaptation` then describes the
    training, and `merged` an adapter. `source_items` lists everything in the source folder, with its treatment.
    """

    mapping: str | None
    mapping_sha256: str | None
    options: Mapping[str, Any]
    sources: Mapping[Role, PlannedSource]
    dtype: str
    parameters: Mapping[str, int]
    tensors: tuple[PlannedTensor, ...]
    shards: tuple[Shard, ...]
    dropped: tuple[Dropped, ...]
    changes: tuple[Change, ...]
    tied: Mapping[str, str]
    files: tuple[PlannedFile, ...]
    tokens: tuple[TokenChange, ...]
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any] | None
    notes: tuple[str, ...]
    adaptation: AdaptationRecord | None = None
    merged: MergeRecord | None = None
    source_items: tuple[SourceItem, ...] = ()

    @property
    def source(self) -> PlannedSource:
        """The checkpoint that is converted."""
        return self.sources[SOURCE]

    @property
    def source_files(self) -> tuple[SourceFile, ...]:
        """All weight files to read."""
        return tuple(file for source in self.sources.values() for file in source.files)

    @property
    def reads(self) -> Mapping[Role, tuple[str, ...]]:
        """The files to read, by role of the checkpoint, under their names in it."""
        weights = [file.name for source in self.sources.values() for file in source.files]
        names = dict.fromkeys([*weights, *(name for file in self.files for name in file.reads)])
        return {role: tuple(plain_name(name) for name in names if role_in(name) == role) for role in self.sources}

    def reading(self, checkpoints: Mapping[Role, Checkpoint]) -> "Plan":
        """Return the plan for the same checkpoints after their files were downloaded to this machine."""
        return replace(
            self,
            sources={
                role: replace(
                    source,
                    files=tuple(
                        SourceFile(file.name, checkpoints[role].files[plain_name(file.name)].identity)
                        for file in source.files
                    ),
                )
                for role, source in self.sources.items()
            },
            files=tuple(downloaded(file, checkpoints) for file in self.files),
        )

    @property
    def nbytes(self) -> int:
        """Size of all shards in bytes, including headers."""
        return sum(shard.size for shard in self.shards)

    @property
    def work(self) -> int:
        """Number of bytes that progress counts."""
        return sum(tensor.work for tensor in self.tensors)

    def to_json(self) -> dict[str, Any]:
        """Return what `t5g2 plan --json` prints."""
        return {
            "output": None,
            "mapping": self.mapping,
            "mapping_sha256": self.mapping_sha256,
            "options": dict(self.options),
            "family": self.source.family,
            "layout": dict(self.source.layout),
            **({} if self.source.hub is None else {"hub": self.source.hub.to_json()}),
            "sources": {role: source.to_json() for role, source in self.sources.items()},
            "dtype": self.dtype,
            "parameters": dict(self.parameters),
            "bytes": self.nbytes,
            "shards": [{"name": shard.name, "bytes": shard.size} for shard in self.shards],
            "tensors": [_tensor_json(tensor) for tensor in self.tensors],
            "dropped": [{"name": drop.name, "because": drop.because} for drop in self.dropped],
            "changes": [asdict(change) for change in self.changes],
            "tied": dict(self.tied),
            "files": [{"name": file.name, "how": file.how, "from": list(file.reads)} for file in self.files],
            "tokens": [asdict(token) for token in self.tokens],
            "config": dict(self.config),
            "notes": list(self.notes),
            "source_files": [asdict(item) for item in self.source_items],
            **({} if self.adaptation is None else {"adaptation": self.adaptation.document()}),
            **({} if self.merged is None else {"merged": self.merged.document()}),
        }


def _range_json(span: SourceRange) -> dict[str, Any]:
    return {"file": span.file, "start": span.start, "end": span.end}


def _alignment_json(alignment: PlannedAlignment) -> dict[str, Any]:
    tables = {"donor": alignment.donor, "target": alignment.target}
    return {
        **{
            name: {"tensor": table.tensor, "dtype": table.dtype, "source": _range_json(table.source)}
            for name, table in tables.items()
        },
        "rows": alignment.rows,
        "ridge": alignment.ridge,
    }


def _tensor_json(tensor: PlannedTensor) -> dict[str, Any]:
    source, alignment = tensor.content.source, tensor.content.alignment
    return {
        "name": tensor.name,
        "part": tensor.part,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "shard": tensor.shard,
        "start": tensor.start,
        "end": tensor.end,
        "from": tensor.origin,
        "content": tensor.content.kind,
        "source": None if source is None else _range_json(source),
        **({} if alignment is None else {"alignment": _alignment_json(alignment)}),
        **({} if tensor.content.value is None else {"value": tensor.content.value}),
    }
