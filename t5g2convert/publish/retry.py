"""Questions to the Hub that are asked again while it is busy, and what it says of uploads in our words."""

import json
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final, TypeVar

from t5g2convert.checkpoint.hub.error_messages import LOGIN_HINT, hub_errors, transport_error
from t5g2convert.errors import CheckpointError, HubError, T5g2Error

WAITS: Final = (1.0, 2.0, 4.0, 8.0)
"""Seconds between attempts, unless the Hub names them."""

LONGEST_WAIT: Final = 300.0
"""Seconds that the Hub may name: its limits count windows of five minutes."""

AGAIN_HINT: Final = "run again: only what is missing is sent"
BUSY: Final = frozenset({408, 429, 500, 502, 503, 504})

Answer = TypeVar("Answer")


def ask(call: Callable[[], Answer], *, again: Callable[[Exception], bool] | None = None) -> Answer:
    """Ask the Hub, and ask again while it is busy or cuts the connection.

    Args:
        call: What may be asked twice.
        again: Whether it may be asked again after an error; by default it may if the error passes.

    Raises:
        Whatever the last attempt raised.
    """
    may_ask = again or passes
    for wait in WAITS:
        try:
            return call()
        except Exception as error:
            named = _named_wait(error)
            if not may_ask(error) or named > LONGEST_WAIT:
                raise
        time.sleep(max(wait, named))
    return call()


def passes(error: Exception) -> bool:
    """Whether an error is one of the moment: the Hub is busy, or the connection was cut."""
    cause = cause_of(error)
    # A gateway answers in HTML, where the client expects JSON.
    if isinstance(cause, json.JSONDecodeError):
        return True
    return isinstance(cause, transport_error()) and status_of(cause) in BUSY | {0}


def cause_of(error: Exception) -> Exception:
    """What was behind an error that only says which file was being sent."""
    behind = error.__cause__ if isinstance(error, RuntimeError) else None
    return behind if isinstance(behind, Exception) else error


def status_of(error: Exception) -> int:
    """The status of the answer that an error tells of; 0 if there was none."""
    status: int = getattr(getattr(error, "response", None), "status_code", 0)
    return status


def path_of(error: Exception) -> str:
    """The path that was asked for; empty if the error does not tell."""
    try:
        asked: Any = getattr(error, "request", None)
    except RuntimeError:
        return ""
    return str(getattr(getattr(asked, "url", None), "path", ""))


def _named_wait(error: Exception) -> float:
    """Seconds that the Hub wants us to wait: Retry-After, or the rest of a window of requests."""
    headers: Any = getattr(getattr(cause_of(error), "response", None), "headers", {})
    found = re.fullmatch(r"\d+", headers.get("retry-after") or "") or re.search(
        r"(?<=;t=)\d+", headers.get("ratelimit") or ""
    )
    return float(found[0]) if found else 0.0


@contextmanager
def upload_errors(repo: str, revision: str | None = None) -> Iterator[None]:
    """Turn what the Hub's client raises while it writes into our errors; see `hub_errors`."""
    with hub_errors(repo, revision):
        try:
            yield
        except T5g2Error:
            raise
        except Exception as error:  # noqa: BLE001 - every one is raised again, in our words or as it was
            cause = cause_of(error)
            raise _explained(cause, repo) or cause from None


def _explained(error: Exception, repo: str) -> T5g2Error | None:
    """The error for what only happens to those who write."""
    from huggingface_hub import errors

    status = status_of(error)
    if status == 412:
        return stale(repo)
    if status == 403 and not isinstance(error, errors.GatedRepoError | errors.DisabledRepoError):
        return HubError("the token may not write to it", where=repo, hint=f"another token: {LOGIN_HINT}")
    if status == 409:
        return HubError("the Hub has another change at work", where=repo, hint=AGAIN_HINT)
    if status in {400, 413, 422}:
        return HubError(f"the Hub refuses what was sent, with status {status}", where=repo, hint="is the name right?")
    if isinstance(error, ValueError) and "metadata in README.md" in str(error):
        return HubError("the Hub refuses the metadata of README.md", where=repo, hint="mend it, or --card replace")
    ours = type(error).__module__.startswith("huggingface_hub") or isinstance(error, transport_error())
    if isinstance(error, OSError) and error.filename is not None and not ours:
        return CheckpointError(f"cannot be read: {error.strerror}", where=str(error.filename))
    if isinstance(error, OSError | RuntimeError) and not ours:
        # What hf_xet, which sends the files, raises.
        return HubError(f"the files could not be sent ({type(error).__name__})", where=repo, hint=AGAIN_HINT)
    return None


def stale(repo: str) -> HubError:
    """The error that somebody else has made a commit."""
    told = "has a commit that was not there when the upload began: nothing was overwritten"
    return HubError(told, where=repo, hint="look at it, and run again")
