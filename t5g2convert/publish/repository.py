"""The model of the Hub that is written to: who may, where its branch stands, and which files are there."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from t5g2convert.checkpoint.folder import some
from t5g2convert.checkpoint.hub.error_messages import LOGIN_HINT
from t5g2convert.checkpoint.hub.snapshot import hub_api, silent_bar
from t5g2convert.checkpoint.manifest import MANIFEST_FILE
from t5g2convert.checkpoint.tokenizer.chat_templates import is_template
from t5g2convert.errors import HubError, UsageError
from t5g2convert.publish.card import CARD_FILE
from t5g2convert.publish.retry import ask, upload_errors
from t5g2convert.publish.sent_files import LocalFile, is_sent_name

MAIN: Final = "main"
_NAME: Final = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.ASCII)
_SHA: Final = re.compile(r"[0-9a-f]{40}")
WEIGHTS: Final = (".safetensors", ".safetensors.index.json")


@dataclass(frozen=True, slots=True)
class Access:
    """Who may write to a model.

    Attributes:
        repo: The model, `org/name`.
        user: Whose token it is.
        exists: Whether the model is there already.
        private: Whether it is private; None where it is not there.
    """

    repo: str
    user: str
    exists: bool
    private: bool | None


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on the Hub: its size, git's name for it, and its sha256 if it is an LFS file."""

    size: int
    blob_id: str
    sha256: str | None

    def is_same(self, local: LocalFile) -> bool:
        """Whether it has the bytes of a file that is here."""
        if self.size != local.size:
            return False
        return self.sha256 == local.sha256 if self.sha256 is not None else local.is_blob(self.blob_id)


@dataclass(frozen=True, slots=True)
class Remote:
    """A commit of a model, by the name that it is asked for; of none, if the model has none."""

    revision: str | None
    files: Mapping[str, RemoteFile]

    def differing(self, files: Iterable[LocalFile]) -> list[LocalFile]:
        """Those of the files that are not there, or have other bytes there."""
        return [file for file in files if file.name not in self.files or not self.files[file.name].is_same(file)]


def check_name(repo: str) -> str:
    """The name of a model of the Hub.

    Raises:
        UsageError: It reads otherwise.
    """
    if _NAME.fullmatch(repo) is None or "--" in repo or ".." in repo or repo.endswith((".git", "-", ".")):
        # What was given may be an address with a token in it.
        raise UsageError("the model to write to is given by its name, as org/name")
    return repo


def check_access(repo: str, *, create_pr: bool = False) -> Access:
    """Make sure that the token may write to a model, or create it. Nothing is changed.

    Args:
        repo: The model, `org/name`.
        create_pr: A pull request is wanted, for which reading is enough.

    Raises:
        HubError: There is no token, the Hub does not accept it, it may not write, or the Hub cannot be reached.
        UsageError: `repo` is not the name of a model.
    """
    from huggingface_hub import constants
    from huggingface_hub.errors import GatedRepoError, LocalTokenNotFoundError, RepositoryNotFoundError

    check_name(repo)
    if constants.HF_HUB_OFFLINE:
        raise HubError("HF_HUB_OFFLINE is set: nothing can be uploaded", where=repo, hint="unset it")
    api = hub_api()
    with upload_errors(repo):
        try:
            told = ask(api.whoami)
        except LocalTokenNotFoundError:
            raise HubError("no token was given, and uploading needs one", where=repo, hint=LOGIN_HINT) from None
        user = str(told["name"])
        if not create_pr:
            _check_role(told, repo)
        try:
            ask(lambda: api.auth_check(repo, write=not create_pr))
            private = bool(ask(lambda: api.model_info(repo)).private)
        except RepositoryNotFoundError as error:
            if create_pr or isinstance(error, GatedRepoError):
                raise
            _check_namespace(told, repo)
            return Access(repo, user, exists=False, private=None)
    return Access(repo, user, exists=True, private=private)


