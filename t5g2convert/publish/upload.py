"""Upload a folder to the Hub: one commit with the missing files; checksums are compared before and after.

huggingface_hub sends the data, skips data that its storage already has, and makes the commit. This module does the
rest: it sends only the files of the manifest, removes the files of an earlier upload, finds out whether a commit was
made if the response was lost, and compares the Hub's checksums with the local ones.
"""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from t5g2convert.checkpoint.folder import some
from t5g2convert.checkpoint.hub.hub_errors import endpoint
from t5g2convert.checkpoint.hub.snapshot import hub_api
from t5g2convert.errors import HubError, T5g2Error, UsageError
from t5g2convert.publish.repository import MAIN, branch_head, check_access, list_files
from t5g2convert.publish.retry import AGAIN_HINT, is_transient, path_of, retry, stale, status_of, upload_errors
from t5g2convert.publish.upload_plan import UploadPlan, plan_upload

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

MESSAGE: Final = "Upload with t5g2"


@dataclass(frozen=True, slots=True)
class Upload:
    """A finished upload; with `dry_run`, the upload that would be made.

    Attributes:
        plan: The plan of the upload.
        dry_run: Whether nothing was done.
        commit: The commit with the files.
        pull_request: The number of the pull request.
    """

    plan: UploadPlan
    dry_run: bool
    commit: str | None = None
    pull_request: int | None = None

    @property
    def url(self) -> str:
        """The page of the pull request, the commit, or the model."""
        page = f"{endpoint()}/{self.plan.access.repo}"
        if self.pull_request is not None:
            return f"{page}/discussions/{self.pull_request}"
        return page if self.commit is None else f"{page}/commit/{self.commit}"

    def to_json(self) -> dict[str, Any]:
        """Return what `t5g2 upload --json` prints."""
        plan = self.plan
        return {
            "repo": plan.access.repo,
            "revision": plan.branch,
            "created": not plan.access.exists,
            "private": plan.access.private,
            "dry_run": self.dry_run,
            "commit": self.commit,
            "pull_request": self.pull_request,
            "url": self.url,
            "bytes": plan.nbytes,
            "files": [
                {"name": file.name, "bytes": file.size, "sha256": file.sha256, "sent": file.name in plan.send}
                for file in plan.files
            ],
            "removed": list(plan.remove),
            "notes": list(plan.notes),
        }


def upload(
    folder: Path,
    repo: str,
    *,
    public: bool = False,
    revision: str | None = None,
    create_pr: bool = False,
    card: str = "update",
    source_card: str | None = None,
    start: Path | None = None,
    dry_run: bool = False,
    bars: bool = False,
    report: Callable[[str], None] | None = None,
) -> Upload:
    """Upload a folder: the files in its manifest, the manifest, and the card.

    It is safe to run this again after a failure: only missing files are sent, and without changes no commit is made.

    Args:
        folder: The folder; it may be a snapshot in the Hub's cache.
        repo: The model, `org/name`; it is created if it does not exist.
        public: Create the model public; the default is private. The visibility of an existing model does not change.
        revision: The branch, created from main if it does not exist; or `refs/pr/1` for an open pull request.
        create_pr: Make a pull request to main.
        card: The mode of `model_card`: `update`, `replace` or `keep`.
        source_card: The source's card, for a source that is not on the Hub.
        start: The T5Gemma 2 it was trained from, for a folder trained elsewhere, which has no manifest. The files that
            loaders read are then sent.
        dry_run: Change nothing, and return the upload that would be made.
        bars: Show the progress bars of the Hub's client on stderr.
        report: Called with a description of each step.

    Raises:
        CheckpointError: The folder is damaged, or contains links.
        HubError: The Hub refuses a request, cannot be reached, gets another commit meanwhile, or has other bytes
            afterwards.
        UsageError: An argument is not valid.

    Example:
        >>> upload(Path("t5gemma-2-4b-4b"), "me/t5gemma-2-4b-4b", dry_run=True).plan.nbytes
    """
    if create_pr and revision not in (None, MAIN):
        raise UsageError("use --create-pr or --revision, not both: a pull request goes to main")
    step = report or _ignore
    step("check access")
    access = check_access(repo, create_pr=create_pr)
    with _client_output(bars) as warned:
        plan = plan_upload(
            folder,
            access,
            branch=revision or MAIN,
            card=card,
            source_card=source_card,
            public=public,
            start=start,
            report=step,
        )
        if dry_run:
            return Upload(plan, dry_run=True)
        if create_pr and plan.changes and (found := _open_request(plan)) is not None:
            plan = replace(plan, send=frozenset(), remove=())
            return Upload(plan, dry_run=False, commit=found[0], pull_request=found[1])
        plan = _create(plan, public)
        if not plan.changes:
            return Upload(plan, dry_run=False, commit=plan.head)
        step(f"send {len(plan.send)} file(s)")
        operations = _send_data(plan, create_pr=create_pr)
        step("make the commit")
        commit, number = _make_commit(plan, operations, create_pr=create_pr)
        step("compare the checksums")
        _compare(plan, commit if number is None else f"refs/pr/{number}")
    notes = (*plan.notes, *(f"the Hub reports about README.md: {text}" for text in warned))
    return Upload(replace(plan, notes=notes), dry_run=False, commit=commit, pull_request=number)


