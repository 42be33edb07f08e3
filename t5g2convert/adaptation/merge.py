"""Merging: a LoRA adapter of peft becomes part of a model's weights, written as a model.

Each target is W + s B A, computed in float64 and rounded once to its dtype; everything else is copied byte for byte.
"""

import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from t5g2convert.adaptation.adapter_export import check_base
from t5g2convert.adaptation.options import REPLACE
from t5g2convert.checkpoint.adapter import Adapter, open_adapter
from t5g2convert.checkpoint.file_names import ADAPTER_FILE
from t5g2convert.checkpoint.file_store import is_there, sha256_of
from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint
from t5g2convert.checkpoint.header import CONFIG_NAMES, TensorEntry, element_bytes
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, read_manifest
from t5g2convert.checkpoint.sources import Folders
from t5g2convert.command_options import CommandOptions, Option, takes_options
from t5g2convert.conversion.convert import Conversion, execute
from t5g2convert.conversion.option_values import KEEP
from t5g2convert.conversion.options import Dtype, WriteOptions
from t5g2convert.conversion.output.path_rules import check_target
from t5g2convert.conversion.trained_model import plan_merged, scale_of
from t5g2convert.conversion.write.copy import read_exactly
from t5g2convert.conversion.write.numerics import rounded, widened
from t5g2convert.errors import CheckpointError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK_ELEMENTS: Final = 1 << 20
"""Elements of a target computed at once."""

SMALL_LOSS: Final = 0.01
"""The share of an update that rounding may lose without a note."""


class MergeOptions(CommandOptions):
    """The options of merging.

    Attributes:
        dtype: `keep` for the model's own dtypes, or the dtype that all tensors are cast to.
        overwrite: Replace an existing output of this tool at the very end; nothing else is ever replaced.
        progress: Called with the number of bytes just written.
    """

    dtype: Annotated[Dtype, Option("Dtype of the output: keep, bfloat16, float16 or float32.", metavar="DTYPE")] = KEEP
    overwrite: Annotated[bool, Option(REPLACE)] = False
    progress: Callable[[int], None] | None = None


@dataclass(frozen=True, slots=True)
class Merge:
    """A finished merge.

    Attributes:
        conversion: What was written.
        targets: Number of tensors that the adapter changes.
        ranks: The ranks of their products, ascending.
        lost: The share of the update that rounding lost: the root mean square of the rounding errors, divided by that
            of s B A; None if the update is zero.
    """

    conversion: Conversion
    targets: int
    ranks: tuple[int, ...]
    lost: float | None

    def to_json(self) -> dict[str, Any]:
        """Return what `t5g2 merge --json` prints."""
        document = self.conversion.to_json()
        # Only conversions have these keys.
        for key in ("mapping", "kept", "residual"):
            del document[key]
        return {**document, "targets": self.targets, "ranks": list(self.ranks), "update_lost": self.lost}


def merge_adapter(model: Path, adapter: Path, output: Path, options: MergeOptions) -> Merge:
    """Write a model with a LoRA adapter merged into its weights, in the published layout.

    Memory holds the two matrices of one target and a few of its rows, whatever the size of the model. `merge` is the
    same with the options as keyword arguments:

    ```python
    merge(Path("t5gemma-2"), Path("run/adapter"), Path("t5gemma-2-merged"), dtype="float32")
    ```

    Args:
        model: The T5Gemma 2 folder that the adapter was trained on, in the published layout.
        adapter: The folder that peft saved, with `adapter_config.json` and `adapter_model.safetensors`.
        output: The folder to write. An empty folder is filled, and keeps its mode and owner.
        options: The options of `t5g2 merge`.

    Raises:
        CheckpointError: The model or the adapter is damaged; the adapter is not a plain LoRA, or does not fit the
            model; or values are NaN, infinite, or too large for the dtype.
        OutputError: The output exists or cannot be written.
    """
    check_target(output, model, adapter, overwrite=options.overwrite)
    opened, start = open_adapter(adapter), open_checkpoint(model)
    known = check_base(adapter, model)
    digests = {path.name: sha256_of(path) for path in (adapter / ADAPTER_FILE, opened.weights)}
    before = read_manifest(model) if is_there(model / MANIFEST_FILE) else None
    history = (None, None) if before is None else (before.adaptation, before.merged)
    plan = plan_merged(start, opened, digests, *history, dtype=options.dtype)
    values = MergedValues(start, opened, {tensor.name: tensor.dtype for tensor in plan.tensors})
    write = WriteOptions(overwrite=options.overwrite, progress=options.progress)
    done = execute(plan, Folders(model), output, write, values=values)
    notes = (*done.notes, *_notes(opened, start, values, known=known))
    ranks = tuple(sorted({target.rank for target in opened.targets.values()}))
    return Merge(replace(done, notes=notes), len(opened.targets), ranks, values.lost)


