"""File stores for one commit on the Hub: online, or offline from the cache."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from t5g2convert.checkpoint.file_names import INDEX_FILE
from t5g2convert.checkpoint.file_store import Folder, HubOrigin, regular_file
from t5g2convert.checkpoint.header import Header, read_header
from t5g2convert.checkpoint.hub.hub_errors import OFFLINE_HINT, hub_errors
from t5g2convert.checkpoint.hub.range_requests import read_remote_header
from t5g2convert.errors import CheckpointError, HubError, T5g2Error
from t5g2convert.progress import Progress
from t5g2convert.version import __version__

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SMALL_BYTES: Final = 4_000_000
"""JSON files up to this size are fetched when a model is opened; tokenizer.json is larger."""

THREADS: Final = 8
"""Concurrent requests for headers and small files."""


@dataclass(frozen=True, slots=True)
class Repository:
    """A commit of a model on the Hub; cached files are read from the cache."""

    path: Path
    hub: HubOrigin

    def has(self, name: str) -> bool:
        """Return whether the commit has a file of that name."""
        return name in self.hub.files

    def names(self) -> Iterable[str]:
        """Return all files at the top level."""
        return self.hub.files

    def paths(self) -> frozenset[str]:
        """Return all files and folders."""
        return self.hub.paths

    def headers(self, names: Iterable[str]) -> Mapping[str, Header]:
        """Read the headers of safetensors files."""
        ordered = list(names)
        with ThreadPoolExecutor(THREADS) as pool:
            return dict(zip(ordered, pool.map(self._header, ordered), strict=True))

    def incomplete(self, reason: str, hint: str | None = None, *, missing: Sequence[str] = ()) -> T5g2Error:
        """Return the error for absent weights."""
        return CheckpointError(reason, where=self.hub.repo, hint=hint)

    def fetch_small(self) -> None:
        """Fetch the small JSON files."""
        small = [
            name
            for name, file in self.hub.files.items()
            if name == INDEX_FILE or (name.endswith(".json") and file.size <= SMALL_BYTES)
        ]
        with ThreadPoolExecutor(THREADS) as pool:
            list(pool.map(lambda name: download(self.hub, name), small))

    def _header(self, name: str) -> Header:
        file, path = self.hub.files.get(name), self.path / name
        if file is None:
            raise CheckpointError("is missing", where=f"{self.hub.repo}/{name}")
        if not path.exists():
            return read_remote_header(self.hub.repo, self.hub.revision, name, file.size, path)
        header = read_header(regular_file(path))
        if header.identity.size != file.size:
            raise CheckpointError(
                f"has {header.identity.size} bytes, the Hub's has {file.size}",
                where=path,
                hint=download_again(path),
            )
        return header


@dataclass(frozen=True, slots=True)
class Snapshot(Folder):
    """The cached files of a commit, for offline use; other files may be on the Hub."""

    hub: HubOrigin

    def headers(self, names: Iterable[str]) -> Mapping[str, Header]:
        """Read the headers of safetensors files."""
        ordered = list(names)
        absent = [name for name in ordered if not self.has(name)]
        if absent:
            raise self.incomplete(f"{', '.join(absent)} is missing", missing=absent)
        return Folder.headers(self, ordered)

    def incomplete(self, reason: str, hint: str | None = None, *, missing: Sequence[str] = ()) -> T5g2Error:
        """Return the error for absent weights."""
        hint = OFFLINE_HINT
        if missing:
            hint = f"HF_HUB_OFFLINE=0 hf download {self.hub.repo} {' '.join(missing)} --revision {self.hub.revision}"
        return HubError(
            f"HF_HUB_OFFLINE is set, and the model is incomplete in the Hub's cache: {reason}",
            where=self.path,
            hint=hint,
        )


def download(hub: HubOrigin, name: str, progress: Progress | None = None) -> str:
    """Fetch a file into the cache, unless it is already there, and return its path.

    Raises:
        HubError: The Hub refuses the file, or cannot be reached.
        OutputError: The cache cannot be written.
    """
    with hub_errors(hub.repo, hub.revision):
        return str(hub_api().hf_hub_download(hub.repo, name, revision=hub.revision, tqdm_class=silent_bar(progress)))


def hub_api() -> "HfApi":
    """Return the Hub's client, with the settings of the environment."""
    from huggingface_hub import HfApi

    return HfApi(library_name="t5g2convert", library_version=__version__)


def silent_bar(progress: Progress | None = None) -> type[Any]:
    """Return a progress bar for huggingface_hub that shows nothing and reports the number of bytes."""
    from huggingface_hub.utils import tqdm

    class Counter(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options["disable"] = True
            super().__init__(*args, **options)  # type: ignore[no-untyped-call]

        def update(self, n: float | None = 1) -> None:
            if progress is not None:
                progress(int(n or 0))

        def update_transfer(self, n: float | None = 1) -> None:
            """Ignore transferred bytes: the bytes of the resulting files are already counted."""

        def set_transfer_postfix_str(self, s: str = "", refresh: bool = True) -> None:
            """Ignore the transfer rate."""

    return Counter


def download_again(path: Path) -> str:
    """Return a hint for a damaged file in the Hub's cache, where the name is a symlink to the bytes."""
    return f"remove {path.resolve()} and run again: it is downloaded again"