def _check_role(told: Mapping[str, Any], repo: str) -> None:
    token = (told.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise HubError("the token may only read", where=repo, hint=f"give one that may write: {LOGIN_HINT}")


def _check_namespace(told: Mapping[str, Any], repo: str) -> None:
    owner, user = repo.partition("/")[0], str(told["name"])
    orgs = [str(org["name"]) for org in told.get("orgs") or () if org.get("roleInOrg") != "read"]
    if owner.lower() not in {name.lower() for name in (user, *orgs)}:
        where = f"{user} may have models under {some([user, *orgs])}"
        raise HubError(f"no such model, and it cannot be created: {where}", where=repo, hint="look at the name")


def head_of(repo: str, revision: str) -> str | None:
    """The commit of a branch, or of a pull request by its full name, refs/pr/1; None if there is no such one.

    Raises:
        HubError: The Hub does not tell.
        UsageError: It is a tag or a commit, to which nothing can be added.
    """
    with upload_errors(repo, revision):
        refs = ask(lambda: hub_api().list_repo_refs(repo, include_pull_requests=True))
        heads = {ref.name: ref.target_commit for ref in refs.branches}
        heads |= {ref.ref: ref.target_commit for ref in refs.pull_requests or ()}
        tags = {ref.name for ref in refs.tags}
    if revision not in heads and (revision in tags or _SHA.fullmatch(revision)):
        kind = "a tag" if revision in tags else "a commit"
        raise UsageError(f"{revision} is {kind}, to which nothing can be added; give a branch")
    return heads.get(revision)


def read_remote(repo: str, revision: str | None) -> Remote:
    """The files at the top level of a commit, and its further chat templates.

    Raises:
        HubError: The Hub does not tell.
    """
    if revision is None:
        return Remote(None, {})
    from huggingface_hub.hf_api import RepoFile

    # The client itself asks again.
    with upload_errors(repo, revision):
        tree = hub_api().list_repo_tree(repo, recursive=True, revision=revision)
        items = [item for item in tree if isinstance(item, RepoFile) and _is_looked_at(item.path)]
        files = {
            item.path: RemoteFile(item.size, item.blob_id, None if item.lfs is None else item.lfs.sha256)
            for item in items
        }
    return Remote(revision, files)


def _is_looked_at(path: str) -> bool:
    return "/" not in path or is_template(path)


def remote_text(repo: str, revision: str, name: str) -> str:
    """A small file of a commit.

    Raises:
        HubError: The Hub does not give it out, or it is no UTF-8.
    """
    with upload_errors(repo, revision):
        path = hub_api().hf_hub_download(repo, name, revision=revision, tqdm_class=silent_bar())
        with open(path, "rb") as file:  # noqa: PTH123 - a name that the client gives
            data = file.read()
    try:
        return data.decode()
    except UnicodeDecodeError:
        hint = "--card replace makes a new one, --card keep leaves it" if name == CARD_FILE else "mend it"
        raise HubError(f"{name} is not UTF-8", where=repo, hint=hint) from None


def left_over(repo: str, remote: Remote, files: Sequence[LocalFile]) -> list[str]:
    """Files of an earlier upload that the folder no longer has: those that the manifest there lists.

    A loader would take weights that were left there in place of the new ones.

    Raises:
        HubError: There are weights that no manifest lists, or the Hub does not tell.
    """
    ours = {file.name for file in files}
    strangers = sorted(name for name in remote.files if name not in ours and not name.startswith("."))
    listed: set[str] = set()
    if remote.revision is not None and MANIFEST_FILE in remote.files and strangers:
        listed = _listed(remote_text(repo, remote.revision, MANIFEST_FILE))
    left = [name for name in strangers if name in listed and name not in {CARD_FILE, MANIFEST_FILE}]
    # A manifest there tells of other files, where what is sent has none.
    left += [name for name in strangers if name == MANIFEST_FILE]
    weights = [name for name in strangers if name not in left and name.endswith(WEIGHTS)]
    if weights:
        raise HubError(
            f"has weights of another model, which a loader would take: {some(weights)}",
            where=repo,
            hint="remove them there, or choose another name or --revision",
        )
    return left


def _listed(manifest: str) -> set[str]:
    """The names in a manifest of which nothing else is believed."""
    try:
        files = json.loads(manifest).get("files")
    except (ValueError, AttributeError, RecursionError):
        return set()
    names = files if isinstance(files, dict) else {}
    return {name for name in names if is_sent_name(name)}
