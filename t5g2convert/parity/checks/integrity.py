"""integrity: every file matches the manifest, and the folder has no other file that a loader would read."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from t5g2convert.checkpoint.file_store import sha256_of
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, FileRecord
from t5g2convert.checkpoint.tokenizer.chat_templates import TEMPLATES_FOLDER, is_output_name, is_template
from t5g2convert.errors import CheckpointError
from t5g2convert.parity.reports.report import Check, failed_check

READ_BY_LOADERS: Final = {
    ".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf",
    ".model", ".jinja", ".txt", ".yaml", ".py", ".pyc", ".so",
}  # fmt: skip
"""Suffixes of files that loaders read if present, so that extra ones would change the model."""

THREADS: Final = 2


def matches_its_files(folder: Path, document: Mapping[str, Any]) -> bool:
    """Return whether a folder's files match a manifest, which is passed as unchecked JSON."""
    files = document.get("files")
    try:
        listed = {name: FileRecord.model_validate(file) for name, file in files.items()}  # type: ignore[union-attr]
    except (AttributeError, ValidationError):
        return False
    return judge_integrity(folder, listed).passed


def judge_integrity(folder: Path, files: Mapping[str, FileRecord]) -> Check:
    """Compare every file's size and sha256 with the manifest's, and refuse other files that a loader would read."""
    if not files:
        return Check("integrity", False, f"{MANIFEST_FILE} lists no files")
    with ThreadPoolExecutor(THREADS) as pool:
        faults = [fault for fault in pool.map(lambda item: _fault(folder, *item), files.items()) if fault]
    holds_templates = any(is_template(name) for name in files)
    if holds_templates:
        faults += _unlisted(folder / TEMPLATES_FOLDER, files)
    for path in sorted(folder.iterdir()):
        if (
            path.name in files
            or path.name == MANIFEST_FILE
            or (holds_templates and f"{path.name}/" == TEMPLATES_FOLDER)
        ):
            continue
        # Loaders read folders of chat templates, of code, and of other engines' weights, but never hidden ones.
        if path.suffix.lower() in READ_BY_LOADERS or (path.is_dir() and not path.name.startswith(".")):
            faults.append(f"{path.name}{'/' if path.is_dir() else ''} is not in {MANIFEST_FILE}")
    if faults:
        return failed_check("integrity", f"file(s) that do not match {MANIFEST_FILE}", faults)
    unhashed = sum(file.sha256 is None for file in files.values())
    if unhashed:
        return Check(
            "integrity",
            True,
            f"{len(files)} files have the size in {MANIFEST_FILE}; {unhashed} have no sha256 there (--no-hash)",
        )
    return Check("integrity", True, f"sha256 of {len(files)} files matches {MANIFEST_FILE}, and so does its own")


def _unlisted(folder: Path, files: Mapping[str, Any]) -> list[str]:
    """Return the files in the folder of chat templates that the manifest does not list."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    listed = (f"{folder.name}/{name}" for name in names)
    return [f"{name} is not in {MANIFEST_FILE}" for name in listed if name not in files]


def _fault(folder: Path, name: str, expected: FileRecord) -> str | None:
    if not is_output_name(name):
        return f"{name!r} is not a valid name for a file in this folder"
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected.bytes:
            return f"{name} has {size} bytes, expected {expected.bytes}"
        if expected.sha256 is not None and sha256_of(path) != expected.sha256:
            return f"{name} has a different sha256"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def unreadable_manifest(error: CheckpointError) -> Check:
    """Return the check for a manifest that is missing or was changed."""
    return Check("integrity", False, f"{MANIFEST_FILE} {error.message}")
