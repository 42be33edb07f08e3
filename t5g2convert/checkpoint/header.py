"""The safetensors header: eight bytes of length, JSON, then the tensors' bytes (huggingface/safetensors, format notes).

Reading is stricter than in the library: a repeated name is refused (the library keeps the last), and the tensors must
cover the data exactly once, without overlaps, gaps or trailing bytes.
"""

import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.strictjson import parse_object
from t5g2convert.errors import CheckpointError

BITS: Final = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "I16": 16, "U16": 16, "F16": 16, "BF16": 16,
    "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
"""Width of one element in bits, by safetensors dtype (safetensors 0.8.0)."""

CONFIG_NAMES: Final = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}
"""safetensors dtype to config.json name: the dtypes that a model can be converted in."""

BY_CONFIG_NAME: Final = {name: dtype for dtype, name in CONFIG_NAMES.items()}
"""config.json name to safetensors dtype."""


def element_bytes(dtype: str) -> int:
    """Return the bytes of one element of BF16, F16 or F32."""
    return BITS[dtype] // 8


def tensor_bits(dtype: str, shape: tuple[int, ...]) -> int:
    """Return the size of a tensor in bits."""
    return BITS[dtype] * math.prod(shape)


MAX_HEADER_BYTES: Final = 100_000_000
"""The limit of the safetensors library."""


MAX_DIMENSIONS: Final = 64
"""More dimensions than any model's tensors have."""

MAX_EXTENT: Final = 2**64 - 1
"""The largest number that readers can represent."""

Read = Callable[[int, int], bytes]
"""Reads (count, position): returns that many bytes of a file, fewer at its end."""


@dataclass(frozen=True, slots=True)
class TensorEntry:
    """One tensor of a safetensors file; `start` and `end` are byte positions in the file, not in its data section."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """The size of the tensor in bytes."""
        return self.end - self.start

    @property
    def elements(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class FileIdentity:
    """The identity of a file, to detect changes: device, inode, size in bytes, modification time in nanoseconds."""

    device: int
    inode: int
    size: int
    modified_ns: int

    @classmethod
    def of(cls, file: int | Path) -> "FileIdentity":
        """Return the identity of a file, passed as a descriptor or a path."""
        status = file.stat() if isinstance(file, Path) else os.fstat(file)
        return cls(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns)

    @classmethod
    def elsewhere(cls, size: int) -> "FileIdentity":
        """Return the identity of a remote file, which is only its size in bytes."""
        return cls(0, 0, size, 0)


@dataclass(frozen=True, slots=True)
class Header:
    """A safetensors header that was read and checked."""

    path: Path
    identity: FileIdentity
    data_start: int
    tensors: Mapping[str, TensorEntry]
    metadata: Mapping[str, str]


def read_header(path: Path) -> Header:
    """Read and check the header of a safetensors file, without reading its tensors.

    Raises:
        CheckpointError: The file is not a safetensors file, is truncated, or does not match its header.
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                raise CheckpointError("is not a regular file", where=path)
            identity = FileIdentity.of(fd)
            text = _read_json_bytes(partial(os.pread, fd), identity.size, path)
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
    return _parse_header(text, identity, path)


def read_header_elsewhere(read: Read, size: int, path: Path) -> Header:
    """Read and check the header of a remote safetensors file.

    Args:
        read: Reads (count, position); returns fewer bytes at the end of the file. Its errors are passed on.
        size: The size of the whole file in bytes.
        path: The path that the file would have, for errors and for the header.

    Raises:
        CheckpointError: As `read_header`.
    """
    return _parse_header(_read_json_bytes(read, size, path), FileIdentity.elsewhere(size), path)


def _parse_header(text: bytes, identity: FileIdentity, path: Path) -> Header:
    document = parse_object(text, path, "the header ")
    data_start = 8 + len(text)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError("__metadata__ must map strings to strings", where=path)
    tensors = {name: _parse_entry(name, fields, data_start, path) for name, fields in document.items()}
    _check_coverage(tensors.values(), data_start, identity.size, path)
    return Header(path, identity, data_start, tensors, metadata)


def encode_header(tensors: Iterable[TensorEntry]) -> bytes:
    """Return the first bytes of a safetensors file; `start` and `end` of the tensors count from the data section.

    The metadata contains `format: pt`: transformers refuses a file without it. Padding aligns the data to 8 bytes.
    """
    document: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    for tensor in tensors:
        document[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [tensor.start, tensor.end],
        }
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _read_json_bytes(read: Read, size: int, path: Path) -> bytes:
    start = read(64, 0)
    if start.startswith(b"version https://git-lfs"):
        raise CheckpointError("is a git-lfs pointer, not the weights", where=path, hint="run: git lfs pull")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise CheckpointError("is an HTML page, not the weights", where=path, hint="download the file again")
    if size < 8:
        raise CheckpointError(f"is {size} bytes long, too short for a safetensors file", where=path)
    length = int.from_bytes(start[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"is not a safetensors file: its first 8 bytes declare a header of {length} bytes", where=path
        )
    if 8 + length > size:
        raise CheckpointError(
            f"expected {8 + length} bytes for the header, found {size}", where=path, hint="download again"
        )
    return read(length, 8)


def _parse_entry(name: str, fields: object, data_start: int, path: Path) -> TensorEntry:
    def refuse(reason: str) -> CheckpointError:
        return CheckpointError(f"tensor {name!r}: {reason}", where=path)

    if not isinstance(fields, dict) or fields.keys() != {"dtype", "shape", "data_offsets"}:
        raise refuse("expected dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise refuse(f"unknown dtype {dtype!r}")
    if not isinstance(shape, list) or not all(type(extent) is int and extent >= 0 for extent in shape):
        raise refuse(f"shape {shape!r} is not a list of sizes")
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(at) is int and at >= 0 for at in offsets):
        raise refuse(f"data_offsets {offsets!r} are not two positions")
    if len(shape) > MAX_DIMENSIONS:
        raise refuse(f"has {len(shape)} dimensions")
    if max((*shape, *offsets), default=0) > MAX_EXTENT:
        raise refuse("a size or offset does not fit into 64 bits")
    start, end = offsets
    bits = tensor_bits(dtype, tuple(shape))
    if end < start or bits != 8 * (end - start):
        half = ".5" if bits % 8 else ""
        raise refuse(f"{dtype} of shape {shape} takes {bits // 8}{half} bytes, but its data_offsets span {end - start}")
    if math.prod(extent for extent in shape if extent) > MAX_EXTENT:
        raise refuse(f"shape {shape} does not fit into 64 bits")
    return TensorEntry(name, dtype, tuple(shape), data_start + start, data_start + end)


def _check_coverage(tensors: Iterable[TensorEntry], data_start: int, size: int, path: Path) -> None:
    """Refuse tensors that overlap or leave gaps in the data section."""
    position = data_start
    for tensor in sorted(tensors, key=lambda entry: (entry.start, entry.end)):
        if tensor.start != position:
            what = "overlaps the tensor before it" if tensor.start < position else "leaves a gap before it"
            raise CheckpointError(f"tensor {tensor.name!r} {what}", where=path)
        position = tensor.end
    if position > size:
        raise CheckpointError(f"expected {position} bytes, found {size}", where=path, hint="download again")
    if position < size:
        raise CheckpointError(f"{size - position} bytes follow the last tensor, expected none", where=path)
