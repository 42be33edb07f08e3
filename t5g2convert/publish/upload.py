"""Upload a finished folder to the Hub: one commit of what is missing there, and checksums before and after."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from t5g2convert.checkpoint.folder import some
from t5g2convert.checkpoint.hub.error_messages import endpoint
from t5g2convert.checkpoint.hub.snapshot import hub_api
from t5g2convert.errors import HubError, UsageError
from t5g2convert.publish.commit import make_commit, open_request, send_files
from t5g2convert.publish.repository import MAIN, check_access, head_of, read_remote
from t5g2convert.publish.retry import AGAIN_HINT, ask, upload_errors
from t5g2convert.publish.upload_plan import Plan, plan_upload

Told = Callable[[str], None]
"""Told in words what is being done."""


@dataclass(frozen=True, slots=True)
class Upload:
    """An upload that is done; or, with `dry_run`, that would be.

    Attributes:
        plan: What was to be done.
        dry_run: Nothing was done.
        commit: The commit with the files.
        pull_request: The number of the pull request.
    """

    plan: Plan
    dry_run: bool
    commit: str | None = None
    pull_request: int | None = None

    @property
    def url(self) -> str:
        """The page of the pull request, of the commit, or of the model."""
        page = f"{endpoint()}/{self.plan.access.repo}"
        if self.pull_request is not None:
            return f"{page}/discussions/{self.pull_request}"
        return page if self.commit is None else f"{page}/commit/{self.commit}"

    def to_json(self) -> dict[str, Any]:
        """What `t5g2 upload --json` prints."""
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
    told: Told | None = None,
) -> Upload:
    """Upload a folder that this tool wrote: the files of its manifest, the manifest, and the card.

    It may be run again after any failure: what is there already is not sent, and where all is there no commit is made.

    Args:
        folder: The folder; it may be one of the Hub's cache.
        repo: The model, `org/name`; it is created if it is not there.
        public: Create it public; it is private otherwise. A model that is there stays what it is.
        revision: The branch, which is made from main if it is not there; or refs/pr/1, a pull request that is.
        create_pr: Make a pull request to main.
        card: What becomes of README.md: `update`, `replace` or `keep`; see `model_card`.
        source_card: README.md of what the folder was made of, if it was no model of the Hub.
        start: The T5Gemma 2 that was trained, for a folder that was trained elsewhere and has no manifest: of that the
            files are sent which loaders read.
        dry_run: Change nothing, and tell what would be done.
        bars: Let the Hub's client show its progress on stderr.
        told: Told what is being done.

    Raises:
        CheckpointError: The folder is damaged, or holds links.
        HubError: The Hub refuses, cannot be reached, has another commit by now, or has other bytes afterwards.
        UsageError: An argument has no meaning.
    """
    if create_pr and revision not in (None, MAIN):
        raise UsageError("a pull request is made to main: give --create-pr or --revision, not both")
    tell = told or _silent
    tell("ask who may write")
    access = check_access(repo, create_pr=create_pr)
    with _quiet(bars) as warned:
        plan = plan_upload(
            folder,
            access,
            branch=revision or MAIN,
            card=card,
            source_card=source_card,
            public=public,
            start=start,
            tell=tell,
        )
        if dry_run:
            return Upload(plan, dry_run=True)
        if create_pr and plan.changes and (found := open_request(plan)) is not None:
            plan = replace(plan, send=frozenset(), remove=())
            return Upload(plan, dry_run=False, commit=found[1], pull_request=found[0])
        plan = _prepared(plan, public)
        if not plan.changes:
            return Upload(plan, dry_run=False, commit=plan.head)
        tell(f"send {len(plan.send)} file(s)")
        operations = send_files(plan, create_pr=create_pr)
        tell("make the commit")
        commit, number = make_commit(plan, operations, create_pr=create_pr)
        tell("compare the checksums")
        _check(plan, commit if number is None else f"refs/pr/{number}")
    notes = (*plan.notes, *(f"the Hub says of README.md: {text}" for text in warned))
    return Upload(replace(plan, notes=notes), dry_run=False, commit=commit, pull_request=number)


def _prepared(plan: Plan, public: bool) -> Plan:
    """Make the model and the branch, if they are not there; the plan with the commit that they start at."""
    api, access = hub_api(), plan.access
    if not access.exists:
        with upload_errors(access.repo):
            ask(lambda: api.create_repo(access.repo, private=not public, exist_ok=True))
            access = replace(access, private=bool(ask(lambda: api.model_info(access.repo)).private))
        plan = replace(plan, access=access, head=head_of(access.repo, MAIN))
    if plan.new_branch and plan.head is not None:
        with upload_errors(access.repo, plan.branch):
            ask(lambda: api.create_branch(access.repo, branch=plan.branch, revision=plan.head, exist_ok=True))
    return plan


def _check(plan: Plan, revision: str) -> None:
    """What the Hub has must be what is here."""
    there = read_remote(plan.access.repo, revision)
    wrong = [file.name for file in there.differing(plan.files)]
    if wrong:
        raise HubError(
            f"{revision} has other bytes than the folder: {some(wrong)}", where=plan.access.repo, hint=AGAIN_HINT
        )


@contextmanager
def _quiet(bars: bool) -> Iterator[list[str]]:
    """The Hub's client without progress bars, unless they are wanted; what it warns of is collected."""
    from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars

    were = are_progress_bars_disabled()
    said: list[str] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if not bars:
            disable_progress_bars()
        try:
            yield said
        finally:
            if not bars and not were:
                enable_progress_bars()
            said += [" ".join(str(item.message).split()) for item in caught if "README.md" in str(item.message)]


def _silent(what: str) -> None:
    """Nothing is shown."""
