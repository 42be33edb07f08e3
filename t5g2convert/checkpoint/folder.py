"""A checkpoint folder: config.json, and one safetensors file or several with an index."""

import re
import stat
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from t5g2convert.checkpoint.file_names import ADAPTER_FILE, INDEX_FILE, SINGLE_FILE
from t5g2convert.checkpoint.file_store import FileStore, Folder, HubOrigin, is_there, regular_file
from t5g2convert.checkpoint.header import Header, TensorEntry
from t5g2convert.checkpoint.strictjson import is_text, parse_object
from t5g2convert.errors import CheckpointError

if TYPE_CHECKING:
    # Imported at run time only for errors, to save memory in a conversion.
    from t5g2convert.checkpoint.other_formats import Found

MAX_JSON_BYTES: Final = 8_000_000
"""Largest JSON file; Gemma's tokenizer_config.json has 1.2 MB. A parsed file may take 50 times its size."""

LARGE_JSON: Final = {"tokenizer.json": 100_000_000, INDEX_FILE: 64_000_000, "t5g2.json": 64_000_000}
"""Files that grow with the vocabulary or the number of tensors, with their limits in bytes."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """A tensor, and the name of the file in the folder that holds it."""

    file: str
    entry: TensorEntry


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """An open checkpoint: its config, and the headers of its weights, which agree with each other.

    Attributes:
        path: Its folder; for a model on the Hub, the folder in the Hub's cache to which files are fetched.
        config: config.json.
        config_text: The bytes of config.json.
        files: The headers of the safetensors files, by name.
        tensors: All tensors, by name.
        notes: Oddities that a user should know about.
        hub: The commit on the Hub that it was read from; None for a folder.
        unheld: Tensors that the index lists but no shard holds; see `refuse_unheld`.
    """

    path: Path
    config: Mapping[str, Any]
    config_text: bytes
    files: Mapping[str, Header]
    tensors: Mapping[str, StoredTensor]
    notes: tuple[str, ...]
    hub: HubOrigin | None = None
    unheld: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The name of the folder, or of the model on the Hub."""
        return self.path.resolve().name if self.hub is None else self.hub.repo

    def holds(self, name: str) -> bool:
        """Return whether the checkpoint has a file of that name, fetched or not.

        Raises:
            CheckpointError: It is a broken symlink or not a regular file, or the disk cannot be read.
        """
        return name in self.hub.files if self.hub is not None else is_there(self.path / name)

    @property
    def dtype(self) -> str:
        """The safetensors dtype of most of the tensors' bytes; F32 if there are none."""
        counted: Counter[str] = Counter()
        for tensor in self.tensors.values():
            counted[tensor.entry.dtype] += tensor.entry.nbytes
        return max(counted, key=lambda dtype: (counted[dtype], dtype), default="F32")

    @property
    def nbytes(self) -> int:
        """The size of all tensors in bytes."""
        return sum(tensor.entry.nbytes for tensor in self.tensors.values())


def open_checkpoint(path: Path, *, allow_unheld: bool = False) -> Checkpoint:
    """Open a checkpoint folder: read its config and all headers, but no tensors.

    ```python
    checkpoint = open_checkpoint(Path("gemma-3-270m"))
    checkpoint.tensors["model.norm.weight"].entry.shape
    ```

    Args:
        path: The folder.
        allow_unheld: Accept an index with tensors that no shard holds; the caller checks `unheld`.

    Raises:
        CheckpointError: It is not a folder, has no config or safetensors weights, or headers and index disagree.
    """
    check_folder(path)
    checkpoint = read_checkpoint(Folder(path))
    if not allow_unheld:
        refuse_unheld(checkpoint)
    return checkpoint


def refuse_unheld(checkpoint: Checkpoint, droppable: Collection[str] = ()) -> None:
    """Refuse an index with tensors that no shard holds.

    Args:
        checkpoint: The checkpoint.
        droppable: Tensors that may be absent, because a conversion drops them anyway.

    Raises:
        CheckpointError: Other tensors are absent.
    """
    if names := [name for name in checkpoint.unheld if name not in droppable]:
        raise CheckpointError(_no_shard_holds(names), where=checkpoint.path / INDEX_FILE)


