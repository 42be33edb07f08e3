"""A Hub on loopback: the part of its protocol that reading a model takes, faults to inject, and a log of requests.

The real client talks to it through HF_ENDPOINT, which it reads when it is imported: run it in a process of its own,
with the environment of `Hub.env`. LFS files are served by another host name, as by the storage behind the Hub.
"""

import hashlib
import json
import os
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Final
from urllib.parse import unquote, urlsplit

REGULAR_BYTES: Final = 10_000
"""Files up to this size that are no weights are regular ones; all others are LFS files, served by another path."""


@dataclass
class Repo:
    """A model: commits by sha, each files by name; branches and tags by name; who may read it."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    private_to: set[str] | None = None
    gated_to: set[str] | None = None

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        """Make a commit of all files of the model, and move a branch to it; its sha."""
        told = f"{len(self.commits)}" + "".join(f"{name}{hashlib.sha256(files[name]).hexdigest()}" for name in files)
        sha = hashlib.sha1(told.encode()).hexdigest()
        self.commits[sha], self.refs[ref] = dict(files), sha
        return sha


@dataclass(frozen=True)
class Request:
    """A request that was answered: what was asked for, with which status, and the bytes of the answer's body."""

    method: str
    path: str
    range: str | None
    status: int
    sent: int


@dataclass
class Fault:
    """What happens so many times to requests whose path fits: a status, a cut after so many bytes, or a call."""

    path: str
    times: int
    status: int | None = None
    cut_after: int | None = None
    method: str = "GET"
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    before: Callable[[], object] | None = None


class Hub:
    """The server's state: models by name, users by token, faults to come, requests that came."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.users: dict[str, str] = {}
        self.faults: list[Fault] = []
        self.log: list[Request] = []
        self.knows_ranges = True
        self.url = ""
        self.storage_url = ""
        self._lock = threading.Lock()

    def add(self, name: str, folder: Path, **access: set[str] | None) -> str:
        """Add a model with the files of a folder; the sha of its only commit."""
        self.repos[name] = Repo(**access)
        return self.repos[name].commit({path.name: path.read_bytes() for path in sorted(folder.iterdir())})

    def env(self, home: Path, **more: str) -> dict[str, str]:
        """The environment of a process that talks to this Hub, without a token of its own, with its cache in `home`."""
        ours = ("HF_", "HUGGING", "TRANSFORMERS_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(ours)}
        settings = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
        return {**kept, "NO_PROXY": "*", "OMP_NUM_THREADS": "1", **settings, **more}

    def note(self, request: Request) -> None:
        """Add to the log."""
        with self._lock:
            self.log.append(request)

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that a request meets, used up by one."""
        with self._lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    fault.times -= 1
                    return fault
        return None

    def sent(self, name: str) -> int:
        """Bytes of answers that were sent of a file, by its name."""
        return sum(request.sent for request in self.log if request.method == "GET" and request.path.endswith(name))


