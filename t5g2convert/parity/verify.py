"""`verify`: choose the suite for a folder, make its checks in order, and report."""

from pathlib import Path
from typing import Any, Final

import torch

from t5g2convert.checkpoint.folder import Checkpoint, check_folder
from t5g2convert.checkpoint.hub.open_and_fetch import Origin
from t5g2convert.checkpoint.manifest import Manifest, read_manifest
from t5g2convert.checkpoint.sources import DECODER_FROM, SOURCE, VISION_FROM, OtherOrigins, Sources, download_progress
from t5g2convert.command_options import takes_options
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.interrupts import raise_interruption
from t5g2convert.parity.batches import Inputs, read_inputs
from t5g2convert.parity.options import VerifyOptions
from t5g2convert.parity.replay import check_options, replay_merge
from t5g2convert.parity.reports.report import Check, Report, Skipped, record_report
from t5g2convert.parity.session import COMPUTE_ERRORS, CheckFunction, Verification
from t5g2convert.parity.suites.base import Suite
from t5g2convert.parity.suites.selection import check_manifest_fits, check_sources, source_remarks, suite_for
from t5g2convert.parity.suites.trained_elsewhere import TRAINED_ELSEWHERE, TrainingStart
from t5g2convert.progress import silent
from t5g2convert.reference.weights import check_device

WITHOUT_SOURCE: Final = ("integrity", "runs")
"""Checks that are made without a source."""


@takes_options(VerifyOptions)
def verify(output: Path, source: Origin | None = None, options: VerifyOptions = VerifyOptions()) -> Report:  # noqa: B008 - frozen
    """Judge a conversion with the reference passes.

    Example:
        >>> report = verify(Path("t5gemma-2-270m"), "google/gemma-3-270m", dtype="float32")
        >>> [check.name for check in report.failed]
        []

    Args:
        output: The folder to judge.
        source: The folder, or model on the Hub, that it was made from; without it, only integrity and runs are checked.
        options: As keyword arguments; see `VerifyOptions`.

    Raises:
        CheckpointError: The source is damaged, or the output is not a folder.
        HubError: The Hub does not have the source, refuses access, or cannot be reached.
        MappingError: The map is faulty.
        UsageError: An argument is not valid.
    """
    check_device(options.dtype, options.device)
    if not 0 <= options.tolerance < 1:
        raise UsageError(f"--tolerance must be between 0 and 1, got {options.tolerance:g}", hint="0 is exact")
    check_folder(output)
    # Faults of the source, the map and the inputs are not the output's, so they are raised before any check.
    others: OtherOrigins = {"decoder_from": options.decoder_from, "vision_from": options.vision_from}
    if source is None and any(origin is not None for origin in others.values()):
        raise UsageError("--decoder-from and --vision-from need --source")
    if source is None and options.adapter is not None:
        raise UsageError("--adapter needs --source, the model that the adapter was merged into")
    sources = None if source is None else Sources.open(source, **others)
    suite = suite_for(output, None if sources is None else sources.source, adapter=options.adapter)
    if suite is TRAINED_ELSEWHERE and sources is not None:
        verification = _of_training(output, sources, options)
    else:
        verification = _of_conversion(output, source, sources, suite, options)
    report = run_checks(suite, verification)
    # A result without the source proves nothing worth keeping.
    if verification.manifest is None or not (options.record and report.complete):
        return report
    return record_report(report, verification.manifest)


def _of_training(output: Path, sources: Sources, options: VerifyOptions) -> Verification[Any]:
    """Prepare the verification of a folder trained elsewhere.

    Raises:
        CheckpointError: The source is damaged.
        UsageError: An option does not apply to folders trained elsewhere, or the model lacks a frozen part.
    """
    applied = {
        "--decoder-from": options.decoder_from, "--vision-from": options.vision_from, "--mapping": options.mapping,
        "--adapter": options.adapter, "--text": options.text, "--image": options.image,
        "--tolerance": options.tolerance or None,
    }  # fmt: skip
    if used := [option for option, value in applied.items() if value is not None]:
        raise UsageError(
            f"{', '.join(used)} cannot be used for a folder that was trained elsewhere",
            hint="--source is the T5Gemma 2 that was trained; use --frozen for parts that were not",
        )
    return Verification(
        output=output,
        known_source=TrainingStart(sources, frozen=options.frozen, progress=options.progress or silent),
        manifest=None,
        manifest_error=None,
        replay=None,
        read_config=TRAINED_ELSEWHERE.read_config,
        inputs=Inputs(),
        passes_dtype=options.dtype,
        device=options.device,
        tolerance=0.0,
        progress=options.progress or silent,
    )


def _of_conversion(
    output: Path,
    source: Origin | None,
    sources: Sources | None,
    suite: Suite,
    options: VerifyOptions,
) -> Verification[Any]:
    """Prepare the verification of a folder that this tool wrote.

    Raises:
        CheckpointError: The source is damaged or of another family, or the manifest describes other files.
        MappingError: The map is faulty.
        UsageError: An option, the text or the picture does not fit, or the conversion read other checkpoints.
    """
    if options.frozen:
        raise UsageError(
            "--frozen applies only to folders that were trained elsewhere",
            hint="pass such a folder, without t5g2.json, and the T5Gemma 2 it was trained from as --source",
        )
    if sources is not None:
        check_manifest_fits(output, sources.source)
    model = None if sources is None else suite.open_source(sources)
    inputs = read_inputs(
        options.text, options.image, output, None if model is None else model.vision, with_source=model is not None
    )
    manifest, manifest_error = _manifest_of(output)
    remarks: tuple[str, ...] = ()
    replay = None
    if sources is not None and suite.replay is not None:
        remarks = source_remarks(output, sources.source)
        _check_kind(manifest, suite, sources.source, options)
        origins = {SOURCE: source, DECODER_FROM: options.decoder_from, VISION_FROM: options.vision_from}
        if manifest is not None:
            remarks = (*remarks, *check_sources(sources, origins, manifest))
        if suite.merged:
            replay = replay_merge(sources, manifest, adapter=options.adapter)
        else:
            replay = suite.replay(sources, manifest, options.mapping)
        size = sources.size(sources.missing(replay.plan.reads))
        sources.fetch(replay.plan.reads, download_progress(size, options.progress or silent))
    return Verification(
        output=output,
        known_source=model,
        manifest=manifest,
        manifest_error=manifest_error,
        replay=replay,
        read_config=suite.read_config,
        inputs=inputs,
        passes_dtype=options.dtype,
        device=options.device,
        tolerance=options.tolerance,
        progress=options.progress or silent,
        remarks=remarks,
    )


