"""The model on the Hub: write access, the commit of its branch, and its files."""

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from t5g2convert.checkpoint.card_seal import CARD_FILE
from t5g2convert.checkpoint.file_store import is_commit, is_repo_id
from t5g2convert.checkpoint.folder import some
from t5g2convert.checkpoint.hub.hub_errors import LOGIN_HINT
from t5g2convert.checkpoint.hub.snapshot import hub_api, silent_bar
from t5g2convert.checkpoint.manifest import MANIFEST_FILE
from t5g2convert.checkpoint.tokenizer.chat_templates import is_template
from t5g2convert.errors import HubError, UsageError
from t5g2convert.publish.retry import retry, upload_errors
from t5g2convert.publish.sent_files import LocalFile, is_sent_name

MAIN: Final = "main"
WEIGHTS: Final = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Access:
    """The access that the token gives to a model.

    Attributes:
        repo: The model, `org/name`.
        user: The user who owns the token.
        exists: Whether the model exists.
        private: Whether it is private; None if it does not exist.
    """

    repo: str
    user: str
    exists: bool
    private: bool | None


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on the Hub: its size, its git object id, and its sha256 if it is an LFS file."""

    size: int
    blob_id: str
    sha256: str | None

    def is_same(self, local: LocalFile) -> bool:
        """Return whether the file has the same bytes as a local file.

        Raises:
            OSError: The local file cannot be read.
        """
        if self.size != local.size:
            return False
        if self.sha256 is not None:
            return self.sha256 == local.sha256
        from huggingface_hub.utils.sha import git_hash

        # Files outside of LFS are small. A local file that changed since it was hashed is not the same.
        data = local.content if isinstance(local.content, bytes) else local.content.read_bytes()
        return hashlib.sha256(data).hexdigest() == local.sha256 and str(git_hash(data)) == self.blob_id


@dataclass(frozen=True, slots=True)
class RemoteFiles:
    """The files of one commit; empty if the model has no commit yet.

    Attributes:
        revision: The commit, or the name with which it was listed.
        files: The files by name.
    """

    revision: str | None
    files: Mapping[str, RemoteFile]

    def differing(self, files: Iterable[LocalFile]) -> list[LocalFile]:
        """Return the local files that are missing in the commit or differ from it."""
        return [file for file in files if file.name not in self.files or not self.files[file.name].is_same(file)]


def check_access(repo: str, *, create_pr: bool = False) -> Access:
    """Check that the token may write to a model, or create it; change nothing.

    Args:
        repo: The model, `org/name`.
        create_pr: Whether to make a pull request, which needs only read access.

    Raises:
        HubError: The token is missing, is invalid or lacks write access, or the Hub cannot be reached.
        UsageError: `repo` is not a valid model name.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalTokenNotFoundError, RepositoryNotFoundError

    if not is_repo_id(repo):
        # Do not repeat the name: it may be a URL that contains a token.
        raise UsageError("not a valid model name on the Hub, expected org/name")
    if constants.HF_HUB_OFFLINE:
        raise HubError("cannot upload while HF_HUB_OFFLINE is set", where=repo, hint="unset it")
    api = hub_api()
    with upload_errors(repo):
        try:
            whoami = retry(api.whoami)
        except LocalTokenNotFoundError:
            raise HubError("uploading needs a token, but none is set", where=repo, hint=LOGIN_HINT) from None
        user = str(whoami["name"])
        if not create_pr:
            _check_role(whoami, repo)
        try:
            retry(lambda: api.auth_check(repo, write=not create_pr))
            private = bool(retry(lambda: api.model_info(repo)).private)
        except RepositoryNotFoundError as error:
            if create_pr or isinstance(error, GatedRepoError):
                raise
            _check_namespace(whoami, repo)
            return Access(repo, user, exists=False, private=None)
    return Access(repo, user, exists=True, private=private)


