"""provenance: every byte of the output follows from the source and the map, and no source tensor is lost.

The plan comes from the converter (replay.py); the bytes are read and computed here.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.folder import Checkpoint, some
from t5g2convert.checkpoint.manifest import Manifest
from t5g2convert.checkpoint.sources import DECODER_FROM, SOURCE, VISION_FROM, Folders, Role, role_in
from t5g2convert.conversion.plan.types import ContentKind, Plan
from t5g2convert.parity.checks.provenance_bytes import Comparison, compare_bytes
from t5g2convert.parity.checks.provenance_manifest import (
    file_faults,
    header_faults,
    manifest_faults,
    mapping_faults,
    weights_faults,
)
from t5g2convert.parity.replay import Replay
from t5g2convert.parity.reports.report import Check, failed_check
from t5g2convert.parity.source_models import SourceModel

LOSSLESS_CASTS: Final = {("BF16", "F32"), ("F16", "F32")}
"""Casts after which the source can be rebuilt."""

_NAMES: Final[dict[Role, tuple[str, str]]] = {
    SOURCE: ("it", "the source's"),
    DECODER_FROM: ("the decoder's parent", "the decoder's parent's"),
    VISION_FROM: ("the donor", "the donor's"),
}
"""The name of a checkpoint in a sentence, and its possessive; the source goes first."""


def judge_provenance(
    replay: Replay,
    source: SourceModel,
    target: Checkpoint,
    manifest: Manifest | None,
    progress: Callable[[str], None],
) -> Check:
    """Compare the output's bytes with the source's, and account for every source tensor.

    Args:
        replay: The conversion that this version would make of this source and map.
        source: The source, and the donor of its tower if it has one.
        target: The output, open.
        manifest: The output's manifest, if it has one.
        progress: Called with a few words at every step.

    Raises:
        CheckpointError: A file cannot be read.
    """
    if replay.mismatch is not None:
        return Check("provenance", False, replay.mismatch)
    plan, folders = replay.plan, source.folders
    faults = [*header_faults(plan, target), *file_faults(plan, target, manifest), *manifest_faults(plan, manifest)]
    faults += mapping_faults(plan, manifest, shipped=replay.shipped)
    bytes_found = Comparison([], [], [])
    if not faults:
        bytes_found = compare_bytes(plan, folders, source.checkpoint, target, progress, replay.adapter)
        faults += bytes_found.faults
        progress("sha256 of the source's weights")
        faults += weights_faults(plan, folders, manifest)
        faults += _copied_file_faults(plan, folders, target.path)
    coverage = source_coverage(plan, source.checkpoint)
    faults += [
        f"{name} of the source cannot be reconstructed, and the manifest does not declare this"
        for name in coverage["lost"]
    ]
    if faults:
        return failed_check("provenance", "fault(s)", faults)
    return Check("provenance", True, _summary(plan, coverage, bytes_found.residuals, bytes_found.unmoved))


def _copied_file_faults(plan: Plan, folders: Folders, target: Path) -> Iterator[str]:
    """Require that copied files equal the source's; the check `tokenizer` judges files that are rewritten."""
    for name in (file.name for file in plan.files if file.how == "copied"):
        try:
            if folders.path(name).read_bytes() != (target / name).read_bytes():
                yield f"{name} differs from the source's"
        except OSError as error:
            yield f"{name} cannot be read: {error.strerror}"


def source_coverage(plan: Plan, source: Checkpoint) -> dict[str, list[str]]:
    """Group the source's tensors by what became of them: whole, rounded, cut, trained or merged, dropped, or lost."""
    exact: dict[str, list[tuple[int, int]]] = defaultdict(list)
    rounded: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for tensor in plan.tensors:
        content = tensor.content
        if content.source is not None and content.kind in ("copy", "cast"):
            whole = content.kind == "copy" or (content.dtype, tensor.dtype) in LOSSLESS_CASTS
            (exact if whole else rounded)[content.source.file].append((content.source.start, content.source.end))
    declared = {drop.name for drop in plan.dropped}
    trained = {tensor.origin for tensor in plan.tensors if tensor.content.kind in ("given", "merged")}
    cut = any(change.field == "vocab_size" for change in plan.changes)
    coverage: dict[str, list[str]] = {kind: [] for kind in ("whole", "rounded", "cut", "trained", "dropped", "lost")}
    for name, stored in source.tensors.items():
        start, end = stored.entry.start, stored.entry.end
        held = [
            max((stop for first, stop in ranges[stored.file] if first == start), default=start)
            for ranges in (exact, rounded)
        ]
        if name in trained:
            kind = "trained"
        elif held[0] == end:
            kind = "whole"
        elif held[1] == end:
            kind = "rounded"
        elif max(held) > start and cut:
            kind = "cut"
        else:
            kind = "dropped" if name in declared else "lost"
        coverage[kind].append(name)
    return coverage


def _summary(
    plan: Plan,
    coverage: Mapping[str, list[str]],
    residuals: Sequence[tuple[float, float]],
    unmoved: Sequence[str],
) -> str:
    """Summarize in a sentence what the output consists of and what became of the source."""
    kinds: Counter[tuple[ContentKind, Role]] = Counter()
    for tensor in plan.tensors:
        source = tensor.content.source
        kinds[tensor.content.kind, SOURCE if source is None else role_in(source.file)] += 1
    phrases: dict[ContentKind, str] = {
        "copy": "tensors are {owner} byte for byte",
        "cast": f"are {{owner}} in {plan.dtype}, as declared",
        "scaled_row": "is a row of {it}, scaled",
        "zeros": "is zeros" if kinds["zeros", SOURCE] == 1 else "are zeros",
        "filled": "has one value, as declared",
        "aligned": f"is {{owner}}, aligned ({', '.join(map(_residual, residuals))})",
        "given": "tensors were trained and are finite; their values are not judged",
        "merged": "tensors are {owner} plus the adapter's product, rounded once",
    }
    parts = [
        f"{kinds[kind, role]} {phrase.format(owner=owner, it=it)}"
        for kind, phrase in phrases.items()
        for role, (it, owner) in _NAMES.items()
        if kinds[kind, role]
    ]
    summary = ", ".join([*parts[:1], *(part.replace(" tensors ", " ", 1) for part in parts[1:])])
    if unmoved:
        summary += f"; {len(unmoved)} of them still have the source's values: {some(unmoved)}"
    if coverage["whole"]:
        summary += f"; {len(coverage['whole'])} of the source can be reconstructed"
    if coverage["rounded"]:
        summary += f"; {len(coverage['rounded'])} of the source were rounded"
    if coverage["cut"]:
        summary += f"; the rows cut from {', '.join(coverage['cut'])} are omitted, as declared"
    if coverage["dropped"]:
        summary += f"; {len(coverage['dropped'])} were dropped, as declared"
    return summary


def _residual(bounds: tuple[float, float]) -> str:
    """Return the residual of the alignment as a share of the source's table: 0 is a perfect fit, 1 is no fit."""
    lower, upper = (f"{bound:.3g}" for bound in bounds)
    return f"residual {upper}" if lower == upper else f"residual at most {upper}"
