"""A folder that was trained elsewhere, to be published: it has no t5g2.json, and its start tells where it is from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.families.t5gemma2 import ENCODER_TYPE, MODEL_TYPE
from t5g2convert.checkpoint.families.t5gemma2_spellings import as_published, is_t5gemma2
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.folder import INDEX_FILE, SINGLE_FILE, Checkpoint, open_checkpoint
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, Manifest, read_manifest
from t5g2convert.checkpoint.tokenizer.chat_templates import held
from t5g2convert.conversion.trained_model import CARRIED
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.mapping.inspection import inspect
from t5g2convert.publish.base_model import Ancestor, ancestors

KNOWN: Final = ("config.json", *CARRIED)
"""Files beside the weights that save_pretrained writes and loaders read; what Trainer leaves is not among them."""


@dataclass(frozen=True, slots=True)
class Elsewhere:
    """What is known of it.

    Attributes:
        files: The names of its files that loaders read.
        parameters: Number of parameters by part, with `total`.
        dtype: That of most of them, as safetensors calls it.
        start: The manifest of what was trained; None where that has none, as a release.
        sources: What the start was made of; the start itself where nothing tells.
    """

    files: tuple[str, ...]
    parameters: Mapping[str, int]
    dtype: str
    start: Manifest | None
    sources: list[Ancestor]


def read_elsewhere(folder: Path, start: Path) -> Elsewhere:
    """What a card tells of a folder that was trained elsewhere.

    Args:
        folder: The folder.
        start: What was trained.

    Raises:
        CheckpointError: Either is not sound.
        UsageError: The folder is not what came of training the start.
    """
    trained, model = open_checkpoint(folder), open_checkpoint(start)
    told = read_manifest(start) if is_there(start / MANIFEST_FILE) else None
    _check_elsewhere(trained, model, told)
    family = str(model.config.get("model_type"))
    sources = [Ancestor("source", family, None, None, {})] if told is None else ancestors(told, start)
    inspection = inspect(folder)
    return Elsewhere(
        files=files_of(trained),
        parameters=inspection.parameters,
        dtype=trained.dtype,
        start=told,
        sources=sources,
    )


def files_of(folder: Checkpoint) -> tuple[str, ...]:
    """The names of the files that loaders read: the weights, their index, and those with a known name.

    Raises:
        CheckpointError: One of them is no file.
    """
    return tuple(sorted({*folder.files, *_beside(folder)}))


def _beside(folder: Checkpoint) -> Iterator[str]:
    # An index beside a single file is one that no loader reads.
    index = () if tuple(folder.files) == (SINGLE_FILE,) else (INDEX_FILE,)
    yield from held(folder, (*KNOWN, *index))


def _check_elsewhere(trained: Checkpoint, start: Checkpoint, told: Manifest | None) -> None:
    if (trained.config.get("model_type"), start.config.get("model_type")) == (ENCODER_TYPE, MODEL_TYPE):
        raise UsageError(
            f"{trained.name} is an encoder alone, {start.name} a whole T5Gemma 2",
            hint="take that one's encoder out with t5g2 extract START ENCODER --part encoder, and give ENCODER",
        )
    if not is_t5gemma2(start) or trained.config.get("model_type") != start.config.get("model_type"):
        found = trained.config.get("model_type")
        raise UsageError(
            f"{trained.name} is a {found}, {start.name} a {start.config.get('model_type')}",
            hint="--source is the T5Gemma 2 that was trained elsewhere",
        )
    if trained.path.samefile(start.path):
        raise UsageError(
            f"{start.name} was given as what it was trained from",
            hint="leave --source out"
            if is_there(trained.path / MANIFEST_FILE)
            else "give the T5Gemma 2 that it was before: convert makes it anew from the same Gemma 3",
        )
    names = ({*as_published(each).checkpoint.tensors} for each in (trained, start))
    if next(names) != next(names):
        raise UsageError(
            f"{trained.name} and {start.name} have other tensors: one did not come of the other",
            hint="--source is the T5Gemma 2 that was trained elsewhere",
        )
    if is_there(trained.path / MANIFEST_FILE) and (
        told is None or read_manifest(trained.path).unverified() != told.unverified()
    ):
        raise UsageError(
            f"{trained.name} has a {MANIFEST_FILE} of its own: this tool wrote it", hint="leave --source out"
        )


def missing_manifest(error: CheckpointError, folder: Path) -> CheckpointError:
    """The error where a folder has no manifest, with the way out for one that was trained elsewhere."""
    if error.where != str(folder / MANIFEST_FILE) or (folder / MANIFEST_FILE).exists():
        return error
    hint = "if it was trained elsewhere, give the T5Gemma 2 that was trained with --source"
    return CheckpointError(error.message, where=folder / MANIFEST_FILE, hint=hint)