def _check_role(whoami: Mapping[str, Any], repo: str) -> None:
    token = (whoami.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError("the token is read-only", where=repo, hint=f"use a token with write access: {LOGIN_HINT}")


def _check_namespace(whoami: Mapping[str, Any], repo: str) -> None:
    owner, user = repo.partition("/")[0], str(whoami["name"])
    orgs = [str(org["name"]) for org in whoami.get("orgs") or () if org.get("roleInOrg") != "read"]
    if owner.lower() not in {name.lower() for name in (user, *orgs)}:
        raise HubError(
            f"no such model, and {user} may create models only under {some([user, *orgs])}",
            where=repo,
            hint="check the name",
        )


def branch_head(repo: str, revision: str) -> str | None:
    """Return the commit of a branch or of a pull request (`refs/pr/1`); None if the branch does not exist.

    Raises:
        HubError: The Hub refuses to list the branches, or cannot be reached.
        UsageError: `revision` is a tag or a commit, which cannot be written to.
    """
    with upload_errors(repo, revision):
        refs = retry(lambda: hub_api().list_repo_refs(repo, include_pull_requests=True))
        heads = {ref.name: ref.target_commit for ref in refs.branches}
        heads |= {ref.ref: ref.target_commit for ref in refs.pull_requests or ()}
        tags = {ref.name for ref in refs.tags}
    if revision not in heads and (revision in tags or is_commit(revision)):
        kind = "a tag" if revision in tags else "a commit"
        raise UsageError(f"cannot upload to {revision}: it is {kind}, expected a branch")
    return heads.get(revision)


def list_files(repo: str, revision: str | None) -> RemoteFiles:
    """Return the top-level files of a commit, and its additional chat templates.

    Raises:
        HubError: The Hub refuses to list the files, or cannot be reached.
    """
    if revision is None:
        return RemoteFiles(None, {})
    from huggingface_hub.hf_api import RepoFile

    with upload_errors(repo, revision):
        files = {
            item.path: RemoteFile(item.size, item.blob_id, None if item.lfs is None else item.lfs.sha256)
            for item in hub_api().list_repo_tree(repo, recursive=True, revision=revision)
            if isinstance(item, RepoFile) and ("/" not in item.path or is_template(item.path))
        }
    return RemoteFiles(revision, files)


def read_text(repo: str, revision: str, name: str) -> str:
    """Return the text of a small file of a commit.

    Raises:
        HubError: The Hub does not return the file, or it is not UTF-8.
    """
    with upload_errors(repo, revision):
        path = hub_api().hf_hub_download(repo, name, revision=revision, tqdm_class=silent_bar())
        with open(path, "rb") as file:  # noqa: PTH123 - the client returns a string
            data = file.read()
    try:
        return data.decode()
    except UnicodeDecodeError:
        hint = "use --card replace for a new card, or --card keep to leave it" if name == CARD_FILE else "fix it"
        raise HubError(f"{name} is not UTF-8", where=repo, hint=hint) from None


def outdated_files(repo: str, remote: RemoteFiles, files: Sequence[LocalFile]) -> list[str]:
    """Return the files that the remote manifest lists, from an earlier upload, and that the folder no longer has.

    They must be removed: a loader might prefer old weights to the new ones.

    Raises:
        HubError: The model has weights that no manifest lists, or the Hub does not return the manifest.
    """
    ours = {file.name for file in files}
    others = sorted(name for name in remote.files if name not in ours and not name.startswith("."))
    listed: set[str] = set()
    if remote.revision is not None and MANIFEST_FILE in remote.files and others:
        listed = _listed(read_text(repo, remote.revision, MANIFEST_FILE))
    # If the folder has no manifest, the old one must go too: it would describe other files than those that are sent.
    listed = listed - {CARD_FILE} | {MANIFEST_FILE}
    weights = [name for name in others if name not in listed and name.endswith(WEIGHTS)]
    if weights:
        raise HubError(
            f"has weights of another model, which would be loaded: {some(weights)}",
            where=repo,
            hint="delete them on the Hub, or choose another name or --revision",
        )
    return [name for name in others if name in listed]


def _listed(manifest: str) -> set[str]:
    """Return the file names in a remote manifest; nothing else in it is trusted."""
    try:
        files = json.loads(manifest).get("files")
    except (ValueError, AttributeError, RecursionError):
        return set()
    names = files if isinstance(files, dict) else {}
    return {name for name in names if is_sent_name(name)}
