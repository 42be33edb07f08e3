"""A folder and a source that do not belong together: what they probably are, and what to give in their place."""

import os
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.families.t5gemma2 import ENCODER_TYPE, MODEL_TYPE
from t5g2convert.checkpoint.folder import Checkpoint, read_json_object
from t5g2convert.checkpoint.manifest import MANIFEST_FILE
from t5g2convert.errors import CheckpointError
from t5g2convert.parity.checks.integrity import fits_its_files

KNOWN: Final = (MODEL_TYPE, ENCODER_TYPE)
"""What may be trained elsewhere."""


def check_manifest_fits(output: Path, source: Checkpoint) -> None:
    """Refuse a T5Gemma 2 whose source is one too, and whose t5g2.json is that of other files.

    Somebody trained it, and copied a manifest along. Without that it would be judged as trained elsewhere.

    Raises:
        CheckpointError: It is such a folder.
    """
    try:
        if read_json_object(output / "config.json").get("model_type") != source.config.get("model_type"):
            return
        manifest = read_json_object(output / MANIFEST_FILE)
    except CheckpointError:
        return
    if source.config.get("model_type") not in KNOWN or "adaptation" in manifest:
        return
    if "source" in manifest and not fits_its_files(output, manifest):
        raise CheckpointError(
            "is not of the files beside it, nor of the source",
            where=output / MANIFEST_FILE,
            hint="if the folder was trained elsewhere, move this file away and run again",
        )


def remark_on_source(output: Path, source: Checkpoint) -> str | None:
    """What to do for a folder that has no t5g2.json which tells of it; None where nothing speaks of a mistake."""
    try:
        found, given = read_json_object(output / "config.json").get("model_type"), source.config.get("model_type")
    except CheckpointError:
        return None
    if found not in KNOWN:
        return None
    if os.path.lexists(output / MANIFEST_FILE):  # be it a link that leads nowhere
        try:
            if given not in KNOWN or "source" in read_json_object(output / MANIFEST_FILE):
                return None
        except CheckpointError:
            pass
        return f"its {MANIFEST_FILE} tells nothing: if it was trained elsewhere, move that away and run again"
    if (found, given) == (ENCODER_TYPE, MODEL_TYPE):
        return (
            f"an encoder alone, without {MANIFEST_FILE}: if it was trained elsewhere, take the start's out with "
            "t5g2 extract START ENCODER --part encoder, and give ENCODER as --source"
        )
    if given in KNOWN:
        return None
    return (
        f"it has no {MANIFEST_FILE}: if it was trained elsewhere, give the T5Gemma 2 that was trained as --source, "
        f"and not the {given} that it came from"
    )