merge = takes_options(MergeOptions)(merge_adapter)


def _notes(adapter: Adapter, model: Checkpoint, values: "MergedValues", *, known: bool) -> Iterator[str]:
    if not known:
        base = "a model that it does not name" if adapter.base is None else adapter.base
        yield f"the adapter was trained on {base}; not checked: that {model.name} has the same weights"
    if values.unchanged:
        yield f"{len(values.unchanged)} of {len(adapter.targets)} targets have a product of zero, and did not change"
    if values.lost is not None and values.lost > SMALL_LOSS:
        dtypes = " and ".join(sorted({CONFIG_NAMES[values.dtypes[name]] for name in adapter.targets}))
        yield f"rounding to {dtypes} lost {values.lost:.1%} of the update; --dtype float32 keeps it"


class MergedValues:
    """The targets of an adapter: W + s B A, rounded to the dtype of the output.

    Attributes:
        dtypes: The safetensors dtype of each tensor of the output.
        unchanged: Targets with a product of zero, as far as they were computed.

    Args:
        model: The model, open.
        adapter: The adapter, open; all of its targets fit the model.
        dtypes: See above.
    """

    def __init__(self, model: Checkpoint, adapter: Adapter, dtypes: Mapping[str, str]) -> None:
        self._model, self._adapter, self.dtypes = model, adapter, dtypes
        self._update, self._error = 0.0, 0.0
        self.unchanged: list[str] = []

    @property
    def lost(self) -> float | None:
        """The share of the update that rounding lost; None if the update is zero."""
        return math.sqrt(self._error / self._update) if self._update else None

    def pieces(self, name: str) -> "Iterator[NDArray[np.float32]]":
        """Compute a target, some rows at a time; the values fit its dtype exactly.

        Raises:
            CheckpointError: A file cannot be read, or a value is NaN, infinite, or too large for the dtype.
        """
        import numpy as np

        target, stored, dtype = self._adapter.targets[name], self._model.tensors[name], self.dtypes[name]
        down, up = (_read(self._adapter.weights, entry) for entry in (target.down, target.up))
        scale = scale_of(target, rslora=self._adapter.rslora)
        rows, columns = target.shape
        moved = False
        for first in range(0, rows, step := max(1, BLOCK_ELEMENTS // columns)):
            last = min(first + step, rows)
            weight = _read(self._model.path / stored.file, stored.entry, first * columns, last * columns)
            update = scale * (up[first:last] @ down)
            exact = weight.reshape(update.shape) + update
            values = np.array(widened(memoryview(rounded(name, exact, dtype)), dtype), np.float32)
            self._update += float(np.square(update).sum())
            self._error += float(np.square(values - exact.reshape(-1)).sum())
            moved |= bool(update.any())
            yield values
        if not moved:
            self.unchanged.append(name)


def _read(path: Path, entry: TensorEntry, first: int = 0, last: int | None = None) -> "NDArray[np.float64]":
    """Return a tensor of a file in its shape, or the elements `first` to `last` in one row.

    Raises:
        CheckpointError: The file cannot be read, or a value is NaN or infinite.
    """
    import numpy as np

    width = element_bytes(entry.dtype)
    data = bytearray((entry.elements if last is None else last - first) * width)
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            read_exactly(fd, memoryview(data), entry.start + first * width, path.name)
        finally:
            os.close(fd)
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None
    values = widened(memoryview(data), entry.dtype).astype(np.float64)
    if not np.isfinite(values).all():
        raise CheckpointError(f"{entry.name} holds NaN or infinity", where=path)
    return values.reshape(entry.shape) if last is None else values
