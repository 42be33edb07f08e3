"""`verify`: all checks of one folder, in order, and the report."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from t5g2convert.checkpoint.dtypes import CONFIG_NAMES
from t5g2convert.checkpoint.folder import Checkpoint, check_folder, open_checkpoint, read_json_object
from t5g2convert.checkpoint.hub import Origin
from t5g2convert.checkpoint.manifest import read_manifest
from t5g2convert.checkpoint.sources import percent
from t5g2convert.checkpoint.t5gemma2 import read_t5gemma2
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.parity.changes import change_remarks, on_source_settings
from t5g2convert.parity.config import judge_config, tensor_faults
from t5g2convert.parity.inputs import Inputs
from t5g2convert.parity.integrity import judge_integrity, unreadable_manifest
from t5g2convert.parity.parent import Parent
from t5g2convert.parity.provenance import check_options, judge_provenance, replay
from t5g2convert.parity.record import record_report
from t5g2convert.parity.report import Check, Report
from t5g2convert.parity.runs import judge_runs
from t5g2convert.parity.text import judge_text
from t5g2convert.parity.tokenizer import is_judged, judge_tokenizer
from t5g2convert.parity.vision import judge_vision
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.vision import VisionTower
from t5g2convert.reference.weights import ReadOptions, check_place

Progress = Callable[[str], None]
PARITIES: Final = ("vision_parity", "decoder_parity", "encoder_parity")


def verify(
    output: Path,
    source: Origin | None = None,
    *,
    vision_from: Origin | None = None,
    mapping: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    tolerance: float = 0.0,
    text: Path | None = None,
    image: Path | None = None,
    record: bool = True,
    progress: Progress | None = None,
) -> Report:
    """Judge a conversion with the reference passes.

    Args:
        output: The T5Gemma 2 folder to judge.
        source: The Gemma 3 folder that it was converted from; without it only integrity and runs are checked. A str may
            also be a model of the Hub, which is downloaded.
        vision_from: The folder or model whose vision tower the conversion was given, if it was.
        mapping: The map that the conversion was made with, if not the shipped one for the source's model type.
        dtype: Dtype to compute in, `bfloat16`, `float16` or `float32` (default: the output's).
        device: Device to compute on, `cpu` or `cuda`.
        tolerance: Largest difference that passes, as a part of the largest value; 0 is exact.
        text: A text file to read in place of seeded tokens, with the output's tokenizer.
        image: A picture file to look at in place of seeded pixels.
        record: Write the result into the output's t5g2.json.
        progress: Told what is being done.

    Raises:
        CheckpointError: The source is not sound, or the output is no folder.
        HubError: The Hub does not have the source or give it out, or cannot be reached.
        MappingError: The map is faulty.
        UsageError: An argument has no meaning.
    """
    check_place(dtype, device)
    if not 0 <= tolerance < 1:
        raise UsageError(f"a tolerance of {tolerance} has no meaning", hint="0 is exact; 1e-3 lets pass a thousandth")
    check_folder(output)
    # Faults of the source, of the map and of the inputs are not the output's: they end the work before any check.
    if source is None and vision_from is not None:
        raise UsageError("a donor of a vision tower was given, and no source")
    parent = None if source is None else Parent(source, vision_from)
    inputs = Inputs(text, image)
    inputs.check(output, parent)
    judge = _Judge(output, parent, inputs, device, tolerance, progress or _silent)
    judge.read_manifest()
    if parent is not None and parent.donor is None and "vision_from" in judge.manifest:
        raise UsageError("its vision tower is from another checkpoint", hint="give that one with --vision-from")
    # Asked of the converter now, since a map that does not fit is no fault of the output either.
    prove = None
    if parent is not None:
        plan = replay(parent.sources, judge.manifest, mapping)
        size = parent.sources.size(parent.sources.missing(plan.reads))
        parent.sources.fetch(plan.reads, percent("download", size, judge.progress))
        prove = partial(judge_provenance, plan)
    judge.integrity()
    target = judge.opened(dtype)
    if target is not None:
        if parent is None or prove is None:
            judge.skip(("provenance", "config", "tokenizer", *PARITIES), "no source was given")
        else:
            judge.against(parent, prove, target)
        judge.alone(target)
    report = judge.report()
    # What was not compared with its source proves nothing that is worth keeping.
    return record_report(report, judge.manifest) if record and judge.manifest and report.complete else report


class _Judge:
    """A verification under way: the checks made so far, and what they are made with."""

    def __init__(
        self, output: Path, parent: Parent | None, inputs: Inputs, device: str, tolerance: float, progress: Progress
    ) -> None:
        self.output = output
        self.parent = parent
        self.inputs = inputs
        self.device = device
        self.tolerance = tolerance
        self.progress = progress
        self.manifest: Mapping[str, Any] = {}
        self.dtype: str | None = None
        self.checks: list[Check] = []
        self.skipped: dict[str, str] = {}
        self.remarks: list[str] = []

    @property
    def projector(self) -> str | None:
        """How the projector of a grafted tower was made, as the manifest tells."""
        return self.manifest.get("options", {}).get("projector")

    def report(self) -> Report:
        """What was found."""
        return Report(
            output=self.output,
            source=None if self.parent is None else self.parent.folders.source,
            dtype=self.dtype,
            device=self.device,
            tolerance=self.tolerance,
            checks=tuple(self.checks),
            skipped=self.skipped,
            remarks=(*self.remarks, *self.inputs.remarks),
            parameters=self.manifest.get("parameters") or {},
        )

    def skip(self, names: Sequence[str], because: str) -> None:
        """Note checks that are not made."""
        self.skipped |= dict.fromkeys(names, because)

    def make(self, names: Sequence[str], check: Callable[[], list[Check]]) -> None:
        """Make checks; what cannot be read or computed of the output fails them."""
        try:
            self.checks += check()
        except (torch.OutOfMemoryError, MemoryError) as error:
            raise _too_little_memory(error) from None
        except CheckpointError as error:
            if self.parent is not None and error.where is not None and self.parent.holds(Path(error.where)):
                raise
            self.checks += [Check(name, False, self._told(error)) for name in names]
        except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError) as error:
            # The CPU's allocator has no error of its own.
            if "can't allocate memory" in str(error):
                raise _too_little_memory(error) from None
            told = f"cannot be computed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
            self.checks += [Check(name, False, told) for name in names]

    def _told(self, error: CheckpointError) -> str:
        """An error of the output without its folder, which is no part of a record."""
        return (
            error.message if error.where in (None, str(self.output)) else f"{Path(error.where).name}: {error.message}"
        )

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
        if self.manifest:
            self.make(["integrity"], lambda: [judge_integrity(self.output, self.manifest)])

    def opened(self, dtype: str | None) -> Checkpoint | None:
        """The output, if its headers and its config can be read."""
        try:
            target = open_checkpoint(self.output)
            read_t5gemma2(target.config, self.output / "config.json")
        except CheckpointError as error:
            self.checks.append(Check("config", False, self._told(error)))
            self.skip(("provenance", "tokenizer", *PARITIES, "runs"), "the output cannot be read")
            return None
        self.dtype = dtype or CONFIG_NAMES.get(target.dtype, "float32")
        return target

    def against(self, parent: Parent, prove: Callable[..., Check], target: Checkpoint) -> None:
        """All checks that need the source; `prove` is provenance."""
        changes = {change["field"]: change for change in self.manifest.get("changes", ())}
        new_values = {field: change["target"] for field, change in changes.items()}
        self.make(["provenance"], lambda: [prove(parent, target, self.manifest, self.progress)])
        self.make(["config"], lambda: [self._config(parent, target, new_values)])
        self._tokens(parent, target)
        self.remarks += change_remarks(changes)
        dtype = getattr(torch, str(self.dtype))
        rounded_to = getattr(torch, changes["dtype"]["target"]) if "dtype" in changes else None
        reading: ReadOptions = {"dtype": dtype, "device": self.device, "rounded_to": rounded_to}
        gemma, tower = Gemma3Reference(parent.checkpoint, **reading), parent.tower(**reading)
        if tower is None:
            self.skip(["vision_parity"], "the source has no images")
        if self._unfit(PARITIES if tower is not None else PARITIES[1:], target):
            return

        def passes() -> list[Check]:
            settled = on_source_settings(target, changes)
            t5gemma = T5Gemma2Reference(target, dtype=dtype, device=self.device, model=settled)
            features = None if tower is None else self._look(tower, t5gemma)
            batch = self.inputs.batch(t5gemma)
            # With a tower from elsewhere there is no Gemma 3 that reads text and images.
            seen = features is not None and parent.donor is None
            images = self.inputs.image_batch(t5gemma, features) if seen and features is not None else None
            return judge_text(gemma, t5gemma, batch, images, tolerance=self.tolerance, progress=self.progress)

        self.make(PARITIES[1:], passes)

    def alone(self, target: Checkpoint) -> None:
        """runs."""
        if self._unfit(["runs"], target):
            return
        dtype = getattr(torch, str(self.dtype))

        def use() -> list[Check]:
            t5gemma = T5Gemma2Reference(target, dtype=dtype, device=self.device)
            return [judge_runs(t5gemma, dtype, blind=self.projector == "zeros", progress=self.progress)]

        self.make(["runs"], use)

    def _unfit(self, names: Sequence[str], target: Checkpoint) -> bool:
        """Fail checks that cannot be computed, before anything is made of the sizes in the config."""
        fault = next(tensor_faults(target), None)
        if fault is not None:
            told = f"cannot be computed: its tensors are not those that its config implies: {fault}"
            self.checks += [Check(name, False, told) for name in names]
        return fault is not None

    def _look(self, tower: VisionTower, t5gemma: T5Gemma2Reference) -> Tensor | None:
        """vision_parity; the image features of the source's tower, if the target has one too."""
        pixels = self.inputs.pixels(tower).to(self.device)
        features: list[Tensor] = []

        def look() -> list[Check]:
            if t5gemma.vision is None:
                return [Check("vision_parity", False, "the source has a vision tower, the target a stub of no layers")]
            check, seen = judge_vision(
                tower,
                t5gemma.vision,
                pixels,
                projected=self.projector in (None, "copy"),
                tolerance=self.tolerance,
                progress=self.progress,
            )
            features.append(seen)
            return [check]

        self.make(["vision_parity"], look)
        return features[0] if features else None

    def _config(self, parent: Parent, target: Checkpoint, changes: Mapping[str, Any]) -> Check:
        name = "generation_config.json"
        given = parent.folders.source / name
        ends = read_json_object(given).get("eos_token_id") if given.exists() else None
        return judge_config(
            parent.model(self.projector), target, read_json_object(target.path / name), changes, ends=ends
        )

    def _tokens(self, parent: Parent, target: Checkpoint) -> None:
        """tokenizer."""

        def compare() -> list[Check]:
            if not is_judged(target.path, self.manifest):
                self.skip(["tokenizer"], "the output has no tokenizer")
                return []
            return [judge_tokenizer(parent.folders, parent.model(self.projector), target, self.manifest)]

        self.make(["tokenizer"], compare)


def _too_little_memory(error: BaseException) -> UsageError:
    """What is no fault of the output."""
    return UsageError(
        f"there is too little memory for the passes: {str(error).splitlines()[0] if str(error) else 'none is left'}"
    )


def _silent(_: str) -> None:
    """No progress is shown."""