@contextmanager
def running() -> Iterator[Hub]:
    """A Hub that answers on loopback until the context is left."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.url, hub.storage_url = (f"http://{host}:{server.server_port}" for host in ("127.0.0.1", "localhost"))
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


class _Refusal(Exception):  # noqa: N818 - an answer, no error of the server
    def __init__(self, status: int, code: str | None = None, message: str = "") -> None:
        self.status = status
        self.headers = {"X-Error-Message": message} if message else {}
        if code is not None:
            self.headers["X-Error-Code"] = code


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Nothing on stderr: the Hub's own log is asked."""

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def _answer(self) -> None:
        # The slashes of a branch's name are quoted.
        path = urlsplit(self.path).path
        fault = self.hub.fault(self.command, path)
        self._cut_after = None if fault is None else fault.cut_after
        try:
            if fault is not None and fault.before is not None:
                fault.before()
            if fault is not None and fault.status is not None:
                return self._send(fault.status, fault.body, fault.headers)
            routes: dict[str, Callable[..., None]] = {
                r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?": self._info,
                r"/api/models/([^/]+/[^/]+)/tree/([^/]+)": self._tree,
                r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._resolve,
                r"/lfs/([^/]+/[^/]+)/([^/]+)/(.+)": self._content,
            }
            for pattern, route in routes.items():
                if found := re.fullmatch(pattern, path):
                    return route(*(part and unquote(part) for part in found.groups()))
            self._send(404, b"{}", {})
        except _Refusal as refusal:
            self._send(refusal.status, b"", refusal.headers)
        return None

    def _repo(self, name: str) -> Repo:
        """The model, if whoever asks may know of it."""
        given = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        user = self.hub.users.get(given)
        if given and user is None:
            raise _Refusal(401, message="Invalid credentials in Authorization header")
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private_to is not None and user not in repo.private_to):
            raise _Refusal(404 if given else 401, "RepoNotFound", "Repository not found")
        self._user = user
        return repo

    def _commit(self, repo: Repo, revision: str | None) -> str:
        sha = repo.refs.get(revision or "main", revision)
        if sha not in repo.commits:
            raise _Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _info(self, name: str, revision: str | None) -> None:
        repo = self._repo(name)
        sha = self._commit(repo, revision)
        files = [_described(file, data) for file, data in repo.commits[sha].items()]
        gated = False if repo.gated_to is None else "manual"
        document = {"_id": "0", "id": name, "modelId": name, "sha": sha, "gated": gated, "tags": [], "siblings": files}
        self._send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _tree(self, name: str, revision: str) -> None:
        """All files of a commit; no model here has folders."""
        repo = self._repo(name)
        files = repo.commits[self._commit(repo, revision)]
        rows: list[dict[str, Any]] = []
        for file, data in files.items():
            rows.append({"type": "file", "path": file, "size": len(data), "oid": hashlib.sha1(data).hexdigest()})
            if _is_large(file, data):
                large = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
                rows[-1]["lfs"] = large
        self._send(200, json.dumps(rows).encode(), {"Content-Type": "application/json"})

    def _resolve(self, name: str, revision: str, file: str) -> None:
        """A regular file itself, or the way to an LFS file."""
        repo = self._repo(name)
        if repo.gated_to is not None and self._user not in repo.gated_to:
            raise _Refusal(403 if self._user else 401, "GatedRepo", f"Access to model {name} is restricted")
        sha = self._commit(repo, revision)
        if file not in repo.commits[sha]:
            raise _Refusal(404, "EntryNotFound", "Entry not found")
        data = repo.commits[sha][file]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
        if not _is_large(file, data):
            return self._send_file(data, headers)
        headers |= {"X-Linked-Etag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Linked-Size": str(len(data))}
        return self._send(302, b"", {**headers, "Location": f"{self.hub.storage_url}/lfs/{name}/{sha}/{file}"})

    def _content(self, name: str, sha: str, file: str) -> None:
        """The bytes of an LFS file. Who has its address may read it; a token must not get here."""
        if "Authorization" in self.headers:
            raise _Refusal(400)
        self._send_file(self.hub.repos[name].commits[sha][file], {})

    def _send_file(self, data: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if asked is None or not self.hub.knows_ranges:
            return self._send(200, data, headers)
        start, end = int(asked[1]), min(int(asked[2] or len(data)), len(data) - 1)
        if start >= len(data):
            return self._send(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return self._send(206, data[start : end + 1], headers)

    def _send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        sent = 0
        if self.command != "HEAD":
            sent = self._write(body[: self._cut_after])
        if self._cut_after is not None:
            self.close_connection = True
        self.hub.note(Request(self.command, self.path, self.headers.get("Range"), status, sent))

    def _write(self, body: bytes) -> int:
        """Write until the reader goes; the bytes that the system took."""
        sent = 0
        try:
            while sent < len(body):
                sent += self.wfile.write(body[sent : sent + 65_536])
        except OSError:
            self.close_connection = True
        return sent


def _is_large(file: str, data: bytes) -> bool:
    return file.endswith(".safetensors") or len(data) > REGULAR_BYTES


def _described(file: str, data: bytes) -> dict[str, Any]:
    described: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
    if _is_large(file, data):
        described["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    return described
