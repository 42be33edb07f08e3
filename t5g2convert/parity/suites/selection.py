"""The choice of the suite for a folder, and whether a folder and its source belong together."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families.t5gemma2 import ENCODER_TYPE, MODEL_TYPE
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.folder import Checkpoint, read_json_object
from t5g2convert.checkpoint.hub.open_and_fetch import Origin, parse_id
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, HubRecord, Manifest, unverified
from t5g2convert.checkpoint.sources import DECODER_FROM, VISION_FROM, Sources
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.parity.checks.integrity import matches_its_files
from t5g2convert.parity.suites.adapted import ADAPTED
from t5g2convert.parity.suites.base import Suite
from t5g2convert.parity.suites.extracted import TO_ENCODER, TO_GEMMA3
from t5g2convert.parity.suites.merged import MERGED
from t5g2convert.parity.suites.t5gemma import TO_T5GEMMA
from t5g2convert.parity.suites.t5gemma2 import TO_T5GEMMA2
from t5g2convert.parity.suites.trained_elsewhere import TRAINED_ELSEWHERE

SUITES: Final[tuple[Suite, ...]] = (TO_T5GEMMA2, TO_T5GEMMA, TO_ENCODER, TO_GEMMA3, ADAPTED, MERGED)
"""The suites of folders that this tool writes; the first also judges folders that fit none of them."""


def suite_for(output: Path, source: Checkpoint | None, *, adapter: Path | None = None) -> Suite:
    """Return the suite for a folder; with an adapter, or a manifest that records one, the suite for merges.

    Choose the suite for this type of source and this type of folder, if there is one. Otherwise either the folder or
    the source is wrong: the folder is, if its manifest names a source of this family.
    """
    if source is not None and is_trained_elsewhere(output, source):
        return TRAINED_ELSEWHERE
    model_type, family = _read(output / "config.json", "model_type"), _read(output / MANIFEST_FILE, "source", "family")
    merged = adapter is not None or _read(output / MANIFEST_FILE, "merged") is not None
    suites = [suite for suite in SUITES if not suite.trained or suite.merged == merged]
    of_target = [suite for suite in suites if model_type in suite.targets]
    trained = merged or _read(output / MANIFEST_FILE, "adaptation") is not None
    if source is None:
        return next((suite for suite in of_target if suite.trained == trained), (of_target or suites)[0])
    if not trained and family not in (None, MODEL_TYPE):
        # Its manifest says that it was converted, so it cannot come from a T5Gemma 2.
        of_target = [suite for suite in of_target if not suite.trained]
    source_type = source.config.get("model_type")
    of_source = [suite for suite in suites if source_type in suite.sources]
    of_both = [suite for suite in of_target if suite in of_source]
    return (of_both or (of_source if family == source_type or not of_target else of_target) or suites)[0]


def is_trained_elsewhere(output: Path, source: Checkpoint) -> bool:
    """Return whether a folder looks like `source` after training by another program.

    Such a folder has the source's model type, and either no t5g2.json or a copy of the source's that does not match
    its files.
    """
    model_type = source.config.get("model_type")
    if model_type not in TRAINED_ELSEWHERE.sources:
        return False
    try:
        if read_json_object(output / "config.json").get("model_type") != model_type:
            return False
        if not is_there(output / MANIFEST_FILE):
            return True
        theirs, ours = (unverified(read_json_object(folder / MANIFEST_FILE)) for folder in (source.path, output))
    except CheckpointError:
        return False
    # A folder that matches its manifest was converted, not trained.
    return theirs == ours and not matches_its_files(output, ours)


def check_manifest_fits(output: Path, source: Checkpoint) -> None:
    """Refuse a T5Gemma 2 with a manifest of other files if its source is a T5Gemma 2 too.

    Another program trained that model, and a manifest was copied into its folder.

    Raises:
        CheckpointError: The manifest describes other files.
    """
    try:
        if read_json_object(output / "config.json").get("model_type") != source.config.get("model_type"):
            return
        manifest = read_json_object(output / MANIFEST_FILE)
    except CheckpointError:
        return
    if source.config.get("model_type") not in TRAINED_ELSEWHERE.sources or {"adaptation", "merged"} & manifest.keys():
        return
    if "source" in manifest and not matches_its_files(output, manifest):
        raise CheckpointError(
            "matches neither the files in its folder nor the source",
            where=output / MANIFEST_FILE,
            hint="if the folder was trained elsewhere, move this file away and run again",
        )


def source_remarks(output: Path, source: Checkpoint) -> tuple[str, ...]:
    """Return a hint for a T5Gemma 2 without a usable t5g2.json, which was probably trained elsewhere."""
    try:
        found, source_type = read_json_object(output / "config.json").get("model_type"), source.config.get("model_type")
    except CheckpointError:
        return ()
    if found not in TRAINED_ELSEWHERE.targets:
        return ()
    of_t5gemma2 = source_type in TRAINED_ELSEWHERE.sources
    if os.path.lexists(output / MANIFEST_FILE):  # also a broken symlink
        try:
            if not of_t5gemma2 or "source" in read_json_object(output / MANIFEST_FILE):
                return ()
        except CheckpointError:
            pass
        return (f"its {MANIFEST_FILE} cannot be used: if it was trained elsewhere, move that away and run again",)
    if (found, source_type) == (ENCODER_TYPE, MODEL_TYPE):
        return (
            f"an encoder alone, without {MANIFEST_FILE}: if it was trained elsewhere, extract the start's encoder with "
            "t5g2 extract START ENCODER --part encoder, and pass ENCODER as --source",
        )
    if of_t5gemma2:
        return ()
    return (
        f"it has no {MANIFEST_FILE}: if it was trained elsewhere, pass the T5Gemma 2 that was trained as --source, "
        f"not the {source_type} that it came from",
    )


def check_sources(sources: Sources, origins: Mapping[str, Origin | None], manifest: Manifest) -> list[str]:
    """Refuse checkpoints that the conversion did not read, and return remarks on what cannot be compared.

    Args:
        sources: The checkpoints, open.
        origins: The folder or model that the user named for each role.
        manifest: The manifest of the conversion.

    Raises:
        UsageError: A checkpoint is missing or superfluous, or a branch on the Hub has moved on since.
    """
    for role, what in ((DECODER_FROM, "decoder"), (VISION_FROM, "vision tower")):
        option = f"--{role.replace('_', '-')}"
        if role in manifest.sources and role not in sources.others:
            raise UsageError(f"its {what} is from another checkpoint", hint=f"pass that checkpoint with {option}")
        if role in sources.others and role not in manifest.sources:
            raise UsageError(f"its {what} is not from another checkpoint", hint=f"omit {option}")
    remarks = []
    for role, checkpoint in sources.by_role.items():
        recorded = manifest.sources[role].hub
        _check_commit(origins[role], checkpoint, recorded)
        if recorded is not None and checkpoint.hub is None:
            remarks.append(f"not checked: whether the {role} is {recorded.repo} on the Hub (a folder was passed)")
    return remarks


def _check_commit(origin: Origin | None, checkpoint: Checkpoint, recorded: HubRecord | None) -> None:
    """Refuse a branch that has moved on since the conversion: comparing with it would prove nothing."""
    found = checkpoint.hub
    named = parse_id(origin) if isinstance(origin, str) else None
    if named is None or named.revision is not None or found is None or recorded is None:
        return
    if recorded.repo == found.repo and recorded.revision != found.revision:
        raise UsageError(
            f"it was made from commit {recorded.revision} of {found.repo}, which is now at {found.revision}",
            hint=f"if you trust that commit, pass {found.repo}@{recorded.revision}",
        )


def _read(path: Path, *keys: str) -> object:
    """Return a value of a JSON file by its keys; None if the file cannot be read or lacks the key."""
    try:
        node: Any = read_json_object(path)
    except CheckpointError:
        return None
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node
