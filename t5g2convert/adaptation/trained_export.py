"""Export: a model with the trained values of a run in it, in the published layout, through the conversion's writer.

Everything but values is the model's: names, dtypes, shards and the order in them, settings, tokenizer. Tensors that
were not trained are its bytes; trained ones are rounded once. The manifest tells of the training under `adaptation`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.checkpoint.inputs import Folders
from t5g2convert.conversion.convert import Conversion, execute
from t5g2convert.conversion.options import KEEP, Dtype, Judge, WriteOptions
from t5g2convert.conversion.trained_model import plan_adapted
from t5g2convert.conversion.write.computed_tensors import Given
from t5g2convert.conversion.write.copy import Progress
from t5g2convert.conversion.write.output_path import check_target
from t5g2convert.errors import CheckpointError


class Values(Given, Protocol):
    """CheckpointReader values: which tensors, and their values in pieces. `CheckpointReader` and `Mean` are such."""

    @property
    def names(self) -> Mapping[str, tuple[int, ...]]:
        """The trained tensors by their names in the published layout, with their shapes."""


def export(
    model: Path,
    values: Values,
    output: Path,
    *,
    facts: Mapping[str, Any],
    dtype: Dtype = KEEP,
    overwrite: bool = False,
    flush: bool = True,
    progress: Progress | None = None,
    judge: Judge | None = None,
) -> Conversion:
    """Write a model with trained values in it; the output appears complete, by one rename, or not at all.

    Args:
        model: The folder of the T5Gemma 2 that was trained, in the published layout.
        values: The trained values.
        output: The folder to write. One that is empty is filled, and keeps its mode, owner and place.
        facts: What the manifest shall tell of the training: `steps`, `checkpoints` (the steps averaged, or the one
            taken), `tokens`, `settings` (as run.json has them), `settings_sha256` and
            `data_sha256`. No paths, no times: the same values give the same bytes.
        dtype: `keep` for the model's own dtypes, or `bfloat16`, `float16` or `float32` for all tensors.
        overwrite: Replace an output of this tool that is there, at the end; nothing else is ever replaced.
        flush: Wait until the disk has every byte before the output appears.
        progress: Called with the bytes just written.
        judge: Called with the finished folder before it appears under its name; what it raises leaves no output.

    Raises:
        CheckpointError: The model is not sound or in another layout; a trained tensor is not one of it, of another
            shape, of the frozen vision tower, or holds NaN or infinity.
        OutputError: The output exists or cannot be written.
        UsageError: The dtype is none.
    """
    check_target(output, model, overwrite=overwrite)
    if not values.names:
        raise CheckpointError("nothing was trained: there are no values to export", where=model)
    plan = plan_adapted(open_checkpoint(model), values.names, facts, dtype=dtype)
    options = WriteOptions(overwrite=overwrite, flush=flush, progress=progress, judge=judge)
    return execute(plan, Folders(model), output, options, given=values)
