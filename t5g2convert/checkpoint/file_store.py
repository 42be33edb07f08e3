"""Where the files of a checkpoint are: a folder of this machine, or a commit of a model of the Hub."""

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
"""Names in a folder that are looked at to say what it is."""

MOST_CHARACTERS: Final = 96
"""Characters of an owner's or a model's name on the Hub."""


REPO_ID: Final = r"\w[\w.-]*/\w[\w.-]*"
"""A pattern of what looks like the name of a model on the Hub; for `re.ASCII`."""

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
    """Return whether a revision is the sha of a commit, and not a branch or a tag."""
    return _COMMIT.fullmatch(revision) is not None


@dataclass(frozen=True, slots=True)
class HubFile:
    """A file of a model of the Hub: its size in bytes, and its sha256 where the Hub tells it."""

    size: int
    sha256: str | None


@dataclass(frozen=True, slots=True)
class HubOrigin:
    """The model of the Hub that a checkpoint is.

    Attributes:
        repo: Its name, `org/name`.
        revision: The sha of the commit.
        files: Every file at its top level, and its further chat templates; offline, those in the cache.
        paths: All that it has, folders with a slash behind; nothing where that is not known.
    """

    repo: str
    revision: str
    files: Mapping[str, HubFile]
    paths: frozenset[str] = frozenset()

    def to_json(self) -> dict[str, str]:
        """What is told of it, and kept in manifests."""
        return {"repo": self.repo, "revision": self.revision}


class FileStore(Protocol):
    """Where the files of a checkpoint are; JSON files that exist can be read in `path`."""

    @property
    def path(self) -> Path:
        """The folder where they lie, or will."""

    def has(self, name: str) -> bool:
        """Whether anything is there under that name."""

    def names(self) -> Iterable[str]:
        """Everything that is there."""

    def paths(self) -> frozenset[str]:
        """Everything that is there and one level down, with a slash behind the names of folders."""

    def headers(self, names: Iterable[str]) -> Mapping[str, Header]:
        """The headers of safetensors files."""

    def incomplete(self, reason: str, hint: str | None = None, *, missing: Sequence[str] = ()) -> T5g2Error:
        """The error that weights are not there; `missing` are the files that are known to be wanted."""


@dataclass(frozen=True, slots=True)
class Folder:
    """A folder of this machine, as a place."""

    path: Path

    def has(self, name: str) -> bool:
        """Whether there is a file or anything else of that name, be it a link that leads nowhere."""
        return os.path.lexists(self.path / name)

    def names(self) -> Iterable[str]:
        """Everything in the folder."""
        return [item.name for item in self.path.iterdir()]

    def paths(self) -> frozenset[str]:
        """Everything in the folder and one level down; of hidden folders only their names.

        Raises:
            CheckpointError: The folder cannot be read.
        """
        try:
            found = listed(self.path)
        except OSError as error:
            raise CheckpointError(f"cannot be read: {error.strerror}", where=self.path) from None
        for folder in [name for name in found if name.endswith("/") and not name.startswith(".")]:
            # What is in a folder that cannot be read does not say what this one is.
            with suppress(OSError):
                found |= {f"{folder}{name}" for name in listed(self.path / folder)}
        return frozenset(found)

    def headers(self, names: Iterable[str]) -> Mapping[str, Header]:
        """The headers of safetensors files."""
        return {name: read_header(regular_file(self.path / name)) for name in names}

    def incomplete(self, reason: str, hint: str | None = None, *, missing: Sequence[str] = ()) -> T5g2Error:
        """The error that weights are not there."""
        return CheckpointError(reason, where=self.path, hint=hint)


def listed(folder: Path) -> set[str]:
    """The names in a folder, with a slash behind those of folders, links followed; the first of very many.

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
    """Paths of files and of all folders that they imply, the folders with a slash behind."""
    found: set[str] = set()
    for name in names:
        found.add(name)
        while (name := name.rpartition("/")[0]) and f"{name}/" not in found:
            found.add(f"{name}/")
    return frozenset(found)


def regular_file(path: Path) -> Path:
    """`path` itself if it is, through symbolic links as in the Hub cache, a regular file."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        found = "a dangling link" if path.is_symlink() else "missing"
        raise CheckpointError(f"is {found}", where=path) from None
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
    if not stat.S_ISREG(mode):
        raise CheckpointError("is not a regular file", where=path)
    return path


def is_there(path: Path) -> bool:
    """Whether a file is there.

    Raises:
        CheckpointError: It is there and is not a file, like a link that leads nowhere; or the disk cannot tell.
    """
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from error
    regular_file(path)
    return True