def _create(plan: UploadPlan, public: bool) -> UploadPlan:
    """Create the model and the branch if they do not exist; return the plan with the branch's first commit."""
    api, access = hub_api(), plan.access
    if not access.exists:
        with upload_errors(access.repo):
            retry(lambda: api.create_repo(access.repo, private=not public, exist_ok=True))
            access = replace(access, private=bool(retry(lambda: api.model_info(access.repo)).private))
        plan = replace(plan, access=access, head=branch_head(access.repo, MAIN))
    if plan.new_branch and plan.head is not None:
        with upload_errors(access.repo, plan.branch):
            retry(lambda: api.create_branch(access.repo, branch=plan.branch, revision=plan.head, exist_ok=True))
    return plan


def _send_data(plan: UploadPlan, *, create_pr: bool) -> "list[CommitOperationAdd | CommitOperationDelete]":
    """Send the data of large files, and return the operations of the commit."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo = plan.access.repo
    with upload_errors(repo, plan.branch):
        additions = [CommitOperationAdd(file.name, file.content) for file in plan.files if file.name in plan.send]
        # Without explicit rules, a .gitignore on the Hub would silently exclude files.
        _interruptible(
            lambda: hub_api().preupload_lfs_files(
                repo, additions, revision=plan.branch, create_pr=create_pr, free_memory=False, gitignore_content=""
            )
        )
    return [*additions, *(CommitOperationDelete(name, is_folder=False) for name in plan.remove)]


def _interruptible(call: Callable[[], None]) -> None:
    """Run a call in another thread, because hf_xet blocks Python's signal handlers while it waits for the network.

    After a signal the thread is abandoned; it ends with the process, and does not make a commit.
    """
    raised: list[Exception] = []

    def run() -> None:
        try:
            call()
        except Exception as error:  # noqa: BLE001 - raised again below
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join()
    if raised:
        raise raised[0]


def _make_commit(
    plan: UploadPlan, operations: "list[CommitOperationAdd | CommitOperationDelete]", *, create_pr: bool
) -> tuple[str, int | None]:
    """Make the commit; return it and the number of the pull request.

    The client sends a commit once. If the response is lost, the files on the Hub show whether the commit was made. If
    it was not, a commit to a branch is sent again: it names its parent, so it cannot be made twice. A pull request is
    not sent again.
    """
    repo, api = plan.access.repo, hub_api()

    def make() -> tuple[str, int | None]:
        try:
            made = api.create_commit(
                repo,
                operations,
                commit_message=MESSAGE,
                revision=plan.branch,
                parent_commit=plan.head,
                create_pr=create_pr,
            )
        except Exception as error:
            # A stale parent (412) may mean that our own commit was made.
            refused = 400 <= status_of(error) < 500 and status_of(error) != 412
            if refused or (found := _find_commit(plan, create_pr=create_pr)) is None:
                raise
            return found
        return made.oid, made.pr_num

    with upload_errors(repo, plan.branch):
        try:
            return retry(make, when=lambda error: is_transient(error) and not (create_pr and _may_be_made(error)))
        except Exception as error:
            if isinstance(error, T5g2Error) or not _may_be_made(error):
                raise
            raise _unknown(repo) from None


def _may_be_made(error: Exception) -> bool:
    """Return whether the commit may have been made despite an error."""
    return is_transient(error) and status_of(error) != 429 and not path_of(error).endswith("/validate-yaml")


def _find_commit(plan: UploadPlan, *, create_pr: bool) -> tuple[str, int | None] | None:
    """Return the commit if it was made although the response was lost; None if it was not made."""
    try:
        if create_pr:
            return _open_request(plan)
        head = branch_head(plan.access.repo, plan.branch)
        there = list_files(plan.access.repo, head)
    except T5g2Error:
        raise _unknown(plan.access.repo) from None
    if plan.is_done(there):
        return head or "", None
    if head != plan.head:
        raise stale(plan.access.repo)
    return None


def _unknown(repo: str) -> HubError:
    return HubError(
        "the Hub did not answer, so it is unknown whether the commit was made",
        where=repo,
        hint="running again is safe: only missing files are sent",
    )


def _open_request(plan: UploadPlan) -> tuple[str, int] | None:
    """Return the commit and number of an open pull request by the same user that has all files."""
    repo, api = plan.access.repo, hub_api()
    with upload_errors(repo):
        options = {"author": plan.access.user, "discussion_type": "pull_request", "discussion_status": "open"}
        found = retry(lambda: list(api.get_repo_discussions(repo, **options)))  # type: ignore[arg-type]
    for item in found:
        head = branch_head(repo, f"refs/pr/{item.num}")
        if head is not None and plan.is_done(list_files(repo, head)):
            return head, item.num
    return None


def _compare(plan: UploadPlan, revision: str) -> None:
    """Compare the files of a commit with the local hashes.

    Raises:
        HubError: Files are missing or differ.
    """
    differing = [file.name for file in list_files(plan.access.repo, revision).differing(plan.files)]
    if differing:
        raise HubError(
            f"{revision} differs from the folder: {some(differing)}", where=plan.access.repo, hint=AGAIN_HINT
        )


@contextmanager
def _client_output(bars: bool) -> Iterator[list[str]]:
    """Hide the progress bars of the Hub's client unless `bars`, and collect its warnings about the card."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were_disabled = are_progress_bars_disabled()
    collected: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not bars:
            disable_progress_bars()
        try:
            yield collected
        finally:
            if not bars and not were_disabled:
                enable_progress_bars()
            collected += [" ".join(str(item.message).split()) for item in caught if "README.md" in str(item.message)]


def _ignore(step: str) -> None:
    """Ignore a step."""
