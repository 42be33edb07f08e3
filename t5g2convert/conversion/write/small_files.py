"""Write, flush and hash the output's files other than shards: config, index, tokenizer files, manifest."""

import hashlib
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict
from io import BufferedReader
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.atomic_write import flush_folder
from t5g2convert.checkpoint.file_names import INDEX_FILE
from t5g2convert.checkpoint.header import FileIdentity
from t5g2convert.checkpoint.manifest import (
    FORMAT,
    MANIFEST_FILE,
    ChangeRecord,
    DroppedRecord,
    FileRecord,
    HubRecord,
    Manifest,
    MappingRecord,
    SourceRecord,
    TokenRecord,
    ToolRecord,
    encode_json,
)
from t5g2convert.checkpoint.sources import Folders, plain_name
from t5g2convert.checkpoint.tokenizer.chat_templates import TEMPLATES_FOLDER, is_template
from t5g2convert.conversion.assets.aux_files import PlannedFile
from t5g2convert.conversion.plan.types import Plan, PlannedSource
from t5g2convert.conversion.write.shards import Written
from t5g2convert.errors import CheckpointError, OutputError
from t5g2convert.version import __version__

PIECE_BYTES: Final = 1 << 18


def write_assets(plan: Plan, folders: Folders, folder: Path, written: Written, *, flush: bool) -> None:
    """Write all files but the shards; the manifest is the last.

    Values that were trained elsewhere get no manifest: nothing is known about their training.

    Raises:
        CheckpointError: A file that is copied cannot be read, or changed since it was planned.
        OutputError: A file cannot be written.
    """
    hashing = bool(written.shards)
    files = {shard.name: FileRecord(bytes=shard.size, sha256=written.shards.get(shard.name)) for shard in plan.shards}
    documents = {"config.json": plan.config}
    if plan.generation_config is not None:
        documents["generation_config.json"] = plan.generation_config
    contents: dict[str, Iterable[bytes]] = {name: [encode_json(document)] for name, document in documents.items()}
    contents |= {file.name: _contents(file, folders) for file in plan.files}
    if len(plan.shards) > 1:
        contents[INDEX_FILE] = [encode_json(_index(plan))]
    if any(is_template(name) for name in contents):
        _make_folder(folder / TEMPLATES_FOLDER)
    for name, pieces in contents.items():
        size, digest = _write(folder / name, pieces, flush=flush)
        files[name] = FileRecord(bytes=size, sha256=digest if hashing else None)
    if flush and (folder / TEMPLATES_FOLDER).is_dir():
        _flush(folder / TEMPLATES_FOLDER)
    if any(made is not None for made in (plan.mapping, plan.adaptation, plan.merged)):
        _write(folder / MANIFEST_FILE, [_manifest(plan, written, files).encode()], flush=flush)


def _manifest(plan: Plan, written: Written, files: Mapping[str, FileRecord]) -> Manifest:
    """Return the manifest, without timestamps or local paths: the same input gives the same bytes."""
    made: dict[str, Any] = {role: _read_from(source, written) for role, source in plan.sources.items()}
    if plan.mapping is not None and plan.mapping_sha256 is not None:
        made["mapping"] = MappingRecord(name=plan.mapping, sha256=plan.mapping_sha256)
    if plan.adaptation is not None:
        made["adaptation"] = plan.adaptation
    if plan.merged is not None:
        made["merged"] = plan.merged
    return Manifest(
        format=FORMAT,
        tool=ToolRecord(name="t5g2convert", version=__version__),
        options=dict(plan.options),
        dtype=plan.dtype,
        parameters=dict(plan.parameters),
        dropped=[DroppedRecord(name=drop.name, because=drop.because) for drop in plan.dropped],
        changes=[ChangeRecord(**asdict(change)) for change in plan.changes],
        tokens=[TokenRecord(**asdict(token)) for token in plan.tokens],
        notes=list(plan.notes),
        files={name: files[name] for name in sorted(files)},
        **made,
    )


def _read_from(source: PlannedSource, written: Written) -> SourceRecord:
    """Return the record of a checkpoint, with the sha256 of its files."""
    files = {
        plain_name(file.name): FileRecord(bytes=file.identity.size, sha256=written.sources.get(file.name))
        for file in source.files
    }
    files["config.json"] = FileRecord(bytes=source.config.size, sha256=source.config.sha256)
    hub = {} if source.hub is None else {"hub": HubRecord(**source.hub.to_json())}
    return SourceRecord(family=source.family, layout=dict(source.layout), files=files, **hub)


def _index(plan: Plan) -> dict[str, Any]:
    return {
        "metadata": {
            "total_parameters": plan.parameters["total"],
            "total_size": sum(tensor.nbytes for tensor in plan.tensors),
        },
        "weight_map": {tensor.name: tensor.shard for tensor in sorted(plan.tensors, key=lambda item: item.name)},
    }


def _contents(planned: PlannedFile, folders: Folders) -> Iterator[bytes]:
    """Yield the bytes of a file, piece by piece if it is copied.

    Raises:
        CheckpointError: The source's file cannot be read, or has changed since it was planned.
    """
    if planned.text is not None and planned.identity is None:
        yield planned.text
        return
    path = folders.path(planned.reads[0])
    try:
        with path.open("rb") as file:
            _check_unchanged(planned, file, path)
            if planned.text is not None:
                yield planned.text
            while planned.text is None and (piece := file.read(PIECE_BYTES)):
                yield piece
            _check_unchanged(planned, file, path)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error


def _check_unchanged(planned: PlannedFile, file: BufferedReader, path: Path) -> None:
    if planned.identity is not None and FileIdentity.of(file.fileno()) != planned.identity:
        raise CheckpointError("changed while it was being read", where=path, hint="start again")


def _make_folder(path: Path) -> None:
    try:
        path.mkdir()
    except OSError as error:
        raise OutputError(f"cannot be created: {error.strerror}", where=path) from error


def _flush(folder: Path) -> None:
    try:
        flush_folder(folder)
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=folder) from error


def _write(path: Path, pieces: Iterable[bytes], *, flush: bool) -> tuple[int, str]:
    """Write a file; return its size in bytes and its sha256."""
    size, digest = 0, hashlib.sha256()
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with os.fdopen(fd, "wb") as file:
            for piece in pieces:
                file.write(piece)
                digest.update(piece)
                size += len(piece)
            if flush:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise OutputError(f"cannot be written: {error.strerror}", where=path) from error
    return size, digest.hexdigest()
