"""Retries of requests to the Hub, and the errors of an upload.

huggingface_hub itself retries listing a tree, requesting upload modes and sending data. It does not retry the other
requests: the token's user, access, references, the creation of a model or a branch, and the commit.
"""

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from t5g2convert.checkpoint.hub.hub_errors import LOGIN_HINT, hub_errors, transport_error
from t5g2convert.errors import CheckpointError, HubError, T5g2Error

WAITS: Final = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts, unless the Hub requests a longer wait."""

LONGEST_WAIT: Final = 300.0
"""The longest wait that the Hub may request, in seconds: its rate limits use windows of five minutes."""

AGAIN_HINT: Final = "run again: only missing files are sent"
BUSY: Final = frozenset({408, 429, 500, 502, 503, 504})

Answer = TypeVar("Answer")


def retry(call: Callable[[], Answer], *, when: Callable[[Exception], bool] | None = None) -> Answer:
    """Make a request, and retry it while the Hub is busy or cuts the connection.

    Args:
        call: The request; it must be safe to repeat.
        when: Returns whether to retry after an error; `is_transient` by default.

    Raises:
        Exception: The error of the last attempt.
    """
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            asked = _asked_wait(error)
            if not (when or is_transient)(error) or asked > LONGEST_WAIT:
                raise
        time.sleep(max(wait, asked))
    return call()


def is_transient(error: Exception) -> bool:
    """Return whether an error may be temporary: the Hub is busy, or the connection was cut."""
    cause = _cause(error)
    # A gateway may respond with HTML where the client expects JSON.
    if isinstance(cause, json.JSONDecodeError):
        return True
    return isinstance(cause, transport_error()) and status_of(cause) in BUSY | {0}


def status_of(error: Exception) -> int:
    """Return the HTTP status of an error; 0 if there was no response."""
    status: int = getattr(getattr(error, "response", None), "status_code", 0)
    return status


def path_of(error: Exception) -> str:
    """Return the path of the request that failed; empty if the error does not contain it."""
    try:
        request: Any = getattr(error, "request", None)
    except RuntimeError:
        return ""
    return str(getattr(getattr(request, "url", None), "path", ""))


def _cause(error: Exception) -> Exception:
    """Return the cause of an error that itself only names the file being sent."""
    cause = error.__cause__ if isinstance(error, RuntimeError) else None
    return cause if isinstance(cause, Exception) else error


def _asked_wait(error: Exception) -> float:
    """Return the wait that the Hub requests, in seconds: Retry-After, or the rest of the rate limit's window."""
    from huggingface_hub.utils import parse_ratelimit_headers

    headers: Any = getattr(getattr(_cause(error), "response", None), "headers", {})
    retry_after = headers.get("retry-after") or ""
    if retry_after.isdecimal():
        return float(retry_after)
    limit = parse_ratelimit_headers(headers)
    return 0.0 if limit is None else float(limit.reset_in_seconds)


@contextmanager
def upload_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn errors of the Hub's client during a write into ours; see `hub_errors` for other errors."""
    with hub_errors(repo, revision):
        try:
            yield
        except T5g2Error:
            raise
        except Exception as error:  # noqa: BLE001 - every error is raised again, in our words or as it was
            cause = _cause(error)
            raise _explained(cause, repo) or cause from None


def _explained(error: Exception, repo: str) -> T5g2Error | None:
    """Return our error for failures that occur only in writes."""
    from huggingface_hub import errors

    status = status_of(error)
    if status == 412:
        return stale(repo)
    if status == 403 and not isinstance(error, errors.GatedRepoError | errors.DisabledRepoError):
        return HubError("the token does not have write access", where=repo, hint=f"use another token: {LOGIN_HINT}")
    if status == 409:
        return HubError("another change is in progress on the Hub", where=repo, hint=AGAIN_HINT)
    if status in {400, 413, 422}:
        return HubError(f"the Hub rejected the upload, with status {status}", where=repo, hint="check the name")
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        return HubError(
            "the Hub rejected the metadata of README.md", where=repo, hint="fix them, or use --card replace"
        )
    theirs = type(error).__module__.startswith("huggingface_hub") or isinstance(error, transport_error())
    if isinstance(error, OSError) and error.filename is not None and not theirs:
        return CheckpointError(f"cannot be read: {error.strerror}", where=str(error.filename))
    if isinstance(error, OSError | RuntimeError) and not theirs:
        # hf_xet, which sends the data, raises these errors.
        return HubError(f"sending the files failed ({type(error).__name__})", where=repo, hint=AGAIN_HINT)
    return None


def stale(repo: str) -> HubError:
    """Return the error for a commit that was made by someone else meanwhile."""
    return HubError(
        "has a new commit since the upload began: nothing was overwritten",
        where=repo,
        hint="check the commit, and run again",
    )
