"""A verification under way: the checks made so far, and what they are made with."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from t5g2convert.checkpoint.dtypes import CONFIG_NAMES
from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint
from t5g2convert.checkpoint.manifest import ChangeRecord, Manifest, read_manifest
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.interrupts import raise_interruption
from t5g2convert.parity.batches import Inputs
from t5g2convert.parity.checks.config import main_dtype, tensor_faults
from t5g2convert.parity.checks.integrity import judge_integrity, unreadable_manifest
from t5g2convert.parity.checks.provenance import check_options
from t5g2convert.parity.parents import Parent
from t5g2convert.parity.reports.report import Check, Report
from t5g2convert.progress import Steps
from t5g2convert.reference.weights import ReadOptions


class Judge:
    """One verification.

    Attributes:
        output: The folder that is judged.
        parent: What it was made of; None where that was not given.
        inputs: What the passes read.
        device: The device that they run on.
        tolerance: Largest relative difference that passes.
        progress: Told what is being done.
        manifest: The folder's manifest; None where it has none that can be read.
        dtype: The name of the dtype that the passes compute in; None until the folder is open.
        checks: Those made so far.
        remarks: What a reader of the report must know.
    """

    def __init__(
        self, output: Path, parent: Parent | None, inputs: Inputs, device: str, tolerance: float, progress: Steps
    ) -> None:
        self.output = output
        self.parent = parent
        self.inputs = inputs
        self.device = device
        self.tolerance = tolerance
        self.progress = progress
        self.manifest: Manifest | None = None
        self.dtype: str | None = None
        self.checks: list[Check] = []
        self.remarks: list[str] = []
        self._skipped: dict[str, str] = {}

    @property
    def options(self) -> Mapping[str, Any]:
        """The options of the conversion, as the manifest tells."""
        return {} if self.manifest is None else self.manifest.options

    @property
    def changes(self) -> Mapping[str, ChangeRecord]:
        """The changes that the manifest declares, by field."""
        return {} if self.manifest is None else {change.field: change for change in self.manifest.changes}

    @property
    def new_values(self) -> Mapping[str, Any]:
        """The values that settings were changed to, by field."""
        return {field: change.target for field, change in self.changes.items()}

    def reading(self, *, rounded: bool = False) -> ReadOptions:
        """How weights are read; `rounded` for the parent's, which are judged as the conversion cast them."""
        options: ReadOptions = {"dtype": getattr(torch, str(self.dtype)), "device": self.device}
        if rounded and "dtype" in self.changes:
            options["rounded_to"] = getattr(torch, self.changes["dtype"].target)
        return options

    def report(self) -> Report:
        """What was found."""
        return Report(
            output=self.output,
            source=None if self.parent is None else self.parent.folders.source,
            dtype=self.dtype,
            device=self.device,
            tolerance=self.tolerance,
            checks=tuple(self.checks),
            skipped=self._skipped,
            remarks=(*self.remarks, *self.inputs.remarks),
            parameters={} if self.manifest is None else self.manifest.parameters,
        )

    def skip(self, names: Sequence[str], because: str) -> None:
        """Note checks that are not made."""
        self._skipped |= dict.fromkeys(names, because)

    def make(self, names: Sequence[str], check: Callable[[], list[Check]]) -> None:
        """Make checks; what cannot be read or computed of the output fails them.

        Raises:
            CheckpointError: The source is at fault.
            UsageError: Memory is, or the dtype of the passes, and no check has failed yet.
        """
        try:
            self.checks += check()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _too_little_memory(error) from None
        except CheckpointError as error:
            if self.parent is not None and error.where is not None and self.parent.holds(Path(error.where)):
                raise
            self.checks += [Check(name, False, self._told(error)) for name in names]
        except UsageError as error:
            # What failed already is reported all the same.
            if all(check.passed for check in self.checks):
                raise
            self.checks += [Check(name, False, str(error)) for name in names]
        except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError) as error:
            raise_interruption()
            # The CPU's allocator has no error of its own.
            if "can't allocate memory" in str(error):
                raise _too_little_memory(error) from None
            told = f"cannot be computed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.checks += [Check(name, False, told) for name in names]

    def read_manifest(self) -> None:
        """The manifest, on which the other checks rely; without one integrity has failed."""
        try:
            manifest = read_manifest(self.output)
            check_options(manifest)
            self.manifest = manifest
        except CheckpointError as error:
            self.checks.append(unreadable_manifest(error))

    def integrity(self) -> None:
        """integrity."""
        self.progress("sha256 of all files")
        if self.manifest is not None:
            files = self.manifest.files
            self.make(["integrity"], lambda: [judge_integrity(self.output, files)])

    def opened(
        self, read: Callable[[Checkpoint], object], dtype: str | None, unmade: Sequence[str]
    ) -> Checkpoint | None:
        """The output, if its headers and its config can be read.

        Args:
            read: Raises CheckpointError of a config that cannot be read.
            dtype: The dtype to compute in (default: the output's).
            unmade: The checks that cannot be made otherwise.
        """
        try:
            target = open_checkpoint(self.output)
            read(target)
            main = main_dtype(target, donated=self.manifest is not None and self.manifest.vision_from is not None)
        except CheckpointError as error:
            self.checks.append(Check("config", False, self._told(error)))
            self.skip(unmade, "the output cannot be read")
            return None
        self.dtype = dtype or CONFIG_NAMES.get(main, "float32")
        return target

    def unfit(self, names: Sequence[str], target: Checkpoint) -> bool:
        """Fail checks that cannot be computed, before anything is made of the sizes in the config."""
        fault = next(tensor_faults(target), None)
        if fault is not None:
            told = f"cannot be computed: its tensors are not those that its config implies: {fault}"
            self.checks += [Check(name, False, told) for name in names]
        return fault is not None

    def _told(self, error: CheckpointError) -> str:
        """An error of the output without its folder, which is no part of a record."""
        return (
            error.message if error.where in (None, str(self.output)) else f"{Path(error.where).name}: {error.message}"
        )


def _too_little_memory(error: BaseException) -> UsageError:
    """What is no fault of the output."""
    return UsageError(
        f"there is too little memory for the passes: {str(error).splitlines()[0] if str(error) else 'none is left'}"
    )
