"""integrity: every file is the one that the manifest tells of, and a loader finds no other beside them."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from pydantic import ValidationError

from t5g2convert.checkpoint.digest import sha256_of
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, FileRecord
from t5g2convert.checkpoint.tokenizer.chat_templates import TEMPLATES_FOLDER, is_output_name, is_template
from t5g2convert.errors import CheckpointError
from t5g2convert.parity.reports.report import Check, refused

READ_BY_LOADERS: Final = {
    ".safetensors", ".json", ".bin", ".pt", ".pth", ".ckpt", ".pkl", ".h5", ".msgpack", ".onnx", ".gguf",
    ".model", ".jinja", ".txt", ".yaml", ".py", ".pyc", ".so",
}  # fmt: skip
"""Kinds of files that a loader takes up when it finds them; such a stranger can change what the folder means."""

THREADS: Final = 2


def fits_its_files(folder: Path, document: Mapping[str, Any]) -> bool:
    """Return whether the files of a folder are those of a manifest, as JSON, that may be anything."""
    files = document.get("files")
    try:
        listed = {name: FileRecord.model_validate(file) for name, file in files.items()}  # type: ignore[union-attr]
    except (AttributeError, ValidationError):
        return False
    return judge_integrity(folder, listed).passed


def judge_integrity(folder: Path, files: Mapping[str, FileRecord]) -> Check:
    """Compare every file's size and sha256 with the manifest's."""
    if not files:
        return Check("integrity", False, f"{MANIFEST_FILE} lists no files")
    with ThreadPoolExecutor(THREADS) as pool:
        faults = [fault for fault in pool.map(lambda item: _fault(folder, *item), files.items()) if fault]
    holds_templates = any(is_template(name) for name in files)
    if holds_templates:
        faults += _strangers(folder / TEMPLATES_FOLDER, files)
    for path in sorted(folder.iterdir()):
        if (
            path.name in files
            or path.name == MANIFEST_FILE
            or (holds_templates and f"{path.name}/" == TEMPLATES_FOLDER)
        ):
            continue
        # Loaders look into folders of chat templates, of code, of other engines' weights; into hidden ones none does.
        if path.suffix.lower() in READ_BY_LOADERS or (path.is_dir() and not path.name.startswith(".")):
            faults.append(f"{path.name}{'/' if path.is_dir() else ''} is not in {MANIFEST_FILE}")
    if faults:
        return refused("integrity", f"file(s) that are not {MANIFEST_FILE}'s", faults)
    unhashed = sum(file.sha256 is None for file in files.values())
    if unhashed:
        return Check(
            "integrity",
            True,
            f"{len(files)} files have the size that {MANIFEST_FILE} says; {unhashed} have no sha256 there (--no-hash)",
        )
    return Check("integrity", True, f"sha256 of {len(files)} files is {MANIFEST_FILE}'s, and its own fits")


def _strangers(folder: Path, files: Mapping[str, Any]) -> list[str]:
    """What is in the folder of chat templates and not in the manifest."""
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    listed = (f"{folder.name}/{name}" for name in names)
    return [f"{name} is not in {MANIFEST_FILE}" for name in listed if name not in files]


def _fault(folder: Path, name: str, expected: FileRecord) -> str | None:
    if not is_output_name(name):
        return f"{name!r} is not the name of a file in this folder"
    path = folder / name
    try:
        if not path.is_file():
            return f"{name} is missing"
        size = path.stat().st_size
        if size != expected.bytes:
            return f"{name} has {size} bytes, expected {expected.bytes}"
        if expected.sha256 is not None and sha256_of(path) != expected.sha256:
            return f"{name} has another sha256"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror}"
    return None


def unreadable_manifest(error: CheckpointError) -> Check:
    """The check where the manifest itself is missing or was changed."""
    return Check("integrity", False, f"{MANIFEST_FILE} {error.message}")