def read_checkpoint(store: FileStore, hub: HubOrigin | None = None) -> Checkpoint:
    """Read the config and all headers of a checkpoint from a folder or the Hub; the caller checks `unheld`.

    Raises:
        CheckpointError: As `open_checkpoint`, except for tensors that the index lists but no shard holds.
    """
    path = store.path
    if not store.has(SINGLE_FILE) and not store.has(INDEX_FILE):
        from t5g2convert.checkpoint.other_formats import no_weights

        raise no_weights(store, hub)
    config_text = read_json_file(path / "config.json")
    config = parse_object(config_text, path / "config.json")
    names, index, notes = _weight_files(store)
    _check_preferred(store, config)
    files = store.headers(names)
    tensors: dict[str, StoredTensor] = {}
    for name, header in files.items():
        for entry in header.tensors.values():
            if entry.name in tensors:
                raise CheckpointError(
                    f"tensor {entry.name!r} is in {tensors[entry.name].file} and in {name}", where=path
                )
            tensors[entry.name] = StoredTensor(name, entry)
    unheld = () if index is None else _check_index(index, tensors, path / INDEX_FILE)
    return Checkpoint(path, config, config_text, files, tensors, notes, hub, unheld)


def scheme_of(path: Path) -> str | None:
    """Return the scheme (`https:`) of a URL passed as a path, and not the rest of it, which may contain a token."""
    found = re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+:(?=/)", str(path))
    return found[0] if found else None


def check_folder(path: Path) -> None:
    """Refuse a path that is not a folder.

    Raises:
        CheckpointError: The path is missing, a file or a URL, or cannot be read.
    """
    if scheme := scheme_of(path):
        message = f"expected a folder, got a URL ({scheme}//...)"
        raise CheckpointError(message, hint="pass a model on the Hub as org/name")
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:
        from t5g2convert.checkpoint.other_formats import spelling_hint

        if isinstance(error, FileNotFoundError):
            raise CheckpointError("no such folder", where=path, hint=spelling_hint(str(path))) from None
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise CheckpointError(f"cannot be read: {reason}", where=path, hint=spelling_hint("")) from None
    if not stat.S_ISDIR(mode):
        from t5g2convert.checkpoint.other_formats import recognise_file

        found = recognise_file(path)
        raise CheckpointError(found.what, where=path, hint=found.step)


