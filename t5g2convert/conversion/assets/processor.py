"""processor_config.json of the output: the source's image processor, nested as transformers 5 reads it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from t5g2convert.checkpoint.file_names import PREPROCESSOR_FILE, PROCESSOR_FILE
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.hub.model import read_held
from t5g2convert.errors import CheckpointError

"""The image processor before transformers 5; readers of T5Gemma 2 take it from processor_config.json."""


def processor_config(defaults: Mapping[str, Any], source: Checkpoint) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return processor_config.json of the output, and the files of the source that it is made from.

    The settings of the image processor are the source's, and the map's where the source has none.

    Args:
        defaults: What the map says, filled with the source's values.
        source: The source, or the donor of its tower.

    Raises:
        CheckpointError: The source's processor makes images of another size than the model reads, or another number of
            tokens.
    """
    reads = [name for name in (PROCESSOR_FILE, PREPROCESSOR_FILE) if source.holds(name)]
    processor = read_held(source, PROCESSOR_FILE) or {}
    where, image = source.path / PROCESSOR_FILE, processor.pop("image_processor", None)
    if image is None and PREPROCESSOR_FILE in reads:
        where = source.path / PREPROCESSOR_FILE
        image = read_held(source, PREPROCESSOR_FILE)
    if not isinstance(image := image or {}, dict):
        raise CheckpointError("image_processor is not an object", where=where)
    expected = defaults["image_processor"]
    _check_equal(processor, defaults, "image_seq_length", source.path / PROCESSOR_FILE)
    _check_equal(image, defaults, "image_seq_length", where)
    _check_equal(image, expected, "size", where)
    settings = {key: value for key, value in image.items() if key != "processor_class"}
    fixed = {key: defaults[key] for key in ("processor_class",) if key in defaults}
    kind = {key: expected[key] for key in ("image_processor_type",) if key in expected}
    return {**defaults, **processor, **fixed, "image_processor": {**expected, **settings, **kind}}, tuple(reads)


def _check_equal(found: Mapping[str, Any], expected: Mapping[str, Any], key: str, where: Path) -> None:
    """Refuse a setting that differs from the one that the model's sizes decide."""
    if found.get(key) is not None and key in expected and found[key] != expected[key]:
        raise CheckpointError(
            f"{key} is {found[key]!r}, the model that config.json describes needs {expected[key]!r}", where=where
        )
