"""What is sent of a folder: the files that its manifest lists, each with the sha256 that it tells, and nothing else.

Of a folder that was trained elsewhere, which has no manifest, it is the files that loaders read by their names.
"""

import hashlib
import io
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.digest import PIECE_BYTES, sha256_of
from t5g2convert.checkpoint.file_store import regular_file
from t5g2convert.checkpoint.folder import check_folder, open_checkpoint
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, FileRecord, read_manifest
from t5g2convert.checkpoint.tokenizer.chat_templates import TEMPLATES_FOLDER, is_output_name, is_template
from t5g2convert.errors import CheckpointError
from t5g2convert.publish.card import CARD_FILE
from t5g2convert.publish.trained_elsewhere import files_of, missing_manifest

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True, slots=True)
class LocalFile:
    """A file to be sent.

    Attributes:
        name: Its name, here and on the Hub.
        content: Where it lies, links resolved; or its bytes, if it is not in the folder.
        size: Bytes.
        sha256: Hexadecimal.
    """

    name: str
    content: Path | bytes
    size: int
    sha256: str

    @classmethod
    def of_text(cls, name: str, text: str) -> "LocalFile":
        """A file of some text."""
        data = text.encode()
        return cls(name, data, len(data), hashlib.sha256(data).hexdigest())

    def is_blob(self, sha1: str) -> bool:
        """Whether git's name for its bytes is this one; if they are another's by now, it is none.

        Raises:
            OSError: It cannot be read.
        """
        by_git, itself = hashlib.sha1(b"blob %d\0" % self.size), hashlib.sha256()
        with io.BytesIO(self.content) if isinstance(self.content, bytes) else self.content.open("rb") as file:
            while piece := file.read(PIECE_BYTES):
                by_git.update(piece)
                itself.update(piece)
        return (by_git.hexdigest(), itself.hexdigest()) == (sha1, self.sha256)


def finished_files(folder: Path, told: Callable[[str], None] | None = None) -> tuple[LocalFile, ...]:
    """The files of a folder that this tool wrote: those of its manifest, and the manifest.

    Every one is read, and compared with the size and sha256 that the manifest tells.

    Args:
        folder: The folder, which may be one of the Hub's cache.
        told: Told of each file before it is read.

    Raises:
        CheckpointError: There is no sound manifest, or files are missing, damaged, links, or no regular files; the
            details are all of them.
    """
    check_folder(folder)
    try:
        _place(folder, MANIFEST_FILE)
        manifest = read_manifest(folder)
    except CheckpointError as error:
        raise missing_manifest(error, folder) from None
    if not manifest.files:
        raise CheckpointError("lists no files", where=folder / MANIFEST_FILE)
    named = (*manifest.files.items(), (MANIFEST_FILE, None))
    files = _all_checked(folder, named, told, hint="nothing was sent; convert again")
    return tuple(sorted(files, key=lambda file: file.name))


def elsewhere_files(folder: Path, told: Callable[[str], None] | None = None) -> tuple[LocalFile, ...]:
    """The files of a folder that was trained elsewhere: those that loaders read, each as it is now, and no others.

    Args:
        folder: The folder.
        told: Told of each file before it is read.

    Raises:
        CheckpointError: The folder is not sound, or files are links or no regular files; the details are all of them.
    """
    named = [(name, None) for name in files_of(open_checkpoint(folder))]
    hint = "nothing was sent; put the files themselves in place of links"
    return tuple(_all_checked(folder, named, told, hint=hint))


def local_card(folder: Path) -> str | None:
    """README.md of a folder, if it has one.

    Raises:
        CheckpointError: It is a link, no regular file, or no UTF-8.
    """
    if not (folder / CARD_FILE).is_symlink() and not (folder / CARD_FILE).exists():
        return None
    try:
        return _place(folder, CARD_FILE).read_bytes().decode()
    except UnicodeDecodeError:
        raise CheckpointError("is not UTF-8", where=folder / CARD_FILE) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=folder / CARD_FILE) from None


def _all_checked(
    folder: Path,
    named: Iterable[tuple[str, FileRecord | None]],
    told: Callable[[str], None] | None,
    *,
    hint: str,
) -> list[LocalFile]:
    """Every file by its name and what the manifest has of it; all that cannot be sent are refused in one error."""
    faults: list[str] = []
    files: list[LocalFile] = []
    for name, facts in named:
        if told is not None:
            told(name)
        try:
            files.append(_checked(folder, name, facts))
        except CheckpointError as error:
            faults.append(f"{name} {error.message}")
    if faults:
        raise CheckpointError(f"{len(faults)} file(s) cannot be sent", where=folder, details=faults, hint=hint)
    return files


def _checked(folder: Path, name: str, facts: FileRecord | None) -> LocalFile:
    """A file that has what the manifest tells of it; `facts` is None for the manifest itself."""
    if not is_sent_name(name) or (facts is not None and name in (MANIFEST_FILE, CARD_FILE)):
        raise CheckpointError("is not the name of a file that a conversion writes")
    path = _place(folder, name)
    try:
        size, sha256 = path.stat().st_size, sha256_of(path)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}") from None
    if facts is not None and size != facts.bytes:
        raise CheckpointError(f"has {size} bytes, expected {facts.bytes}")
    if facts is not None and sha256 != (facts.sha256 or sha256):
        raise CheckpointError("has another sha256")
    return LocalFile(name, path, size, sha256)


def is_sent_name(name: str) -> bool:
    """Whether a file of that name is sent: one that a conversion writes, and not a hidden one."""
    return is_output_name(name) and not name.removeprefix(TEMPLATES_FOLDER).startswith(".")


def _place(folder: Path, name: str) -> Path:
    """Where a file lies. A link would send what is elsewhere; those of the Hub's cache lead to its own files."""
    path = folder / name
    if is_template(name) and (folder / TEMPLATES_FOLDER).is_symlink():
        raise CheckpointError("is in a linked folder: only files of the folder itself are sent", where=path)
    if not path.is_symlink():
        return regular_file(path)
    target = regular_file(path).resolve()
    if not any(target.is_relative_to(store) for store in _stores(folder.resolve())):
        raise CheckpointError("is a link to another place: only files of the folder itself are sent", where=path)
    return target


def _stores(folder: Path) -> Iterator[Path]:
    """Where links of a snapshot in the Hub's cache lead: models--org--name/blobs, or blobs/ that models share."""
    if _COMMIT.fullmatch(folder.name) and folder.parent.name == "snapshots":
        model = folder.parent.parent
        if model.name.startswith("models--"):
            yield model / "blobs"
            yield model.parent / "blobs"