def read_json_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        CheckpointError: The file is missing, too large, not JSON, or does not hold an object.
    """
    return parse_object(read_json_file(path), path)


def read_json_file(path: Path) -> bytes:
    """Return the bytes of a JSON file that is small enough to parse.

    Raises:
        CheckpointError: The file is missing, too large, or cannot be read.
    """
    limit = LARGE_JSON.get(path.name, MAX_JSON_BYTES)
    try:
        if regular_file(path).stat().st_size > limit:
            raise CheckpointError(f"is larger than {limit} bytes", where=path)
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None


def read_json_if_there(folder: Path, name: str) -> dict[str, Any]:
    """Return the JSON object in a file of a folder; an empty one if the file is missing."""
    return read_json_object(folder / name) if is_there(folder / name) else {}


def some(names: Iterable[str], limit: int = 5) -> str:
    """Return the first few names and the count of the rest, for an error message.

    >>> some(["c", "a", "b"], limit=2)
    'a, b and 1 more'
    """
    ordered = sorted(names)
    shown = ", ".join(ordered[:limit])
    return shown if len(ordered) <= limit else f"{shown} and {len(ordered) - limit} more"


def _weight_files(store: FileStore) -> tuple[list[str], dict[str, str] | None, tuple[str, ...]]:
    """Return the safetensors files to read, the index if it is used, and notes."""
    has_single = store.has(SINGLE_FILE)
    if not store.has(INDEX_FILE):
        return [SINGLE_FILE], None, ()
    index = _read_index(store.path / INDEX_FILE)
    shards = sorted(set(index.values()))
    if SINGLE_FILE in shards and len(shards) > 1:
        raise CheckpointError(
            f"{INDEX_FILE} names {SINGLE_FILE} and {len(shards) - 1} more: transformers reads only {SINGLE_FILE}",
            where=store.path,
            hint="rename the shards, and update the index",
        )
    if not has_single or SINGLE_FILE in shards:
        absent = [name for name in shards if not store.has(name)]
        if len(absent) > 1:
            raise store.incomplete(f"{INDEX_FILE} names files that are missing: {some(absent)}", missing=absent)
        return shards, index, ()
    present = [name for name in shards if store.has(name)]
    if present:
        raise CheckpointError(
            f"has both {SINGLE_FILE} and shards that its index lists ({some(present)})",
            where=store.path,
            hint="remove the outdated ones",
        )
    return [SINGLE_FILE], None, (f"{INDEX_FILE} was ignored: all files it lists are missing",)


def found_in(paths: Collection[str], path: Path | None, hub: HubOrigin | None = None) -> "Found | None":
    """Recognise the format of a folder, or a model on the Hub, without a safetensors checkpoint.

    Args:
        paths: Its contents; see `FileStore.paths`.
        path: The local folder with its JSON files; None if they are not on this machine.
        hub: The commit on the Hub, for a model on the Hub.

    Returns:
        The format and what to do; None if the format is unknown.
    """

    def read(name: str) -> Mapping[str, Any] | None:
        return None if path is None else _read_beside(path / name)

    from t5g2convert.checkpoint.other_formats import Found, recognise

    if hub is None:
        return recognise(paths, str(path), read)
    found = recognise(paths, "FOLDER", read)
    if found is None or "FOLDER" not in found.step:
        return found
    return Found(found.what, f"hf download {hub.repo} --local-dir FOLDER, then {found.step}")


def _read_beside(path: Path) -> Mapping[str, Any] | None:
    try:
        return read_json_object(path)
    except CheckpointError:
        return None


def _check_preferred(store: FileStore, config: Mapping[str, Any]) -> None:
    """Refuse files that a loader would read instead of, or in addition to, the weights and the config.

    Raises:
        CheckpointError: transformers would load another model.
    """
    if store.has(ADAPTER_FILE):
        from t5g2convert.checkpoint.other_formats import adapter_beside

        found = adapter_beside(lambda name: _read_beside(store.path / name))
        raise CheckpointError(found.what, where=store.path, hint=found.step)
    where = store.path / "config.json"
    named = config.get("transformers_weights")
    if named not in (None, SINGLE_FILE, INDEX_FILE):
        raise CheckpointError(
            f"transformers_weights names {named!r}: transformers reads only that file",
            where=where,
            hint=f"rename it to {SINGLE_FILE}, and remove the key",
        )
    versions = config.get("configuration_files")
    if isinstance(versions, list) and (others := [name for name in versions if name != "config.json"]):
        raise CheckpointError(
            f"configuration_files names {some(map(str, others))}: transformers reads the one for its own version",
            where=where,
            hint="rename the right one to config.json, and remove the key",
        )


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_json_object(path).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError("has no weight_map", where=path)
    for tensor, shard in weight_map.items():
        if not isinstance(shard, str) or not is_plain_name(shard) or not is_text(shard):
            raise CheckpointError(
                f"{tensor!r} points to {shard!r}, expected the name of a file next to the index", where=path
            )
    return weight_map


def is_plain_name(name: str) -> bool:
    """Return whether a name is a plain file name, not a path."""
    return name not in {"", ".", ".."} and not any(character in name for character in "/\\\0")


def _check_index(index: Mapping[str, str], tensors: Mapping[str, StoredTensor], path: Path) -> tuple[str, ...]:
    """Compare the index with the headers; return the tensors that no shard holds if nothing else is wrong."""
    unheld = sorted(index.keys() - tensors.keys())
    differences = {
        "the shards hold, but the index lacks,": tensors.keys() - index.keys(),
        "another shard than the index says holds": {
            name for name, shard in index.items() if name in tensors and tensors[name].file != shard
        },
    }
    reasons = [f"{what} {len(names)} tensor(s): {some(names)}" for what, names in differences.items() if names]
    if reasons:
        raise CheckpointError("; ".join([_no_shard_holds(unheld), *reasons] if unheld else reasons), where=path)
    return tuple(unheld)


def _no_shard_holds(names: Collection[str]) -> str:
    return f"no shard holds {len(names)} tensor(s): {some(names)}"
