"""Read headers and byte ranges of files on the Hub by range requests."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.header import Header, read_header_elsewhere
from t5g2convert.checkpoint.hub.hub_errors import hub_errors, transport_error
from t5g2convert.errors import HubError
from t5g2convert.version import __version__

FIRST_BYTES: Final = 100_000
"""Bytes of the first request: another request costs more than some thousand bytes more."""

ATTEMPTS: Final = 3
"""Attempts to read one range, since connections may be cut."""


def read_remote_header(repo: str, revision: str, name: str, size: int, path: Path) -> Header:
    """Read and check the header of a file on the Hub.

    Args:
        repo: The model, `org/name`.
        revision: The sha of the commit.
        name: The file.
        size: Its size in bytes, as the Hub lists it.
        path: Its future path in the cache.

    Raises:
        CheckpointError: The file is not a valid safetensors file.
        HubError: The Hub refuses the file, cannot be reached, or sends other bytes than it lists.
    """
    from huggingface_hub import hf_hub_url

    remote = _RemoteFile(repo, hf_hub_url(repo, name, revision=revision), size)
    return read_header_elsewhere(remote, size, path)


def read_remote_range(repo: str, revision: str, name: str, size: int, start: int, end: int) -> bytes:
    """Read the bytes of a file on the Hub from `start` to `end`; see `read_remote_header`.

    Raises:
        HubError: The Hub refuses it, cannot be reached, or sends other bytes than it lists.
    """
    from huggingface_hub import hf_hub_url

    return _RemoteFile(repo, hf_hub_url(repo, name, revision=revision), size, first=0)(end - start, start)


class _RemoteFile:
    """A file on the Hub, read like with `os.pread`: by a count and a position."""

    def __init__(self, repo: str, url: str, size: int, *, first: int = FIRST_BYTES) -> None:
        self._repo, self._url, self._size = repo, url, size
        self._start = self._get(0, min(first, size))

    def __call__(self, length: int, position: int) -> bytes:
        end = min(position + length, self._size)
        if end <= len(self._start):
            return self._start[position:end]
        return self._start[position:] + self._get(max(position, len(self._start)), end)

    def _get(self, start: int, end: int) -> bytes:
        if start >= end:
            return b""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with hub_errors(self._repo):
                    return self._request(start, end)
            except _CutError:
                if attempt == ATTEMPTS:
                    raise
        raise AssertionError("unreachable: the last attempt returns or raises")

    def _request(self, start: int, end: int) -> bytes:
        from huggingface_hub import constants
        from huggingface_hub.errors import HfHubHTTPError
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

        headers = build_hf_headers(library_name="t5g2convert", library_version=__version__)
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        # The client cannot retry after the response has begun, so broken connections are retried here.
        opened = http_stream_backoff(
            "GET",
            self._url,
            headers=headers,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
            retry_on_exceptions=(),
            max_retries=2,
        )
        try:
            with opened as response:
                hf_raise_for_status(response)
                self._check_range(response.status_code, response.headers, start)
                # A server without range support sends the whole file; stop reading after the bytes that are needed.
                skipped = 0 if response.status_code == 206 else start
                data = _first(response.iter_raw(), skipped + (end - start))
        except HfHubHTTPError:
            raise
        except transport_error() as error:
            raise _CutError(self._repo, type(error).__name__) from None
        if len(data) != skipped + (end - start):
            raise _CutError(self._repo, f"{len(data)} of {skipped + end - start} bytes")
        return data[skipped:]

    def _check_range(self, status: int, headers: Mapping[str, str], start: int) -> None:
        """Refuse a response with another file or another range."""
        if status == 206:
            told = headers.get("Content-Range", "")
            found = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", told)
            right = found is not None and int(found[1]) == start and found[2] in ("*", str(self._size))
        else:
            told = headers.get("Content-Length", str(self._size))
            right = told == str(self._size)
        if not right:
            raise HubError(
                f"answers with {told!r} for a file of {self._size} bytes", where=self._repo, hint="try again later"
            )


class _CutError(HubError):
    """A response that ended too early; the request is repeated."""

    def __init__(self, repo: str, told: str) -> None:
        super().__init__(
            f"the connection was closed while part of a file was read ({told})", where=repo, hint="try again"
        )


def _first(pieces: Iterator[bytes], count: int) -> bytes:
    """Return the first bytes of a response, without waiting for the rest."""
    data = bytearray()
    for piece in pieces:
        data += piece
        if len(data) >= count:
            break
    return bytes(data[:count])
