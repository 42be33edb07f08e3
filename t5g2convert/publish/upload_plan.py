"""What an upload would do: the files here, those there, and the difference."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.hub.snapshot import hub_api, silent_bar
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest
from t5g2convert.errors import HubError
from t5g2convert.publish.card import CARD_FILE, model_card
from t5g2convert.publish.repository import MAIN, Access, Remote, head_of, left_over, read_remote, remote_text
from t5g2convert.publish.retry import upload_errors
from t5g2convert.publish.sent_files import LocalFile, elsewhere_files, finished_files, local_card
from t5g2convert.publish.trained_elsewhere import read_elsewhere


@dataclass(frozen=True, slots=True)
class Plan:
    """What an upload would do.

    Attributes:
        access: Who may, and whether the model is there.
        branch: The branch that the files go to, or the one that a pull request is for.
        head: The commit that the branch was at; None if the model has none yet.
        new_branch: Whether the branch is to be made.
        files: All files.
        send: The names of those that are not there yet.
        remove: Files of an earlier upload that the folder no longer has.
        notes: What a user should know.
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
        """Bytes that are not there yet."""
        return sum(file.size for file in self.files if file.name in self.send)

    @property
    def changes(self) -> bool:
        """Whether a commit is to be made."""
        return bool(self.send or self.remove)


def plan_upload(
    folder: Path,
    access: Access,
    *,
    branch: str,
    card: str,
    source_card: str | None,
    public: bool,
    start: Path | None,
    tell: Callable[[str], None],
) -> Plan:
    """Compare what is here with what is there; every file is read, and nothing is changed.

    Args:
        folder: A folder that this tool wrote.
        access: Who may write to which model.
        branch: The branch that the files go to.
        card: What becomes of README.md; see `model_card`.
        source_card: README.md of what the folder was made of, if it was no model of the Hub.
        public: A new model is to be public.
        start: The T5Gemma 2 that was trained, for a folder that was trained elsewhere.
        tell: Told what is being done.

    Raises:
        CheckpointError: The folder is damaged, or holds links.
        HubError: The Hub does not tell what is there, or weights of another model are.
        UsageError: The branch is none, or `card` is unknown.
    """
    repo, head, new_branch = access.repo, None, False
    if access.exists:
        head = head_of(repo, branch)
        if head is None and branch.startswith("refs/"):
            raise HubError(f"has no revision {branch!r}", where=repo, hint="give a branch, or an open pull request")
        if head is None and branch != MAIN:
            head, new_branch = head_of(repo, MAIN), True
    if start is not None:
        read_elsewhere(folder, start)
    reading = finished_files if start is None else elsewhere_files
    files = reading(folder, lambda name: tell(f"read {name}"))
    remote = read_remote(repo, head)
    notes = list(_notes(access, public))
    if source_card is None and card != "keep":
        source_card = _source_card(folder if start is None else start, notes)
    files = (*files, *_card(folder, remote, repo, card, source_card, start, notes))
    remove = left_over(repo, remote, files)
    send = frozenset(file.name for file in remote.differing(files))
    new_branch = new_branch or (not access.exists and branch != MAIN)
    return Plan(access, branch, head, new_branch, files, send, tuple(remove), tuple(notes))


def _notes(access: Access, public: bool) -> Iterator[str]:
    if access.exists and access.private is False and not public:
        yield f"{access.repo} is public already, and stays so"
    if access.private and public:
        yield f"{access.repo} is private already, and stays so: --public is for new models"


def _card(
    folder: Path, remote: Remote, repo: str, mode: str, source_card: str | None, start: Path | None, notes: list[str]
) -> Iterator[LocalFile]:
    """README.md, if it is to be sent: that of the Hub or, where there is none, of the folder, and what we add."""
    here, there = local_card(folder), None
    if CARD_FILE in remote.files and remote.revision is not None and mode == "update":
        there = remote_text(repo, remote.revision, CARD_FILE)
    existing = here if CARD_FILE not in remote.files else there
    text = model_card(folder, repo=repo, source_card=source_card, existing=existing, mode=mode, start=start)
    if text is None and CARD_FILE not in remote.files:
        text = here
    if text is not None:
        yield LocalFile.of_text(CARD_FILE, text)
    if here is not None and here not in (text, there):
        notes.append("README.md of the folder is not sent as it is: the card is made of the Hub's or anew")


def _source_card(folder: Path, notes: list[str]) -> str | None:
    """README.md of the model of the Hub that the folder was made of; None, with a note, if it is not to be had."""
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
            # The Hub cannot be reached; a card without the license would be wrong.
            raise
        except (errors.EntryNotFoundError, errors.RepositoryNotFoundError, errors.RevisionNotFoundError):
            notes.append(f"{repo} shows no card: the license of what it was made of is not known")
            return None
