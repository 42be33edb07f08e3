"""The part of the Hub's protocol for writing models: users, creation, LFS files, commits, pull requests."""

import base64
import hashlib
import json
from collections.abc import Callable, Mapping
from fnmatch import fnmatch
from math import ceil
from typing import Any, Final

import yaml

from tests.hub import xet
from tests.hub.state import Hub, Refusal, Repo, blob_id, is_large

ATTRIBUTES: Final = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
"""The .gitattributes that the Hub puts into a new model."""


class Writes:
    """The routes of a handler for writing."""

    hub: Hub
    body: bytes
    query: dict[str, list[str]]
    token: str
    headers: Any
    user: str | None

    def repo(self, name: str) -> Repo: ...
    def revision(self, repo: Repo, revision: str | None) -> str: ...
    def send(self, status: int, body: bytes, headers: Mapping[str, str]) -> None: ...

    def write_routes(self) -> dict[str, Callable[..., None]]:
        """Return methods and paths with their handlers."""
        model = r"/api/models/([^/]+/[^/]+)"
        return {
            r"GET /api/whoami-v2": self._whoami,
            rf"GET {model}/auth-check(/write)?": self._auth_check,
            rf"GET {model}/refs": self._refs,
            rf"GET {model}/discussions": self._discussions,
            rf"GET {model}/xet-(?:read|write)-token/.+": self._xet_token,
            r"POST /api/repos/create": self._create,
            r"POST /api/validate-yaml": self._validate,
            rf"POST {model}/branch/([^/]+)": self._branch,
            rf"POST {model}/preupload/([^/]+)": self._preupload,
            rf"POST {model}/commit/([^/]+)": self._commit,
            r"POST /([^/]+/[^/]+)\.git/info/lfs/objects/batch": self._batch,
            r"PUT /lfs-put/(\w+)": self._put,
            r"PUT /lfs-part/(\w+)/(\d+)": self._part,
            r"POST /lfs-complete/(\w+)": self._complete,
            r"POST /lfs-verify": self._verify,
        }

    def send_json(self, document: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> None:
        """Answer with a JSON document."""
        self.send(status, json.dumps(document).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _json(self) -> Any:
        return json.loads(self.body)

    def _known(self) -> str:
        """Return the user of the request."""
        user = self.hub.users.get(self.token)
        if user is None:
            message = "Invalid credentials in Authorization header" if self.token else "Invalid username or password."
            raise Refusal(401, message=message)
        return user

    def _writable(self, name: str) -> Repo:
        """Return a model that the user may write to."""
        repo = self.repo(name)
        self._known()
        if not self.hub.may_write(self.token, name):
            raise Refusal(403, message=f"You do not have the rights to write to {name}")
        return repo

    def _whoami(self) -> None:
        user = self._known()
        role = "read" if self.token in self.hub.reading else "write"
        orgs = [{"type": "org", "name": name, "roleInOrg": "write"} for name in sorted(self.hub.orgs.get(user, ()))]
        token = {"type": "access_token", "accessToken": {"displayName": "mine", "role": role}}
        self.send_json({"type": "user", "name": user, "orgs": orgs, "auth": token})

    def _auth_check(self, name: str, write: str | None) -> None:
        repo = self._writable(name) if write else self.repo(name)
        if repo.gated_to is not None and self.user not in repo.gated_to and not self.hub.may_write(self.token, name):
            raise Refusal(403 if self.user else 401, "GatedRepo", f"Access to model {name} is restricted")
        self.send(200, b"OK", {})

    def _create(self) -> None:
        user, requests_to = self._known(), self._json()
        owner = requests_to["organization"] or user
        name = f"{owner}/{requests_to['name']}"
        if self.token in self.hub.reading or owner not in self.hub.owned(user):
            raise Refusal(403, message=f"You do not have the rights to create a model under the namespace {owner}")
        if name in self.hub.repos:
            answer = {"error": "You already created this model repo", "url": f"{self.hub.url}/{name}"}
            return self.send_json(answer, 409)
        private = requests_to.get("visibility") == "private"
        members = {user} | {other for other, orgs in self.hub.orgs.items() if owner in orgs}
        self.hub.repos[name] = Repo(private_to=members if private else None)
        self.hub.repos[name].commit({".gitattributes": ATTRIBUTES})
        return self.send_json({"url": f"{self.hub.url}/{name}", "name": name})

    def _validate(self) -> None:
        """The text between the card's two rules must be YAML; the Hub warns if it is missing."""
        parts = self._json()["content"].split("---\n", 2)
        if len(parts) < 3 or parts[0].strip():
            return self.send_json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        try:
            yaml.safe_load(parts[1])
        except yaml.YAMLError as error:
            return self.send_json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return self.send_json({"errors": [], "warnings": []})

    def _refs(self, name: str) -> None:
        repo = self.repo(name)
        answer: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
        for ref, sha in repo.refs.items():
            proposed = ref.startswith("refs/pr/")
            full = ref if proposed else f"refs/heads/{ref}"
            short = ref.removeprefix("refs/")
            answer["pullRequests" if proposed else "branches"].append({"name": short, "ref": full, "targetCommit": sha})
        answer["tags"] = [
            {"name": tag, "ref": f"refs/tags/{tag}", "targetCommit": sha} for tag, sha in repo.tags.items()
        ]
        self.send_json(answer)

    def _branch(self, name: str, branch: str) -> None:
        repo = self._writable(name)
        if branch in repo.refs:
            return self.send_json({"error": "Reference already exists"}, 409)
        repo.refs[branch] = self.revision(repo, self._json().get("startingPoint"))
        return self.send_json({})

    def _discussions(self, name: str) -> None:
        repo = self.repo(name)
        requests_to = {key: values[0] for key, values in self.query.items()}
        same = {"isPullRequest": True, "createdAt": "2026-01-01T00:00:00.000Z", "repo": {"name": name, "type": "model"}}
        found = [
            {**item, **same}
            for item in repo.pull_requests
            if item["status"] == requests_to.get("status", item["status"])
            and item["author"]["name"] == requests_to.get("author", item["author"]["name"])
        ]
        self.send_json({"discussions": found, "count": len(found), "start": 0})

    def _preupload(self, name: str, revision: str) -> None:
        proposed = "create_pr" in self.query
        repo = self.repo(name) if proposed else self._writable(name)
        self._known()
        requests_to, present = self._json(), repo.commits[self.revision(repo, revision)]
        rules = requests_to.get("gitIgnore", present.get(".gitignore", b"").decode()).split()
        modes = []
        for file in requests_to["files"]:
            path, there = file["path"], present.get(file["path"])
            large = is_large(path, file["size"])
            oid = None if there is None else hashlib.sha256(there).hexdigest() if large else blob_id(path, there)
            ignored = any(fnmatch(path, rule) for rule in rules)
            mode = {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": ignored}
            modes.append(mode if oid is None else {**mode, "oid": oid})
        self.send_json({"files": modes})

    def _batch(self, name: str) -> None:
        self.repo(name)
        self._known()
        self.send_json({"transfer": "basic", "objects": [self._object(item) for item in self._json()["objects"]]})

    def _object(self, item: dict[str, Any]) -> dict[str, Any]:
        """Return the client's action for an LFS file: nothing if known, else one or several requests."""
        oid, size, part, storage = item["oid"], item["size"], self.hub.part_bytes, self.hub.storage_url
        if oid in self.hub.objects:
            return {"oid": oid, "size": size}
        upload: dict[str, Any] = {"href": f"{storage}/lfs-put/{oid}"}
        if part is not None and size > part:
            urls = {str(1 + index): f"{storage}/lfs-part/{oid}/{1 + index}" for index in range(ceil(size / part))}
            upload = {"href": f"{storage}/lfs-complete/{oid}", "header": {"chunk_size": str(part), **urls}}
        verify = {"href": f"{self.hub.url}/lfs-verify"}
        return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}

    def _stored(self) -> bytes:
        """Return the body of a storage request; the address is enough to write, and a token must not arrive here."""
        if "Authorization" in self.headers:
            raise Refusal(400)
        return self.body

    def _put(self, oid: str) -> None:
        data = self._stored()
        if hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400)
        self.hub.objects[oid] = data
        self.send(200, b"", {})

    def _part(self, oid: str, number: str) -> None:
        self.hub.parts.setdefault(oid, {})[int(number)] = self._stored()
        self.send(200, b"", {"ETag": f'"{oid[:8]}-{number}"'})

    def _complete(self, oid: str) -> None:
        self._stored()
        numbers = [part["partNumber"] for part in self._json()["parts"]]
        data = b"".join(self.hub.parts[oid][number] for number in numbers)
        if numbers != sorted(self.hub.parts.pop(oid)) or hashlib.sha256(data).hexdigest() != oid:
            raise Refusal(400)
        self.hub.objects[oid] = data
        self.send_json({})

    def _verify(self) -> None:
        requests_to = self._json()
        if len(self.hub.objects.get(requests_to["oid"], b"")) != requests_to["size"]:
            raise Refusal(404)
        self.send_json({})

    def _xet_token(self, name: str) -> None:
        self.repo(name)
        if self.hub.xet_store is None:
            raise Refusal(404)
        store = self.hub.xet_store
        self.send_json(xet.connection(store), headers=xet.connection_headers(store))

    def _commit(self, name: str, revision: str) -> None:
        proposed = "create_pr" in self.query
        repo = self.repo(name) if proposed else self._writable(name)
        user, parent = self._known(), self.revision(repo, revision)
        if not proposed and revision not in repo.refs:
            raise Refusal(400, message="not a branch")
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        if header.get("parentCommit") not in (None, parent):
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(repo.commits[parent])
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self._sent(value["oid"], value["size"])
                case "deletedFile":
                    del files[value["path"]]
        number = len(repo.pull_requests) + 1
        sha = repo.commit(files, f"refs/pr/{number}" if proposed else revision)
        repo.messages.append(header["summary"])
        result = {"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha, "success": True}
        if proposed:
            item = {"num": number, "title": header["summary"], "status": "open", "author": {"name": user}}
            repo.pull_requests.append(item)
            result["pullRequestUrl"] = f"{self.hub.url}/{name}/discussions/{number}"
        self.send_json(result)

    def _sent(self, oid: str, size: int) -> bytes:
        """Return an LFS file that was sent before, by either transport."""
        if oid not in self.hub.objects and self.hub.xet_store is not None:
            found = xet.hashes(self.hub.xet_store).get(oid)
            data = b"" if found is None else xet.read(self.hub.xet_store, found, size)
            if hashlib.sha256(data).hexdigest() == oid:
                self.hub.objects[oid] = data
        if len(self.hub.objects.get(oid, b"")) != size:
            raise Refusal(400, message="LFS pointer pointed to a file that does not exist")
        return self.hub.objects[oid]
