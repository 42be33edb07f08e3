"""The commit of an upload: its large files first, then one request, and what became of it if no answer comes."""

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from t5g2convert.checkpoint.hub.snapshot import hub_api
from t5g2convert.errors import HubError, T5g2Error
from t5g2convert.publish.repository import Remote, head_of, read_remote
from t5g2convert.publish.retry import AGAIN_HINT, ask, passes, path_of, stale, status_of, upload_errors
from t5g2convert.publish.upload_plan import Plan

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

MESSAGE: Final = "Upload with t5g2"


def send_files(plan: Plan, *, create_pr: bool) -> "list[CommitOperationAdd | CommitOperationDelete]":
    """Send the large files; the operations of the commit that then names them."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    repo = plan.access.repo
    with upload_errors(repo, plan.branch):
        additions = [CommitOperationAdd(file.name, file.content) for file in plan.files if file.name in plan.send]
        # Without rules of its own here, a .gitignore on the Hub would have files left out in silence.
        _hearing_signals(
            lambda: hub_api().preupload_lfs_files(
                repo, additions, revision=plan.branch, create_pr=create_pr, free_memory=False, gitignore_content=""
            )
        )
    return [*additions, *(CommitOperationDelete(name, is_folder=False) for name in plan.remove)]


def _hearing_signals(call: Callable[[], None]) -> None:
    """Make a call in another thread: hf_xet lets Python hear no signal while it waits for the network.

    After a signal the thread is left behind; it ends with the process, and makes no commit.
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


def make_commit(
    plan: Plan, operations: "list[CommitOperationAdd | CommitOperationDelete]", *, create_pr: bool
) -> tuple[str, int | None]:
    """Make the commit; what it is called, and the number of the pull request.

    The client does not ask twice. If the answer is lost, what the Hub has tells whether there is a commit. To a branch
    it is sent again if there is none: its parent is named, so that there cannot be two. A pull request is not.
    """
    repo, api = plan.access.repo, hub_api()

    def make() -> tuple[str, int | None]:
        try:
            done = api.create_commit(
                repo,
                operations,
                commit_message=MESSAGE,
                revision=plan.branch,
                parent_commit=plan.head,
                create_pr=create_pr,
            )
        except Exception as error:
            if _is_refusal(error) or (found := _settled(plan, error, create_pr=create_pr)) is None:
                raise
            return found
        return done.oid, done.pr_num

    def may_repeat(error: Exception) -> bool:
        return passes(error) and not (create_pr and _is_ambiguous(error))

    with upload_errors(repo, plan.branch):
        try:
            return ask(make, again=may_repeat)
        except Exception as error:
            if isinstance(error, T5g2Error) or not _is_ambiguous(error):
                raise
            raise _unknown(repo) from None


def _is_refusal(error: Exception) -> bool:
    """Whether the Hub has answered that it does not do it; a stale parent may be our own commit."""
    return 400 <= status_of(error) < 500 and status_of(error) != 412


def _is_ambiguous(error: Exception) -> bool:
    """Whether a commit may have been made though the client knows of none."""
    return passes(error) and status_of(error) != 429 and not path_of(error).endswith("/validate-yaml")


def _settled(plan: Plan, error: Exception, *, create_pr: bool) -> tuple[str, int | None] | None:
    """The commit that was made though its answer was lost; None if there is none."""
    try:
        if create_pr:
            found = open_request(plan)
            return None if found is None else (found[1], found[0])
        head = head_of(plan.access.repo, plan.branch)
        there = read_remote(plan.access.repo, head)
    except T5g2Error:
        raise _unknown(plan.access.repo) from None
    if _is_all_there(plan, there):
        return head or "", None
    if head != plan.head:
        raise stale(plan.access.repo)
    return None


def _unknown(repo: str) -> HubError:
    told = "the Hub did not answer, and it is unknown whether the commit was made"
    return HubError(told, where=repo, hint=f"running again is safe: {AGAIN_HINT.partition(': ')[2]}")


def open_request(plan: Plan) -> tuple[int, str] | None:
    """An open pull request of the same user with all the files, and its commit."""
    repo, api = plan.access.repo, hub_api()
    with upload_errors(repo):
        options = {"author": plan.access.user, "discussion_type": "pull_request", "discussion_status": "open"}
        found = ask(lambda: list(api.get_repo_discussions(repo, **options)))  # type: ignore[arg-type]
    for item in found:
        revision = f"refs/pr/{item.num}"
        head = head_of(repo, revision)
        if head is not None and _is_all_there(plan, read_remote(repo, head)):
            return item.num, head
    return None


def _is_all_there(plan: Plan, remote: Remote) -> bool:
    return not remote.differing(plan.files) and not set(plan.remove) & remote.files.keys()
