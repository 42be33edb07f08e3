"""The definition of a suite, and the checks, remarks and rules on declared changes that several suites share."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from torch import Tensor

from t5g2convert.checkpoint.families.registry import target_of
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.manifest import ChangeRecord, Manifest
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.errors import CheckpointError
from t5g2convert.parity.checks.integrity import judge_integrity, unreadable_manifest
from t5g2convert.parity.checks.provenance import judge_provenance
from t5g2convert.parity.checks.provenance_manifest import maker_remarks
from t5g2convert.parity.checks.tokenizer import has_tokenizer_files, judge_copied_tokenizer
from t5g2convert.parity.checks.vision import judge_vision
from t5g2convert.parity.replay import Replay
from t5g2convert.parity.reports.report import Check, Skipped
from t5g2convert.parity.session import CheckFunction, Verification
from t5g2convert.parity.source_models import SourceModel
from t5g2convert.reference.vision import VisionTower

RemarksFunction = Callable[[Verification[Any]], Iterator[str]]

NO_IMAGES = Skipped("the source has no images")
NO_TOKENIZER = Skipped("the output has no tokenizer")


@dataclass(frozen=True, kw_only=True)
class Suite:
    """The checks that judge one kind of folder.

    Attributes:
        sources: The possible `model_type`s of the source.
        targets: The possible `model_type`s of the folder.
        trained: Whether the folder has other values than its source: `t5g2 adapt` trained it, or `t5g2 merge` wrote it.
        merged: Whether `t5g2 merge` wrote it.
        open_source: Opens the source as a model; raises CheckpointError if it is of another family.
        read_config: Reads a config.json; takes its path for errors, and raises CheckpointError if it is not valid.
        replay: Plans the conversion again from its sources, its manifest and a map; None if there was no conversion.
        checks: The checks by name, in order; the first is integrity.
        remarks: What a reader of the report needs to know, whatever the checks find.
    """

    sources: tuple[str, ...]
    targets: tuple[str, ...]
    trained: bool = False
    merged: bool = False
    open_source: Callable[[Sources], SourceModel]
    read_config: Callable[[Mapping[str, Any], Path], object]
    replay: Callable[[Sources, Manifest | None, str | None], Replay] | None
    checks: Mapping[str, CheckFunction]
    remarks: RemarksFunction


def integrity(verification: Verification[Any]) -> Check:
    """Compare the folder's files with its manifest."""
    verification.progress("sha256 of all files")
    if verification.manifest_error is not None:
        return unreadable_manifest(verification.manifest_error)
    assert verification.manifest is not None, "it is there, or there is a reason why not"
    return judge_integrity(verification.output, verification.manifest.files)


def provenance(verification: Verification[Any]) -> Check:
    """Compare the folder's bytes with the source's."""
    assert verification.replay is not None, "a folder that is compared with its source has a plan"
    return judge_provenance(
        verification.replay,
        verification.source,
        verification.target,
        verification.manifest,
        verification.progress,
    )


def copied_tokenizer(verification: Verification[Any]) -> Check | Skipped:
    """Require that no file of the tokenizer differs from the source's."""
    if not has_tokenizer_files(verification.output, verification.manifest):
        return NO_TOKENIZER
    return judge_copied_tokenizer(verification.source.folders, verification.target, verification.manifest)


def compare_towers(
    verification: Verification[Any],
    source: VisionTower,
    target: VisionTower | None,
    *,
    projected: bool = True,
    normed: bool = True,
) -> tuple[Check, Tensor | None]:
    """Make vision_parity; also return the source's image features, if both models have a tower."""
    if target is None:
        return Check("vision_parity", False, "the source has a vision tower, but the target has none"), None
    return judge_vision(
        source,
        target,
        verification.inputs.pixels(source).to(verification.device),
        projected=projected,
        normed=normed,
        tolerance=verification.tolerance,
        progress=verification.progress,
    )


def conversion_remarks(verification: Verification[Any]) -> Iterator[str]:
    """Yield remarks on the dtype, on the version that made the folder, and on changes that it declares."""
    if verification.dtype == "float16":
        yield "computed in float16, which a real Gemma 3 may overflow with other inputs; use --dtype float32"
    if verification.replay is None:
        return
    if verification.manifest is not None:
        yield from maker_remarks(verification.replay.plan, verification.manifest)
    yield from change_remarks(verification.target, verification.changes)


LENGTH: Final = "max_position_embeddings"
"""A setting without effect on the computation."""


def change_remarks(target: Checkpoint, changes: Mapping[str, ChangeRecord]) -> Iterator[str]:
    """Yield remarks on the changes."""
    if "dtype" in changes:
        yield (
            f"weights were cast from {changes['dtype'].source} to {changes['dtype'].target}, as declared: "
            "the parities are judged on the source with its weights so cast"
        )
    for setting, (before, after) in stack_changes(
        changes, tuple(target_of(target.config, target.path).stacks.values())
    ).items():
        remark = f"{setting} was changed from {before} to {after}, as declared"
        yield remark if LENGTH in setting else f"{remark}: the parity checks use {before}"


def stack_changes(changes: Mapping[str, ChangeRecord], stacks: Sequence[str]) -> dict[str, tuple[Any, Any]]:
    """Return old and new values by setting; a setting that changed alike in all stacks has one entry."""
    found: dict[str, tuple[Any, Any]] = {}
    for field, change in changes.items():
        values = change.source, change.target
        stack = next((stack for stack in stacks if field.startswith(stack)), "")
        setting = field.removeprefix(stack)
        others = [changes.get(stack + setting) for stack in stacks]
        alike = all(other is not None and (other.source, other.target) == values for other in others)
        if "." in field:
            found[f"{setting} of both stacks" if alike else field] = values
    return found


def on_source_settings(target: Checkpoint, changes: Mapping[str, ChangeRecord]) -> dict[str, Any]:
    """Return the target's config.json with the old values of declared changes.

    Raises:
        CheckpointError: config.json lacks a setting that the manifest declares as changed.
    """
    config = deepcopy(dict(target.config))
    for field, change in changes.items():
        *path, last = field.split(".")
        section: Any = config
        for key in path:
            section = section.get(key) if isinstance(section, dict) else None
        if path and not (isinstance(section, dict) and last in section):
            raise CheckpointError(f"t5g2.json declares a change of {field}, which config.json lacks")
        if path:
            section[last] = change.source
    return config
