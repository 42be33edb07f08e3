"""The plan of an upload: the local files, the files on the Hub, and the difference."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from t5g2convert.checkpoint.card_seal import CARD_FILE
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.hub.snapshot import hub_api, silent_bar
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest
from t5g2convert.errors import HubError
from t5g2convert.publish.base_model import read_trained_elsewhere
from t5g2convert.publish.card import model_card
from t5g2convert.publish.repository import (
    MAIN,
    Access,
    RemoteFiles,
    branch_head,
    list_files,
    outdated_files,
    read_text,
)
from t5g2convert.publish.retry import upload_errors
from t5g2convert.publish.sent_files import LocalFile, local_card, manifest_files, trained_elsewhere_files


@dataclass(frozen=True, slots=True)
class UploadPlan:
    """The planned steps of an upload.

    Attributes:
        access: The model and the access to it.
        branch: The branch to upload to, or the target branch of the pull request.
        head: The commit of the branch; None if the model has none yet.
        new_branch: Whether the branch must be created.
        files: All files.
        send: The names of the files that are missing or differ on the Hub.
        remove: Files of an earlier upload that the folder no longer has.
        notes: Notes for the user.
    """

    access: Access
    branch: str
    head: str | None
    new_branch: bool
    files: tuple[LocalFile, ...]
    send: frozenset[str]
    remove: tuple[str, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes to send."""
        return sum(file.size for file in self.files if file.name in self.send)

    @property
    def changes(self) -> bool:
        """Whether a commit is needed."""
        return bool(self.send or self.remove)

    def is_done(self, remote: RemoteFiles) -> bool:
        """Return whether a commit has all files, and none of the files to remove."""
        return not remote.differing(self.files) and not set(self.remove) & remote.files.keys()


def plan_upload(
    folder: Path,
    access: Access,
    *,
    branch: str,
    card: str,
    source_card: str | None,
    public: bool,
    start: Path | None,
    report: Callable[[str], None],
) -> UploadPlan:
    """Compare a folder with the Hub; read every file, and change nothing.

    Args:
        folder: The folder.
        access: The model and the access to it.
        branch: The branch to upload to.
        card: The mode of `model_card`.
        source_card: The source's card; if None, it is downloaded if the source is a model on the Hub.
        public: Whether a new model will be public.
        start: The T5Gemma 2 it was trained from, for a folder trained elsewhere.
        report: Called with a description of each step.

    Raises:
        CheckpointError: The folder is damaged, or contains links.
        HubError: The Hub does not list its files, or has weights of another model.
        UsageError: `branch` is not a branch, or `card` is unknown.
    """
    repo, head, new_branch = access.repo, None, False
    if access.exists:
        head = branch_head(repo, branch)
        if head is None and branch.startswith("refs/"):
            raise HubError(f"has no revision {branch!r}", where=repo, hint="pass a branch, or an open pull request")
        if head is None and branch != MAIN:
            head, new_branch = branch_head(repo, MAIN), True
    if start is not None:
        read_trained_elsewhere(folder, start)
    read_files = manifest_files if start is None else trained_elsewhere_files
    files = read_files(folder, lambda name: report(f"read {name}"))
    remote = list_files(repo, head)
    notes = list(_visibility_notes(access, public))
    if source_card is None and card != "keep":
        source_card = _download_source_card(folder if start is None else start, notes)
    files = (*files, *_card(folder, remote, repo, card, source_card, start, notes))
    remove = outdated_files(repo, remote, files)
    send = frozenset(file.name for file in remote.differing(files))
    new_branch = new_branch or (not access.exists and branch != MAIN)
    return UploadPlan(access, branch, head, new_branch, files, send, tuple(remove), tuple(notes))


def _visibility_notes(access: Access, public: bool) -> Iterator[str]:
    if access.exists and access.private is False and not public:
        yield f"{access.repo} is already public, and stays public"
    if access.private and public:
        yield f"{access.repo} is already private, and stays private: --public is for new models"


def _card(
    folder: Path,
    remote: RemoteFiles,
    repo: str,
    mode: str,
    source_card: str | None,
    start: Path | None,
    notes: list[str],
) -> Iterator[LocalFile]:
    """Yield the README.md to send, if any: the Hub's card, or otherwise the folder's, with our section in it."""
    here, there = local_card(folder), None
    if CARD_FILE in remote.files and remote.revision is not None and mode == "update":
        there = read_text(repo, remote.revision, CARD_FILE)
    existing = here if CARD_FILE not in remote.files else there
    text = model_card(folder, repo=repo, source_card=source_card, existing=existing, mode=mode, start=start)
    if text is None and CARD_FILE not in remote.files:
        text = here
    if text is not None:
        yield LocalFile.of_text(CARD_FILE, text)
    if here is not None and here not in (text, there):
        notes.append("README.md in the folder is not sent unchanged: the card is built from the Hub's, or from scratch")


def _download_source_card(folder: Path, notes: list[str]) -> str | None:
    """Return the source's card if the source is a model on the Hub; None, with a note, if it is not available."""
    from huggingface_hub import errors

    if not is_there(folder / MANIFEST_FILE):
        return None
    source = read_manifest(folder).source.hub
    if source is None:
        return None
    repo, revision = source.repo, source.revision
    with upload_errors(repo, revision):
        try:
            path = Path(hub_api().hf_hub_download(repo, CARD_FILE, revision=revision, tqdm_class=silent_bar()))
            return path.read_text(encoding="utf-8", errors="replace")
        except errors.LocalEntryNotFoundError:
            # The Hub cannot be reached: do not write a card, since it would lack the license.
            raise
        except (errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            notes.append(f"the card of {repo} is not available, so the license of the source is not known")
            return None
