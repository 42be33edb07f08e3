"""One verification: the values that its checks read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

import torch

from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint
from t5g2convert.checkpoint.header import CONFIG_NAMES
from t5g2convert.checkpoint.manifest import ChangeRecord, Manifest
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.parity.batches import Inputs
from t5g2convert.parity.checks.config import main_dtype, tensor_faults
from t5g2convert.parity.replay import Replay
from t5g2convert.parity.reports.report import Check, Skipped
from t5g2convert.parity.source_models import SourceModel
from t5g2convert.progress import Steps
from t5g2convert.reference.weights import ReadOptions

Source = TypeVar("Source", bound=SourceModel)
Value = TypeVar("Value")

COMPUTE_ERRORS: Final = (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError)
"""Errors of torch and Python on values or sizes of an output that cannot be computed with: the check fails."""


@dataclass(frozen=True)
class Verification(Generic[Source]):
    """Everything that the checks of one folder may read.

    Attributes:
        output: The folder.
        known_source: The model that the folder was made from; None if none was passed.
        manifest: The folder's manifest; None if it is missing or cannot be read.
        manifest_error: Why the manifest could not be read.
        replay: The plan of the conversion; None without a source, or for a folder that this tool did not write.
        read_config: Reads a config.json; takes its path for errors, and raises CheckpointError if it is not valid.
        inputs: The inputs of both models.
        passes_dtype: Name of the dtype to compute in; None for the folder's own.
        device: Device to compute on.
        tolerance: Largest relative difference that passes.
        progress: Called with a few words at every step.
        remarks: Remarks on the call, for the report.
    """

    output: Path
    known_source: Source | None
    manifest: Manifest | None
    manifest_error: CheckpointError | None
    replay: Replay | None
    read_config: Callable[[Mapping[str, Any], Path], object]
    inputs: Inputs
    passes_dtype: str | None
    device: str
    tolerance: float
    progress: Steps
    remarks: tuple[str, ...] = ()
    _computed: dict[Any, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def source(self) -> Source:
        """The model that the folder was made from; checks that also run without a source must not read it."""
        assert self.known_source is not None, "this check needs a source"
        return self.known_source

    @cached_property
    def target(self) -> Checkpoint:
        """The folder, open.

        Raises:
            CheckpointError: Its headers or its config cannot be read.
        """
        target = open_checkpoint(self.output)
        self.read_config(target.config, target.path / "config.json")
        return target

    @cached_property
    def dtype(self) -> str:
        """Name of the dtype to compute in: the requested one, or the folder's."""
        donated = self.manifest is not None and self.manifest.vision_from is not None
        return self.passes_dtype or CONFIG_NAMES.get(main_dtype(self.target, donated=donated), "float32")

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of the conversion, as the manifest records them."""
        return {} if self.manifest is None else self.manifest.options

    @property
    def changes(self) -> Mapping[str, ChangeRecord]:
        """The changes that the manifest declares, by field."""
        return {} if self.manifest is None else {change.field: change for change in self.manifest.changes}

    @property
    def new_values(self) -> Mapping[str, Any]:
        """The new values of settings that the manifest declares as changed, by field."""
        return {field: change.target for field, change in self.changes.items()}

    def reading(self, *, rounded: bool = False) -> ReadOptions:
        """Return how to read weights; `rounded` reads the source's weights as the conversion cast them."""
        options: ReadOptions = {"dtype": getattr(torch, self.dtype), "device": self.device}
        if rounded and "dtype" in self.changes:
            options["rounded_to"] = getattr(torch, self.changes["dtype"].target)
        return options

    def require_tensors(self) -> None:
        """Require the tensors that the folder's config implies, before memory is allocated for them.

        Raises:
            CheckpointError: A tensor is missing or has another shape.
        """
        if fault := next(tensor_faults(self.target), None):
            raise CheckpointError(f"cannot be computed: its tensors do not match its config: {fault}")


CheckFunction = Callable[[Verification[Any]], Check | Skipped | None]
"""Makes one check; returns None if it does not apply to this kind of folder."""


class Shared(Generic[Value]):
    """A function of a verification that several checks use: later calls return or raise the same as the first.

    Example:
        >>> @Shared
        ... def table_rows(verification: Verification[Any]) -> int:
        ...     return verification.target.config["vocab_size"]
    """

    def __init__(self, compute: Callable[[Verification[Any]], Value]) -> None:
        self._compute = compute

    def __call__(self, verification: Verification[Any]) -> Value:
        """Return the value, computed on the first call."""
        if self not in verification._computed:
            try:
                verification._computed[self] = self._compute(verification), None
            except (*COMPUTE_ERRORS, CheckpointError, UsageError) as raised:
                verification._computed[self] = None, raised
        result: tuple[Value, None] | tuple[None, Exception] = verification._computed[self]
        if result[1] is not None:
            raise result[1]
        return result[0]

    def if_known(self, verification: Verification[Any]) -> Value | None:
        """Return the value of an earlier check, or None if it failed or was not made."""
        value: Value | None = verification._computed.get(self, (None, None))[0]
        return value
