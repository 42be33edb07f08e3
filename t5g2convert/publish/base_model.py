"""The checkpoints that a folder was made from, and the command that makes it again."""

import re
import shlex
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.families.t5gemma2 import ENCODER_TYPE, MODEL_TYPE
from t5g2convert.checkpoint.families.t5gemma2_spellings import as_published, is_t5gemma2
from t5g2convert.checkpoint.file_names import INDEX_FILE, SINGLE_FILE
from t5g2convert.checkpoint.file_store import is_commit, is_repo_id, is_there
from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from t5g2convert.checkpoint.tokenizer.chat_templates import held
from t5g2convert.conversion.trained_model import CARRIED
from t5g2convert.errors import CheckpointError, MappingError, UsageError
from t5g2convert.mapping.inspection import inspect
from t5g2convert.mapping.library import find_map
from t5g2convert.publish.markdown import code
from t5g2convert.version import __version__

HUB: Final = "https://huggingface.co"

ROLES: Final = {
    "source": "the source",
    "decoder_from": "the decoder's parent",
    "vision_from": "the vision tower's donor",
}
"""The checkpoints that a manifest may name, by key."""

LOADED_FILES: Final = ("config.json", *CARRIED)
"""Files other than weights that save_pretrained writes and loaders read, without the files that Trainer leaves."""


@dataclass(frozen=True, slots=True)
class BaseCheckpoint:
    """A checkpoint that a folder was made from.

    Attributes:
        role: Its key in the manifest; see `ROLES`.
        family: Its `model_type`.
        repo: Its name on the Hub; None for a local folder, which is identified only by its file hashes.
        revision: Its commit on the Hub.
        files: The sha256 of each file; None where it was not computed.
    """

    role: str
    family: str
    repo: str | None
    revision: str | None
    files: Mapping[str, str | None]

    @property
    def address(self) -> str | None:
        """The start of the URLs of its files on the Hub."""
        return None if self.repo is None else f"{HUB}/{self.repo}/blob/{self.revision}/"

    @property
    def argument(self) -> str:
        """Its argument in a command: its name on the Hub, or a placeholder for a folder."""
        return self.role.upper() if self.repo is None else f"{self.repo}@{self.revision}"

    @property
    def description(self) -> str:
        """Its name and type, in Markdown."""
        family = code(self.family)
        if self.repo is None:
            return f"a local folder with a {family}"
        link = f"[{code(self.repo)}]({HUB}/{self.repo}/tree/{self.revision})"
        return f"{link}, a {family}, at commit {code(self.revision)}"


def base_checkpoints(manifest: Manifest, folder: Path) -> list[BaseCheckpoint]:
    """Return all checkpoints that a manifest names, the source first.

    Raises:
        CheckpointError: The name or the commit of a checkpoint is not valid on the Hub.
    """
    found = []
    for role, record in manifest.sources.items():
        hub = record.hub
        if hub is not None and not (is_repo_id(hub.repo) and is_commit(hub.revision)):
            raise CheckpointError(
                f"names {f'{hub.repo}@{hub.revision}'!r} as {ROLES[role]}, expected org/name and a commit",
                where=folder / MANIFEST_FILE,
            )
        files = {name: file.sha256 for name, file in record.files.items()}
        repo, revision = (None, None) if hub is None else (hub.repo, hub.revision)
        found.append(BaseCheckpoint(role, record.family, repo, revision, files))
    return found


def command(manifest: Manifest, sources: list[BaseCheckpoint], part: str | None) -> str:
    """Return the command that makes a folder again; `part` is the part of an encoder-decoder that was extracted."""
    if not _is_shipped(manifest):
        words = ["t5g2", "convert", sources[0].argument, "OUTPUT", "--mapping", "MAP.yaml"]
    elif part is None:
        words = ["t5g2", "convert", sources[0].argument, "OUTPUT"]
    else:
        words = ["t5g2", "extract", sources[0].argument, "OUTPUT", "--part", part]
    for source in sources[1:]:
        words += [f"--{source.role.replace('_', '-')}", source.argument]
    for name, value in manifest.document()["options"].items():
        words.append("--max-shard-size" if name == "max_shard_bytes" else f"--{name.replace('_', '-')}")
        words.append(",".join(map(str, value)) if isinstance(value, list) else str(value))
    return shlex.join(words)


