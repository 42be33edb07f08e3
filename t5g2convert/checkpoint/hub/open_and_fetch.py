"""Checkpoints on the Hub: headers are read remotely, and only the needed files are downloaded to the cache.

huggingface_hub makes all downloads, with its cache and its settings: HF_TOKEN, HF_HOME, HF_ENDPOINT, HF_HUB_OFFLINE.
"""

import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.file_names import ADAPTER_FILE
from t5g2convert.checkpoint.file_store import HubFile, HubOrigin, folders_of, is_repo_id, listed, regular_file
from t5g2convert.checkpoint.folder import (
    Checkpoint,
    found_in,
    open_checkpoint,
    read_checkpoint,
    read_json_object,
    refuse_unheld,
)
from t5g2convert.checkpoint.header import read_header
from t5g2convert.checkpoint.hub.hub_errors import OFFLINE_HINT, hub_errors
from t5g2convert.checkpoint.hub.range_requests import read_remote_range
from t5g2convert.checkpoint.hub.snapshot import (
    Repository,
    Snapshot,
    download,
    download_again,
    hub_api,
    silent_bar,
)
from t5g2convert.checkpoint.tokenizer.chat_templates import TEMPLATES_FOLDER, is_template
from t5g2convert.errors import CheckpointError, HubError, OutputError, UsageError
from t5g2convert.progress import Progress

Origin = str | Path | Checkpoint
"""The origin of a checkpoint: a folder, a model on the Hub (as a str), or an open checkpoint."""

_ID: Final = re.compile(r"([^\s@]+)(?:@([^\s@]+))?")