def _check_kind(manifest: Manifest | None, suite: Suite, source: Checkpoint, options: VerifyOptions) -> None:
    """Refuse a source or an adapter that a folder of this kind cannot come from.

    Raises:
        UsageError: The source is of another family than the model that was trained or merged, or an adapter is missing.
    """
    if not suite.trained:
        if options.adapter is not None or (manifest is not None and manifest.merged is not None):
            raise UsageError(
                f"an adapter is merged into a T5Gemma 2; pass that as --source, not {source.name}",
                hint="to compare it with a Gemma 3, use t5g2 compare",
            )
        if manifest is not None and manifest.adaptation is not None:
            raise UsageError(
                f"OUTPUT was trained after conversion; pass the T5Gemma 2 it was trained from, not {source.name}",
                hint="to compare it with a Gemma 3, use t5g2 compare",
            )
    if suite.merged and options.adapter is None:
        raise UsageError("OUTPUT is a model with a merged adapter", hint="pass the adapter with --adapter")


def _manifest_of(output: Path) -> tuple[Manifest | None, CheckpointError | None]:
    """Return the manifest for the checks; None and the reason if it is missing or not valid."""
    try:
        manifest = read_manifest(output)
        check_options(manifest)
    except CheckpointError as error:
        return None, error
    return manifest, None


def run_checks(suite: Suite, verification: Verification[Any]) -> Report:
    """Make the checks of a suite in order, and report.

    If the folder cannot be read, `config` fails in place of all checks after integrity. Without a source, only
    `WITHOUT_SOURCE` are made.

    Raises:
        CheckpointError: The source is at fault.
        UsageError: Memory or the dtype of the passes is at fault, and no check has failed yet.
    """
    checks: list[Check] = []
    skipped: dict[str, str] = {}
    unreadable: CheckpointError | None = None
    for name, function in suite.checks.items():
        result: Check | Skipped | None
        if unreadable is not None:
            result = Skipped("the output cannot be read")
            if name == "config":
                result = Check("config", False, _message(unreadable, verification))
        elif verification.known_source is None and name not in WITHOUT_SOURCE:
            result = Skipped("no source was given")
        else:
            result = run_check(name, function, verification, any_failed=any(not check.passed for check in checks))
        if isinstance(result, Check):
            checks.append(result)
        elif result is not None:
            skipped[name] = result.because
        if name == "integrity":
            unreadable = _unreadable(verification)
    readable = unreadable is None
    remarks = [*verification.remarks, *(suite.remarks(verification) if readable else ())]
    return Report(
        output=verification.output,
        source=None if verification.known_source is None else verification.known_source.folders.source,
        dtype=verification.dtype if readable else None,
        device=verification.device,
        tolerance=verification.tolerance,
        checks=tuple(checks),
        skipped=skipped,
        remarks=(*remarks, *(remark for check in checks for remark in check.remarks)),
        parameters={} if verification.manifest is None else verification.manifest.parameters,
    )


def run_check(
    name: str, function: CheckFunction, verification: Verification[Any], *, any_failed: bool
) -> Check | Skipped | None:
    """Make one check; it fails where the output cannot be read or computed.

    Raises:
        CheckpointError: The source is at fault.
        UsageError: Memory or the dtype of the passes is at fault, and no check has failed yet.
    """
    try:
        return function(verification)
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise _too_little_memory(error) from None
    except CheckpointError as error:
        source = verification.known_source
        if source is not None and error.where is not None and source.holds(Path(error.where)):
            raise
        return Check(name, False, _message(error, verification))
    except UsageError as error:
        # After a failed check there is something to report.
        if not any_failed:
            raise
        return Check(name, False, str(error))
    except COMPUTE_ERRORS as error:
        raise_interruption()
        # The CPU's allocator has no error class of its own.
        if "can't allocate memory" in str(error):
            raise _too_little_memory(error) from None
        reason = " ".join(str(error).split())[:300]
        return Check(name, False, f"cannot be computed: {type(error).__name__}: {reason}")


def _unreadable(verification: Verification[Any]) -> CheckpointError | None:
    """Return why the folder's headers or config cannot be read; None if they can."""
    try:
        _ = verification.dtype
    except CheckpointError as error:
        return error
    return None


def _message(error: CheckpointError, verification: Verification[Any]) -> str:
    """Return the message of an error, without the output's folder: a record has no paths."""
    if error.where in (None, str(verification.output)):
        return error.message
    return f"{Path(str(error.where)).name}: {error.message}"


def _too_little_memory(error: BaseException) -> UsageError:
    return UsageError(
        f"not enough memory for the passes: {str(error).splitlines()[0] if str(error) else 'none is left'}"
    )
