"""Errors of the Hub and its client, turned into a `HubError`: one line and a hint, never a token.

The client's own messages are not repeated: they contain URLs, which may be signed.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from t5g2convert.errors import HubError, OutputError, T5g2Error
from t5g2convert.interrupts import raise_interruption

OFFLINE_HINT = "unset it to access the Hub"
LOGIN_HINT = "hf auth login, or set HF_TOKEN"

_CLIENTS: Final = frozenset({"aiohttp", "fsspec", "httpcore", "httpx", "requests", "urllib3"})
"""Network libraries: their errors contain URLs and texts from servers."""


@contextmanager
def hub_errors(repo: str, revision: str | None = None, *, absent: str = "no such model on the Hub") -> Iterator[None]:
    """Turn errors of the Hub's client inside the block into ours.

    Args:
        repo: The requested model, `org/name`.
        revision: The requested branch, tag or commit.
        absent: The message for a model that does not exist.

    Raises:
        HubError: The model does not exist, access is denied, or the Hub cannot be reached.
        OutputError: The client's cache cannot be written.
    """
    try:
        yield
    except T5g2Error:
        raise
    except (transport_error(), OSError, ValueError, LookupError, TypeError, RuntimeError) as error:
        raise_interruption()
        raise _explained(_cause(error), repo, revision, absent) from None


def network_error(error: BaseException, repo: str, *, absent: str) -> T5g2Error | None:
    """Return our error for the error of a library that reads from the Hub; None if neither Hub nor network caused it.

    Args:
        error: The library's error.
        repo: The requested data set or model.
        absent: The message for a data set or model that does not exist.
    """
    from huggingface_hub.errors import LocalEntryNotFoundError, OfflineModeIsEnabled

    for cause in _causes(error):
        if isinstance(cause, transport_error() | LocalEntryNotFoundError | OfflineModeIsEnabled):
            found = _explained(_cause(cause), repo, None, absent)
            if found.hint is not None and found.hint.startswith("try again"):
                found.hint = "try again"  # streamed data is not kept
            return found
        if isinstance(cause, ConnectionError | TimeoutError) or type(cause).__module__.partition(".")[0] in _CLIENTS:
            told = f"could not be read from {_host()} or from its file storage ({type(cause).__name__})"
            return _bad_token(repo) or HubError(told, where=repo, hint="try again")
    return None


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Return an error and its causes; the first error of the client itself is the most specific."""
    seen: list[BaseException] = []
    behind: BaseException | None = error
    while behind is not None and behind not in seen:
        seen.append(behind)
        yield behind
        behind = behind.__cause__ or behind.__context__


def without_token(text: str) -> str:
    """Return a library's text without the user's token, which it may contain."""
    token = _token()
    return text.replace(token, "***") if token else text


def transport_error() -> type[Exception]:
    """Return the base class of the HTTP client's errors, which depends on the version of huggingface_hub."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__bases__[0]
    return base


def _cause(error: BaseException) -> BaseException:
    """Return the cause of an error of the client's cache, which itself only says that a file is absent."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    cause = error.__cause__ if isinstance(error, LocalEntryNotFoundError) else None
    return error if cause is None else cause


def _explained(error: BaseException, repo: str, revision: str | None, absent: str) -> T5g2Error:
    from huggingface_hub import constants
    from huggingface_hub.errors import FileMetadataError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

    if (wrong := _bad_token(repo)) is not None:
        return wrong
    if isinstance(error, (OfflineModeIsEnabled, LocalEntryNotFoundError)):
        return HubError("HF_HUB_OFFLINE is set, and it is not in the Hub's cache", where=repo, hint=OFFLINE_HINT)
    if isinstance(error, HfHubHTTPError):
        return _refused(error, repo, revision, absent)
    if isinstance(error, FileMetadataError | ValueError | LookupError | TypeError):
        return HubError(f"{_host()} did not answer like the Hub", where=repo, hint="check HF_ENDPOINT")
    if isinstance(error, OSError) and error.errno is not None:
        return OutputError(
            f"the Hub's cache cannot be written: {error.strerror}",
            where=Path(constants.HF_HUB_CACHE),
            hint="set HF_HOME to move it",
        )
    name = type(error).__name__
    if "Timeout" in name:
        told = f"{_host()} did not answer in time ({name})"
    elif isinstance(error, transport_error()):
        told = f"{_host()} cannot be reached, or closed the connection ({name})"
    else:
        told = f"could not be downloaded from {_host()} ({name})"
    return HubError(told, where=repo, hint="try again: complete files are kept; HF_HUB_OFFLINE=1 uses only those")


def _refused(error: Exception, repo: str, revision: str | None, absent: str) -> HubError:
    """Return the error for a refused request: by the type of the client's error, else by its status."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", 0)
    known = _has_token()
    told, hint = f"{_host()} answered with status {status}", "try again later"
    match error:
        case errors.GatedRepoError():
            told = (
                "is gated, and the token's user does not have access" if known else "is gated, and no token was given"
            )
            hint = f"accept the terms at {endpoint()}/{repo}, then: {LOGIN_HINT}"
        case errors.RevisionNotFoundError():
            told, hint = f"has no revision {revision or 'main'!r}", "pass a branch, a tag or a commit after the @"
        case errors.RepositoryNotFoundError() if known:
            told = f"{absent}, or the token may not read it"
            hint = f"check the name; to use another token: {LOGIN_HINT}"
        case errors.RepositoryNotFoundError():
            told = f"{absent}, or it is private and no token was given"
            hint = f"check the name; for a private model: {LOGIN_HINT}"
        case errors.EntryNotFoundError():
            told, hint = "is missing a file that it lists", "try again"
        case _ if status == 401:
            told, hint = "the Hub rejected the token" if known else "the Hub requires a token", LOGIN_HINT
        case errors.DisabledRepoError():
            told, hint = "was disabled on the Hub", "choose another model"
        case _ if status == 403:
            told, hint = "the token may not read it", f"add the permission, or use another token: {LOGIN_HINT}"
        case _ if status == 429:
            told, hint = (
                f"{_host()} received too many requests",
                f"wait; the limit is higher with a token: {LOGIN_HINT}",
            )
    return HubError(told, where=repo, hint=hint)


def _has_token() -> bool:
    return bool(_token())


def _token() -> str | None:
    """Return the token that the client sends; None if there is none."""
    from huggingface_hub import get_token
    from huggingface_hub.errors import OIDCError

    try:
        return get_token()
    except (OIDCError, OSError, ValueError):
        return None


def _bad_token(repo: str) -> HubError | None:
    """Return an error if the token cannot be sent, which the client does not report; None if it can."""
    token = _token()
    if not token or re.fullmatch(r"[!-~]+", token):
        return None
    return HubError("the token has invalid characters", where=repo, hint=f"set it again: {LOGIN_HINT}")


def _host() -> str:
    """Return the Hub's host, without a password in HF_ENDPOINT."""
    from huggingface_hub import constants

    return urlsplit(constants.ENDPOINT).hostname or "the Hub"


def endpoint() -> str:
    """Return the Hub's URL, without a password in HF_ENDPOINT."""
    from huggingface_hub import constants

    parts = urlsplit(constants.ENDPOINT)
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}"
