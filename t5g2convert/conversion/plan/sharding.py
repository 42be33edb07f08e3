"""The layout of the output: the shards, their names, and the byte range of every target tensor in them."""

from collections.abc import Sequence

from t5g2convert.checkpoint.file_names import weight_files
from t5g2convert.checkpoint.header import TensorEntry, element_bytes, encode_header, tensor_bits
from t5g2convert.checkpoint.sources import role_in
from t5g2convert.conversion.plan.drafts import Draft
from t5g2convert.conversion.plan.types import PlannedTensor, Shard
from t5g2convert.mapping.schema import PARTS


def lay_out(drafts: Sequence[Draft], max_shard_bytes: int) -> tuple[tuple[PlannedTensor, ...], tuple[Shard, ...]]:
    """Assign every tensor to a shard and a byte range.

    There are two streams in the order of the source, so that reading and writing both go forwards: first all tensors
    with one copy and the first of two copies, then the decoder. If both do not fit into one file, the decoder starts a
    new file, so that two files can be hashed in parallel while they are written. If all tensors come from one
    checkpoint and none is written twice, there is one stream in the order of names, as the safetensors library writes
    it: a model that is taken apart and put together again gives the same file. Within a file, wider dtypes come first,
    which keeps every tensor aligned.
    """
    streams: dict[bool, list[Draft]] = {False: [], True: []}
    ranges = [draft.content.source for draft in drafts if draft.content.source is not None]
    several = len(set(ranges)) < len(ranges) or len({role_in(each.file) for each in ranges}) > 1
    for draft in sorted(drafts, key=_source_position if several else lambda draft: draft.name):
        streams[several and draft.part == "decoder"].append(draft)
    total = sum(_nbytes(draft) for draft in drafts)
    cuts: list[list[Draft]] = []
    if total <= max_shard_bytes:
        cuts = [streams[False] + streams[True]]
    else:
        for stream in streams.values():
            room = 0
            for draft in stream:
                if not cuts or room < _nbytes(draft) or draft is stream[0]:
                    cuts.append([])
                    room = max_shard_bytes
                cuts[-1].append(draft)
                room -= _nbytes(draft)
    tensors: list[PlannedTensor] = []
    shards: list[Shard] = []
    for name, cut in zip(weight_files(len(cuts)), cuts, strict=True):
        ordered = sorted(cut, key=lambda draft: -element_bytes(draft.dtype))
        entries: list[TensorEntry] = []
        position = 0
        for draft in ordered:
            entries.append(TensorEntry(draft.name, draft.dtype, draft.shape, position, position + _nbytes(draft)))
            position += _nbytes(draft)
        header_size = len(encode_header(entries))
        shards.append(Shard(name, header_size + position, header_size))
        tensors += [
            PlannedTensor(
                draft.name,
                draft.part,
                draft.dtype,
                draft.shape,
                name,
                header_size + entry.start,
                header_size + entry.end,
                draft.origin,
                draft.content,
                draft.merged_attention,
            )
            for draft, entry in zip(ordered, entries, strict=True)
        ]
    return tuple(tensors), tuple(shards)


def _nbytes(draft: Draft) -> int:
    return tensor_bits(draft.dtype, draft.shape) // 8


def _source_position(draft: Draft) -> tuple[str, int, int]:
    """Return a sort key that puts computed tensors first: they are small, and are written before the streams start."""
    source = draft.content.source
    if source is None or draft.content.kind == "scaled_row":
        return "", 0, [str(part) for part in PARTS].index(draft.part)
    return source.file, source.start, 0