def _is_shipped(manifest: Manifest) -> bool:
    """Return whether the map ships with this tool; if another version wrote the manifest, decide by the map's name."""
    if manifest.mapping is None:
        return False
    name = manifest.mapping.name
    if re.fullmatch(r"[a-z0-9-]+", name) is None:
        return False
    try:
        found = find_map(name)
    except MappingError:
        return False
    return manifest.tool.version != __version__ or found.sha256 == manifest.mapping.sha256


@dataclass(frozen=True, slots=True)
class TrainedElsewhere:
    """A folder trained elsewhere; it has no manifest, so the model it was trained from describes its origin.

    Attributes:
        files: The names of the files that loaders read.
        parameters: The number of parameters by part, with `total`.
        dtype: The safetensors dtype of most parameters.
        start: The manifest of the model it was trained from; None if that model, like a release, has none either.
        sources: The checkpoints that the model was made from; the model itself if they are not recorded.
    """

    files: tuple[str, ...]
    parameters: Mapping[str, int]
    dtype: str
    start: Manifest | None
    sources: list[BaseCheckpoint]


def read_trained_elsewhere(folder: Path, start: Path) -> TrainedElsewhere:
    """Read the known facts about a folder trained elsewhere.

    Args:
        folder: The folder.
        start: The T5Gemma 2 it was trained from.

    Raises:
        CheckpointError: One of the two is not a valid checkpoint.
        UsageError: The folder cannot be the result of training `start`.
    """
    trained, model = open_checkpoint(folder), open_checkpoint(start)
    manifest = read_manifest(start) if is_there(start / MANIFEST_FILE) else None
    _check_trained_from(trained, model, manifest)
    family = str(model.config.get("model_type"))
    return TrainedElsewhere(
        files=loaded_files(trained),
        parameters=inspect(folder).parameters,
        dtype=trained.dtype,
        start=manifest,
        sources=[BaseCheckpoint("source", family, None, None, {})]
        if manifest is None
        else base_checkpoints(manifest, start),
    )


def loaded_files(folder: Checkpoint) -> tuple[str, ...]:
    """Return the names of the files that loaders read: the weights, their index, and `LOADED_FILES`.

    Raises:
        CheckpointError: One of these files is not a regular file.
    """
    # Loaders ignore the index if the model is in a single file.
    index = () if tuple(folder.files) == (SINGLE_FILE,) else (INDEX_FILE,)
    return tuple(sorted({*folder.files, *held(folder, (*LOADED_FILES, *index))}))


def _check_trained_from(trained: Checkpoint, start: Checkpoint, start_manifest: Manifest | None) -> None:
    trained_type, start_type = trained.config.get("model_type"), start.config.get("model_type")
    if (trained_type, start_type) == (ENCODER_TYPE, MODEL_TYPE):
        raise UsageError(
            f"{trained.name} is an encoder, but {start.name} is a whole T5Gemma 2",
            hint="extract its encoder with t5g2 extract START ENCODER --part encoder, and pass ENCODER",
        )
    if not is_t5gemma2(start) or trained_type != start_type:
        raise UsageError(
            f"{trained.name} is a {trained_type}, but {start.name} is a {start_type}",
            hint="pass the T5Gemma 2 it was trained from as --source",
        )
    has_manifest = is_there(trained.path / MANIFEST_FILE)
    if trained.path.samefile(start.path):
        raise UsageError(
            f"--source names the trained folder itself, {start.name}",
            hint="omit --source"
            if has_manifest
            else "pass the T5Gemma 2 from before the training: converting the same Gemma 3 again makes it",
        )
    if {*as_published(trained).checkpoint.tensors} != {*as_published(start).checkpoint.tensors}:
        raise UsageError(
            f"{trained.name} was not trained from {start.name}: their tensors differ",
            hint="pass the T5Gemma 2 it was trained from as --source",
        )
    if has_manifest and (
        start_manifest is None or read_manifest(trained.path).unverified() != start_manifest.unverified()
    ):
        raise UsageError(
            f"{trained.name} was written by this tool: it has its own {MANIFEST_FILE}", hint="omit --source"
        )


def missing_manifest(error: CheckpointError, folder: Path) -> CheckpointError:
    """Return an error about the manifest, with a hint about training elsewhere if it is missing."""
    if error.where != str(folder / MANIFEST_FILE) or (folder / MANIFEST_FILE).exists():
        return error
    hint = "for a model that was trained elsewhere, pass the T5Gemma 2 it was trained from with --source"
    return CheckpointError(error.message, where=folder / MANIFEST_FILE, hint=hint)
