"""A Hub on loopback: the part of its protocol for reading and writing models, faults, and a request log.

The real client talks to it through HF_ENDPOINT, which it reads when it is imported: run it in a process of its own,
with the environment of `Hub.env`. LFS files are served by another host name, as by the storage behind the Hub.
"""

import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub import xet
from tests.hub.state import Fault, Hub, Refusal, Repo, Request, blob_id, is_large, pointer
from tests.hub.writes import Writes

__all__ = ["Fault", "Hub", "Repo", "Request", "running"]


@contextmanager
def running() -> Iterator[Hub]:
    """Run a Hub on loopback until the context exits."""
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


class _Handler(Writes, BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Print nothing to stderr: tests read the Hub's own log."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the names that the server asks for

    def _answer(self) -> None:
        # Slashes in a branch name are quoted.
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.user = self.hub.users.get(self.token)
        self._fault = fault = self.hub.fault(self.command, parts.path)
        self._cut_after = None if fault is None else fault.cut_after
        if fault is not None and fault.before is not None:
            fault.before()
        if fault is not None and fault.dropped:
            return self._close(0)
        self.body = self._read()
        try:
            if fault is not None and fault.status is not None and not fault.done:
                return self.send(fault.status, fault.body, fault.headers)
            for pattern, route in {**self._read_routes(), **self.write_routes()}.items():
                if found := re.fullmatch(pattern, f"{self.command.replace('HEAD', 'GET')} {parts.path}"):
                    return route(*(part and unquote(part) for part in found.groups()))
            self.send(404, b"{}", {})
        except Refusal as refusal:
            self.send(refusal.status, refusal.body, refusal.headers)
        return None

    def _read_routes(self) -> dict[str, Callable[..., None]]:
        model = r"/api/models/([^/]+/[^/]+)"
        return {
            rf"GET {model}(?:/revision/(.+))?": self._info,
            rf"GET {model}/tree/([^/]+)": self._tree,
            rf"POST {model}/paths-info/([^/]+)": self._paths,
            r"GET /([^/]+/[^/]+)/resolve/([^/]+)/(.+)": self._resolve,
            r"GET /lfs/([^/]+/[^/]+)/([^/]+)/(.+)": self._content,
        }

    def _read(self) -> bytes:
        """Return the body of a request."""
        if "chunked" not in (self.headers.get("Transfer-Encoding") or ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        pieces = []
        while size := int(self.rfile.readline(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def repo(self, name: str) -> Repo:
        """Return the model, if the user may see it."""
        if self.token and self.user is None:
            raise Refusal(401, message="Invalid credentials in Authorization header")
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private_to is not None and self.user not in repo.private_to):
            raise Refusal(404 if self.token else 401, "RepoNotFound", "Repository not found")
        return repo

    def revision(self, repo: Repo, revision: str | None) -> str:
        """Return the commit of a branch, tag, pull request or sha."""
        sha = repo.refs.get(revision or "main", repo.tags.get(revision or "", revision))
        if sha not in repo.commits:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return sha

    def _info(self, name: str, revision: str | None) -> None:
        repo = self.repo(name)
        sha = self.revision(repo, revision)
        files = [_described(file, data) for file, data in repo.commits[sha].items()]
        gated = False if repo.gated_to is None else "manual"
        private = repo.private_to is not None
        document = {"_id": "0", "id": name, "modelId": name, "sha": sha, "gated": gated, "tags": [], "siblings": files}
        document["private"] = private
        self.send(200, json.dumps(document).encode(), {"Content-Type": "application/json"})

    def _tree(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        files = repo.commits[self.revision(repo, revision)]
        whole = self.query.get("recursive", [""])[0].lower() == "true"
        self.send_json([_listed(file, data) for file, data in files.items() if whole or "/" not in file])

    def _paths(self, name: str, revision: str) -> None:
        repo = self.repo(name)
        files, wanted = repo.commits[self.revision(repo, revision)], parse_qs(self.body.decode())["paths"]
        self.send_json([_listed(file, files[file]) for file in wanted if file in files])

    def _resolve(self, name: str, revision: str, file: str) -> None:
        """Send a regular file, or a redirect to an LFS file."""
        repo = self.repo(name)
        if repo.gated_to is not None and self.user not in repo.gated_to:
            raise Refusal(403 if self.user else 401, "GatedRepo", f"Access to model {name} is restricted")
        sha = self.revision(repo, revision)
        if file not in repo.commits[sha]:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        data = repo.commits[sha][file]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{blob_id(file, data)}"'}
        if not is_large(file, len(data)):
            return self._send_file(data, headers)
        sha256 = hashlib.sha256(data).hexdigest()
        headers |= {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(data))}
        if self.hub.xet_store is not None and (found := xet.hashes(self.hub.xet_store).get(sha256)):
            headers["X-Xet-Hash"] = found
            headers["X-Xet-Refresh-Route"] = f"{self.hub.url}/api/models/{name}/xet-read-token/{sha}"
        return self.send(302, b"", {**headers, "Location": f"{self.hub.storage_url}/lfs/{name}/{sha}/{file}"})

    def _content(self, name: str, sha: str, file: str) -> None:
        """Send the bytes of an LFS file. The address is enough to read it; a token must not arrive here."""
        if "Authorization" in self.headers:
            raise Refusal(400)
        self._send_file(self.hub.repos[name].commits[sha][file], {})

    def _send_file(self, data: bytes, headers: dict[str, str]) -> None:
        requests_to = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if requests_to is None or not self.hub.knows_ranges:
            return self.send(200, data, headers)
        start, end = int(requests_to[1]), min(int(requests_to[2] or len(data)), len(data) - 1)
        if start >= len(data):
            return self.send(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
        headers["Content-Range"] = f"bytes {start}-{end}/{len(data)}"
        return self.send(206, data[start : end + 1], headers)

    def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        """Answer, unless a fault drops, replaces or cuts the answer."""
        if self._fault is not None and self._fault.done:
            if self._fault.status is None:
                return self._close(status)
            status, body, headers = self._fault.status, self._fault.body, self._fault.headers
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
        return self._note(status, sent)

    def _close(self, status: int) -> None:
        """Close the connection without an answer."""
        self.close_connection = True
        self._note(status, 0)

    def _note(self, status: int, sent: int) -> None:
        received = len(getattr(self, "body", b""))
        self.hub.note(Request(self.command, self.path, self.headers.get("Range"), status, sent, received))

    def _write(self, body: bytes) -> int:
        """Write until the reader disconnects; return the number of bytes sent."""
        sent = 0
        try:
            while sent < len(body):
                sent += self.wfile.write(body[sent : sent + 65_536])
        except OSError:
            self.close_connection = True
        return sent


def _described(file: str, data: bytes) -> dict[str, Any]:
    """Return a file entry for `model_info`."""
    described: dict[str, Any] = {"rfilename": file, "size": len(data), "blobId": blob_id(file, data)}
    if is_large(file, len(data)):
        sha256 = hashlib.sha256(data).hexdigest()
        described["lfs"] = {"sha256": sha256, "size": len(data), "pointerSize": len(pointer(data))}
    return described


def _listed(file: str, data: bytes) -> dict[str, Any]:
    """Return a file entry for a tree."""
    listed: dict[str, Any] = {"type": "file", "path": file, "size": len(data), "oid": blob_id(file, data)}
    if is_large(file, len(data)):
        sha256 = hashlib.sha256(data).hexdigest()
        listed["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": len(pointer(data))}
    return listed
