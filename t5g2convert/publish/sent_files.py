"""The files of a folder to send: only those that its manifest lists, checked against their sha256.

A folder trained elsewhere has no manifest; of it, the files that loaders read by name are sent.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from t5g2convert.checkpoint.card_seal import CARD_FILE
from t5g2convert.checkpoint.file_store import is_commit, regular_file, sha256_of
from t5g2convert.checkpoint.folder import check_folder, open_checkpoint
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, FileRecord, read_manifest
from t5g2convert.checkpoint.tokenizer.chat_templates import TEMPLATES_FOLDER, is_output_name, is_template
from t5g2convert.errors import CheckpointError
from t5g2convert.publish.base_model import loaded_files, missing_manifest


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to send.

    Attributes:
        name: Its name, in the folder and on the Hub.
        content: Its path with links resolved; or its bytes, if it is not in the folder.
        size: Its size in bytes.
        sha256: Its sha256, hexadecimal.
    """

    name: str
    content: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of_text(cls, name: str, text: str) -> "LocalFile":
        """Return a file with some text."""
        data = text.encode()
        return cls(name, data, len(data), hashlib.sha256(data).hexdigest())


def manifest_files(folder: Path, report: Callable[[str], None] | None = None) -> tuple[LocalFile, ...]:
    """Return the files of a folder that this tool wrote: the files in its manifest, and the manifest.

    Each file is read and compared with its size and sha256 in the manifest.

    Args:
        folder: The folder; it may be a snapshot in the Hub's cache.
        report: Called with the name of each file before it is read.

    Raises:
        CheckpointError: The manifest is missing or not valid, or files are missing, damaged, links or not regular
            files; the details list all of them.
    """
    check_folder(folder)
    try:
        _resolved(folder, MANIFEST_FILE)
        manifest = read_manifest(folder)
    except CheckpointError as error:
        raise missing_manifest(error, folder) from None
    if not manifest.files:
        raise CheckpointError("lists no files", where=folder / MANIFEST_FILE)
    named = (*manifest.files.items(), (MANIFEST_FILE, None))
    files = _check_all(folder, named, report, hint="nothing was sent; convert again")
    return tuple(sorted(files, key=lambda file: file.name))


def trained_elsewhere_files(folder: Path, report: Callable[[str], None] | None = None) -> tuple[LocalFile, ...]:
    """Return the files of a folder trained elsewhere: the files that loaders read, in their present state.

    Args:
        folder: The folder.
        report: Called with the name of each file before it is read.

    Raises:
        CheckpointError: The folder is not a valid checkpoint, or files are links or not regular files; the details
            list all of them.
    """
    named = [(name, None) for name in loaded_files(open_checkpoint(folder))]
    return tuple(_check_all(folder, named, report, hint="nothing was sent; replace links with the files"))


def local_card(folder: Path) -> str | None:
    """Return the README.md of a folder; None if it has none.

    Raises:
        CheckpointError: The file is a link, is not a regular file, or is not UTF-8.
    """
    if not (folder / CARD_FILE).is_symlink() and not (folder / CARD_FILE).exists():
        return None
    try:
        return _resolved(folder, CARD_FILE).read_bytes().decode()
    except UnicodeDecodeError:
        raise CheckpointError("is not UTF-8", where=folder / CARD_FILE) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=folder / CARD_FILE) from None


def _check_all(
    folder: Path,
    named: Iterable[tuple[str, FileRecord | None]],
    report: Callable[[str], None] | None,
    *,
    hint: str,
) -> list[LocalFile]:
    """Check each file against its entry in the manifest; raise one error that lists all files that cannot be sent."""
    faults: list[str] = []
    files: list[LocalFile] = []
    for name, entry in named:
        if report is not None:
            report(name)
        try:
            files.append(_check(folder, name, entry))
        except CheckpointError as error:
            faults.append(f"{name} {error.message}")
    if faults:
        raise CheckpointError(f"{len(faults)} file(s) cannot be sent", where=folder, details=faults, hint=hint)
    return files


def _check(folder: Path, name: str, entry: FileRecord | None) -> LocalFile:
    """Compare a file with its entry in the manifest; `entry` is None for a file without one."""
    if not is_sent_name(name) or (entry is not None and name in (MANIFEST_FILE, CARD_FILE)):
        raise CheckpointError("is not a file name that a conversion writes")
    path = _resolved(folder, name)
    try:
        size, sha256 = path.stat().st_size, sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}") from None
    if entry is not None and size != entry.bytes:
        raise CheckpointError(f"has {size} bytes, expected {entry.bytes}")
    if entry is not None and sha256 != (entry.sha256 or sha256):
        raise CheckpointError("has the wrong sha256")
    return LocalFile(name, path, size, sha256)


def is_sent_name(name: str) -> bool:
    """Return whether a file with that name may be sent: a name that a conversion writes, and not hidden."""
    return is_output_name(name) and not name.removeprefix(TEMPLATES_FOLDER).startswith(".")


def _resolved(folder: Path, name: str) -> Path:
    """Return the path of a file; refuse links, which would send other files, except in the Hub's cache."""
    path = folder / name
    if is_template(name) and (folder / TEMPLATES_FOLDER).is_symlink():
        raise CheckpointError("is in a linked folder: only files in the folder are sent", where=path)
    if not path.is_symlink():
        return regular_file(path)
    target = regular_file(path).resolve()
    if not any(target.is_relative_to(store) for store in _stores(folder.resolve())):
        raise CheckpointError("is a link out of the folder: only files in the folder are sent", where=path)
    return target


def _stores(folder: Path) -> Iterator[Path]:
    """Yield the folders that a cached snapshot's links point to: models--org--name/blobs, or the shared blobs/."""
    if is_commit(folder.name) and folder.parent.name == "snapshots":
        model = folder.parent.parent
        if model.name.startswith("models--"):
            yield model / "blobs"
            yield model.parent / "blobs"
