"""Where the files of a checkpoint are: in a local folder, or in one commit of a model on the Hub."""

import hashlib
import os
import re
import stat
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final, Protocol

from t5g2convert.checkpoint.header import Header, read_header
from t5g2convert.errors import CheckpointError, T5g2Error

MOST_NAMES: Final = 10_000
"""Maximum number of names to read in a folder to recognise its format."""

MOST_CHARACTERS: Final = 96
"""Maximum number of characters in the name of an owner or a model on the Hub."""


REPO_ID: Final = r"\w[\w.-]*/\w[\w.-]*"
"""A pattern for text that looks like the name of a model on the Hub; use it with `re.ASCII`."""

_COMMIT: Final = re.compile(r"[0-9a-f]{40}")


def is_repo_id(name: str) -> bool:
    """Return whether the Hub may have a model of that name.

    >>> is_repo_id("google/gemma-3-270m"), is_repo_id("gemma-3-270m"), is_repo_id("google/gemma--3")
    (True, False, False)
    """
    return (
        re.fullmatch(REPO_ID, name, re.ASCII) is not None
        and all(len(part) <= MOST_CHARACTERS for part in name.split("/"))
        and not any(mark in name for mark in ("--", ".."))
        and not name.endswith((".git", "-", "."))
    )


def is_commit(revision: str) -> bool:
    """Return whether a revision is the sha of a commit, not a branch or a tag."""
    return _COMMIT.fullmatch(revision) is not None


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a model on the Hub: its size in bytes, and its sha256 if the Hub states one."""

    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """The commit on the Hub that a checkpoint was read from.

    Attributes:
        repo: The model, `org/name`.
        revision: The sha of the commit.
        files: The files at its top level and its additional chat templates; offline, those in the cache.
        paths: All its files and folders, folders with a trailing slash; empty if unknown.
    """

    repo: str
    revision: str
    files: Mapping[str, HubFile]
    paths: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, str]:
        return {"repo": self.repo, "revision": self.revision}


class FileStore(Protocol):
    """A place that holds the files of a checkpoint; its JSON files can be read in `path`."""

    @property
    def path(self) -> Path:
        """The folder that holds the files now, or after they are fetched."""

    def has(self, name: str) -> bool:
        """Return whether there is a file or folder of that name."""

    def names(self) -> Iterable[str]:
        """Return all names at the top level."""

    def paths(self) -> frozenset[str]:
        """Return all paths of the first two levels; folders end with a slash."""

    def headers(self, names: Iterable[str]) -> Mapping[str, Header]:
        """Read the headers of safetensors files."""

    def incomplete(self, reason: str, hint: str | None = None, *, missing: Sequence[str] = ()) -> T5g2Error:
        """Return the error for absent weights; `missing` are the files that are known to be absent."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A local folder."""

    path: Path

    def has(self, name: str) -> bool:
        """Return whether there is a file or folder of that name, including a broken symlink."""
        return os.path.lexists(self.path / name)

    def names(self) -> Iterable[str]:
        """Return all names at the top level."""
        return [item.name for item in self.path.iterdir()]

    def paths(self) -> frozenset[str]:
        """Return all paths of the first two levels, without the contents of hidden folders.

        Raises:
            CheckpointError: The folder cannot be read.
        """
        try:
            found = listed(self.path)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=self.path) from None
        for folder in [name for name in found if name.endswith("/") and not name.startswith(".")]:
            # An unreadable subfolder does not help to recognise the format, so skip it.
            with suppress(OSError):
                found |= {f"{folder}{name}" for name in listed(self.path / folder)}
        return frozenset(found)

    def headers(self, names: Iterable[str]) -> Mapping[str, Header]:
        """Read the headers of safetensors files."""
        return {name: read_header(regular_file(self.path / name)) for name in names}

    def incomplete(self, reason: str, hint: str | None = None, *, missing: Sequence[str] = ()) -> T5g2Error:
        """Return the error for absent weights."""
        return CheckpointError(reason, where=self.path, hint=hint)


def listed(folder: Path) -> set[str]:
    """Return the names in a folder, `MOST_NAMES` at most; folders, and links to folders, end with a slash.

    Raises:
        OSError: The folder cannot be read.
    """
    with os.scandir(folder) as items:
        return {f"{item.name}/" if _is_folder(item) else item.name for item in islice(items, MOST_NAMES)}


def _is_folder(item: os.DirEntry[str]) -> bool:
    try:
        return item.is_dir()
    except OSError:
        return False


def folders_of(names: Iterable[str]) -> frozenset[str]:
    """Return file paths together with their parent folders, which end with a slash."""
    found: set[str] = set()
    for name in names:
        found.add(name)
        while (name := name.rpartition("/")[0]) and f"{name}/" not in found:
            found.add(f"{name}/")
    return frozenset(found)


def regular_file(path: Path) -> Path:
    """Return `path` if it is a regular file; symlinks, as in the Hub's cache, are followed.

    Raises:
        CheckpointError: The path is missing, a broken symlink, or not a regular file.
    """
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        found = "a broken symlink" if path.is_symlink() else "missing"
        raise CheckpointError(f"is {found}", where=path) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
    if not stat.S_ISREG(mode):
        raise CheckpointError("is not a regular file", where=path)
    return path


def is_there(path: Path) -> bool:
    """Return whether a file exists.

    Raises:
        CheckpointError: It is a broken symlink or not a regular file, or the disk cannot be read.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error
    regular_file(path)
    return True


PIECE_BYTES: Final = 1 << 20

HASH_THREADS: Final = 2
"""Threads that hash the files of a folder that was written before."""


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file, hexadecimal, in bounded memory.

    Raises:
        OSError: The file cannot be read.
    """
    digest = hashlib.sha256()
    buffer = bytearray(PIECE_BYTES)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()