@dataclass(frozen=True, slots=True)
class HubId:
    """A model on the Hub, `org/name`, and optionally a branch, tag or commit."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def parse_id(text: str) -> HubId | None:
    """Parse org/name[@revision]; return None for anything else, and for a path that exists."""
    found = _ID.fullmatch(text)
    if found is None or not is_repo_id(found[1]) or os.path.lexists(text):
        return None
    return HubId(found[1], found[2])


def given_folders(*sources: Origin | None) -> list[Path]:
    """Return the origins that are folders, without opening them."""
    for source in sources:
        _check_given(source)
    paths = (source.path if isinstance(source, Checkpoint) else source for source in sources if source is not None)
    return [Path(path) for path in paths if isinstance(path, Path) or parse_id(path) is None]


def _check_given(source: Origin | None) -> None:
    """Refuse an empty name, which would mean the current folder.

    Raises:
        UsageError: The name is empty.
    """
    if isinstance(source, str) and not source.strip():
        raise UsageError("the source is empty, expected a folder or a model on the Hub")


def open_source(source: Origin, *, allow_unheld: bool = False) -> Checkpoint:
    """Open a checkpoint; read only its config and headers.

    Args:
        source: A folder, or as a str also a model on the Hub, org/name[@revision]; an open checkpoint is returned
            unchanged.
        allow_unheld: Accept an index with tensors that no shard holds; the caller checks `Checkpoint.unheld`.

    Raises:
        CheckpointError: The checkpoint is not valid; see `open_checkpoint`.
        HubError: The model does not exist, access is denied, or the Hub cannot be reached.
        OutputError: The Hub's cache cannot be written.
    """
    checkpoint = _opened(source)
    if not allow_unheld:
        refuse_unheld(checkpoint)
    return checkpoint


def _opened(source: Origin) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    _check_given(source)
    hub_id = parse_id(source) if isinstance(source, str) else None
    if hub_id is None:
        return open_checkpoint(Path(source), allow_unheld=True)
    from huggingface_hub import constants

    return _open_cached(hub_id) if constants.HF_HUB_OFFLINE else _open_online(hub_id)


def again(checkpoint: Checkpoint) -> Path | Checkpoint:
    """Return an origin that reopens a checkpoint: the folder, or the same commit on the Hub."""
    return checkpoint.path if checkpoint.hub is None else checkpoint


def missing(checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
    """Return the files that are on the Hub but not yet in its cache."""
    if checkpoint.hub is None:
        return []
    return [name for name in dict.fromkeys(names) if not (checkpoint.path / name).exists()]


def size_of(checkpoint: Checkpoint, names: Iterable[str]) -> int:
    """Return the size in bytes of files on the Hub; 0 for a folder."""
    return sum(checkpoint.hub.files[name].size for name in names) if checkpoint.hub is not None else 0


def fetch(checkpoint: Checkpoint, names: Iterable[str], *, progress: Progress | None = None) -> Checkpoint:
    """Fetch files of a checkpoint into `checkpoint.path`.

    Args:
        checkpoint: A checkpoint; if it is in a local folder, it is returned unchanged.
        names: The files that will be read. They come from the commit that was opened; files already in the cache are
            not requested again.
        progress: Called with the number of bytes just downloaded.

    Returns:
        The checkpoint, with the identities of the files that are now on this machine.

    Raises:
        CheckpointError: A file's header differs from the one read on the Hub.
        HubError: The Hub refuses a file, cannot be reached, or is disabled (HF_HUB_OFFLINE).
        OutputError: The disk of the cache is too full or fails.
    """
    hub = checkpoint.hub
    if hub is None:
        return checkpoint
    wanted = list(dict.fromkeys(names))
    absent = missing(checkpoint, wanted)
    _check_room(checkpoint, size_of(checkpoint, absent))
    for name in absent:
        download(hub, name, progress)
    headers = {name: read_header(regular_file(checkpoint.path / name)) for name in wanted if name in checkpoint.files}
    for name, header in headers.items():
        planned = checkpoint.files[name]
        if (header.identity.size, header.tensors, header.metadata) != (
            planned.identity.size,
            planned.tensors,
            planned.metadata,
        ):
            raise CheckpointError(
                "has a different header than on the Hub",
                where=checkpoint.path / name,
                hint=download_again(checkpoint.path / name),
            )
    return replace(checkpoint, files={**checkpoint.files, **headers})


def read_held(checkpoint: Checkpoint, name: str) -> dict[str, Any] | None:
    """Read a JSON file of a checkpoint, from the Hub if necessary; return None if it does not exist.

    Raises:
        CheckpointError: The file is not JSON, or not a regular file.
        HubError: The Hub refuses the file, or cannot be reached.
    """
    if not checkpoint.holds(name):
        return None
    fetch(checkpoint, [name])
    return read_json_object(checkpoint.path / name)


def read_range(checkpoint: Checkpoint, name: str, start: int, end: int) -> bytes:
    """Read bytes `start` to `end` of a checkpoint's file, without fetching the rest of it from the Hub.

    Raises:
        CheckpointError: The file cannot be read, or ends too early.
        HubError: The Hub refuses it, or cannot be reached.
    """
    path, hub = checkpoint.path / name, checkpoint.hub
    if hub is not None and not path.exists():
        return read_remote_range(hub.repo, hub.revision, name, hub.files[name].size, start, end)
    try:
        with regular_file(path).open("rb") as file:
            data = os.pread(file.fileno(), end - start, start)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
    if len(data) != end - start:
        raise CheckpointError("was truncated while it was read", where=path)
    return data


def _check_room(checkpoint: Checkpoint, need: int) -> None:
    """Refuse a download if the disk of the cache has too little space."""
    have = shutil.disk_usage(checkpoint.path).free
    if have < need:
        raise OutputError(
            f"the disk of the Hub's cache has {have:,} bytes free, the download needs {need:,}",
            where=checkpoint.path,
            hint="set HF_HOME to move the cache",
        )


def _open_online(hub_id: HubId) -> Checkpoint:
    """Open a model online: find the commit, fetch its small files, and read the headers of its weights."""
    # A branch may move between two requests. Or the Hub fails at the second one, and its client falls back on a commit
    # that was fetched earlier.
    place = _pinned(hub_id) or _pinned(hub_id)
    if place is None:
        raise HubError("the commit of the branch is unknown", where=str(hub_id), hint="try again, or pass a commit")
    place.fetch_small()
    return read_checkpoint(place, place.hub)


def _pinned(hub_id: HubId) -> Repository | None:
    """Find the commit and fetch its config.json; return None if the branch moved meanwhile."""
    from huggingface_hub import constants

    api, config = hub_api(), "config.json"
    with hub_errors(hub_id.repo, hub_id.revision, absent="no such folder, and no such model on the Hub"):
        info = api.model_info(
            hub_id.repo,
            revision=hub_id.revision,
            files_metadata=True,
            timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT,
        )
        files, paths = _listed(info.siblings), folders_of(item.rfilename for item in info.siblings or ())
    if config not in files:
        raise _no_model(HubOrigin(hub_id.repo, info.sha or "main", files, paths), str(hub_id))
    with hub_errors(hub_id.repo, hub_id.revision):
        # Request it by the name of the revision: the client caches the name for a later run offline.
        path = api.hf_hub_download(hub_id.repo, config, revision=hub_id.revision, tqdm_class=silent_bar())
        snapshot = Path(path).parent
    return (
        Repository(snapshot, HubOrigin(hub_id.repo, snapshot.name, files, paths)) if snapshot.name == info.sha else None
    )


def _no_model(hub: HubOrigin, where: str) -> CheckpointError:
    """Return the error for a model on the Hub without a config.json."""
    folder = None
    if ADAPTER_FILE in hub.files:
        with hub_errors(hub.repo, hub.revision):
            folder = Path(download(hub, ADAPTER_FILE)).parent
    found = found_in(hub.paths, folder, hub)
    if found is None:
        return CheckpointError("has no config.json", where=where, hint="check that it is a safetensors model")
    return CheckpointError(found.what, where=where, hint=found.step)


def _listed(siblings: Iterable[Any] | None) -> dict[str, HubFile]:
    """Return the files at the top level of a model and its additional chat templates, from `model_info`."""
    return {
        item.rfilename: HubFile(int(item.size), None if item.lfs is None else item.lfs.sha256)
        for item in siblings or ()
        if "/" not in item.rfilename or is_template(item.rfilename)
    }


def _open_cached(hub_id: HubId) -> Checkpoint:
    """Open a model offline, from the cache."""
    from huggingface_hub import try_to_load_from_cache

    with hub_errors(hub_id.repo, hub_id.revision):
        config = try_to_load_from_cache(hub_id.repo, "config.json", revision=hub_id.revision)
    if not isinstance(config, str):
        raise HubError(
            "no such folder, HF_HUB_OFFLINE is set, and the Hub's cache has no such model",
            where=str(hub_id),
            hint=OFFLINE_HINT,
        )
    snapshot = Path(config).parent
    names = [name for name in listed(snapshot) if not name.endswith("/")]
    if (snapshot / TEMPLATES_FOLDER).is_dir():
        names += filter(is_template, (f"{TEMPLATES_FOLDER}{name}" for name in listed(snapshot / TEMPLATES_FOLDER)))
    files = {name: HubFile(regular_file(snapshot / name).stat().st_size, None) for name in names}
    origin = HubOrigin(hub_id.repo, snapshot.name, files)
    return read_checkpoint(Snapshot(snapshot, origin), origin)
