"""The state of a Hub on loopback: models, users, uploaded files, pending faults, and the request log."""

import hashlib
import os
import re
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

REGULAR_BYTES: Final = 10_000
"""Files up to this size that are no weights are regular ones; all others are LFS files, served by another path."""


@dataclass
class Repo:
    """A model: commits by sha, each files by name; branches and pull requests by name; who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    private_to: set[str] | None = None
    gated_to: set[str] | None = None
    pull_requests: list[dict[str, Any]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Commit all files of the model, move a branch to the commit, and return its sha."""
        content = f"{len(self.commits)}" + "".join(f"{name}{hashlib.sha256(files[name]).hexdigest()}" for name in files)
        sha = hashlib.sha1(content.encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        return sha

    def files(self, ref: str = "main") -> dict[str, bytes]:
        """Return the files of a branch."""
        return self.commits[self.refs[ref]]


@dataclass(frozen=True)
class Request:
    """An answered request: method and path, status, and the bytes of both bodies."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int
    received: int = 0


@dataclass
class Fault:
    """A fault for a number of requests with a matching path.

    Attributes:
        status: The answer; nothing is done, unless `done`.
        cut_after: The answer is cut after so many bytes of its body.
        dropped: The connection is closed before the request is read.
        done: The request is carried out, and its answer is lost, or replaced by `status`.
        before: A call.
    """

    path: str
    times: int
    status: int | None = None
    cut_after: int | None = None
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    before: Callable[[], object] | None = None
    dropped: bool = False
    done: bool = False


class Refusal(Exception):  # noqa: N818 - an answer, no error of the server
    """An error answer, marked as the Hub does."""

    def __init__(self, status: int, code: str | None = None, message: str = "", body: bytes = b"") -> None:
        self.status = status
        self.body = body
        self.headers = {"X-Error-Message": message} if message else {}
        if code is not None:
            self.headers["X-Error-Code"] = code


class Hub:
    """The server's state.

    Attributes:
        users: User by token.
        orgs: The organizations that a user may write to.
        reading: Tokens that may only read.
        objects: LFS files that were sent, by sha256.
        part_bytes: LFS files that are larger are sent in parts of this size.
        xet_store: The folder where the xet client puts and finds what it transfers.
    """

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, str] = {}
        self.orgs: dict[str, set[str]] = {}
        self.reading: set[str] = set()
        self.objects: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.part_bytes: int | None = None
        self.xet_store: Path | None = None
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.knows_ranges = True
        self.url = ""
        self.storage_url = ""
        self._lock = threading.Lock()

    def add(self, name: str, folder: Path, **access: set[str] | None) -> str:
        """Add a model with the files of a folder; return the sha of its only commit."""
        self.repos[name] = Repo(**access)
        return self.repos[name].commit(
            {
                path.relative_to(folder).as_posix(): path.read_bytes()
                for path in sorted(folder.rglob("*"))
                if path.is_file()
            }
        )

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """Return the environment of a process that uses this Hub without a token, with its cache in `home`."""
        ours = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**kept, "NO_PROXY": "*", "OMP_NUM_THREADS": "1", **settings, **more}

    def may_write(self, token: str, repo: str) -> bool:
        """Return whether a token's user, or an organization of the user, owns a model."""
        user = self.users.get(token)
        return user is not None and token not in self.reading and repo.partition("/")[0] in self.owned(user)

    def owned(self, user: str) -> set[str]:
        """Return the namespaces of a user."""
        return {user, *self.orgs.get(user, ())}

    def note(self, request: Request) -> None:
        """Log a request."""
        with self._lock:
            self.log.append(request)

    def fault(self, method: str, path: str) -> Fault | None:
        """Return the fault of a request, and use it up by one."""
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def sent(self, name: str) -> int:
        """Return the number of bytes sent of a file."""
        return sum(request.sent for request in self.log if request.method == "GET" and request.path.endswith(name))

    def requests_to(self, path: str, method: str = "POST") -> list[Request]:
        """Return the requests with a matching path."""
        return [request for request in self.log if request.method == method and re.search(path, request.path)]


def is_large(file: str, size: int) -> bool:
    """Return whether a file is an LFS file."""
    return file.endswith(".safetensors") or size > REGULAR_BYTES


def pointer(data: bytes) -> bytes:
    """Return git's pointer to an LFS file."""
    sha256 = hashlib.sha256(data).hexdigest()
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(data)}\n".encode()


def blob_id(file: str, data: bytes) -> str:
    """Return git's blob id of a file."""
    kept = pointer(data) if is_large(file, len(data)) else data
    return hashlib.sha1(b"blob %d\0" % len(kept) + kept).hexdigest()
