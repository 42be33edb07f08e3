"""`verify`: all checks of one folder, in order, and the report."""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families.t5gemma2 import MODEL_TYPE
from t5g2convert.checkpoint.folder import Checkpoint, check_folder, read_json_object
from t5g2convert.checkpoint.hub.model import Origin, parse_id
from t5g2convert.checkpoint.inputs import DECODER_FROM, SOURCE, VISION_FROM
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, Manifest, SourceRecord
from t5g2convert.checkpoint.sources import Sources, percent
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.parity.batches import Inputs
from t5g2convert.parity.checks.manifest_check import maker_remarks
from t5g2convert.parity.checks.provenance import judge_provenance, planned, planned_adapted
from t5g2convert.parity.mistaken_source import check_manifest_fits, remark_on_source
from t5g2convert.parity.reports.record import record_report
from t5g2convert.parity.reports.report import Check, Report
from t5g2convert.parity.session import Judge
from t5g2convert.parity.suites.adapted import Adapted
from t5g2convert.parity.suites.base import Kind
from t5g2convert.parity.suites.extracted import ToEncoder, ToGemma3
from t5g2convert.parity.suites.t5gemma import ToT5Gemma
from t5g2convert.parity.suites.t5gemma2 import ToT5Gemma2
from t5g2convert.parity.suites.trained_elsewhere import is_trained_elsewhere, judge_trained_elsewhere
from t5g2convert.progress import Steps, silent
from t5g2convert.reference.weights import check_device

KINDS: Final[tuple[Kind[Any], ...]] = (ToT5Gemma2(), ToT5Gemma(), ToEncoder(), ToGemma3(), Adapted())
"""The kinds of conversion that are known; the first is what a folder is taken for that is none of them."""


def verify(
    output: Path,
    source: Origin | None = None,
    *,
    decoder_from: Origin | None = None,
    vision_from: Origin | None = None,
    mapping: str | None = None,
    dtype: str | None = None,
    device: str = "cpu",
    tolerance: float = 0.0,
    text: Path | None = None,
    image: Path | None = None,
    frozen: Sequence[str] = (),
    record: bool = True,
    progress: Steps | None = None,
) -> Report:
    """Judge a conversion with the reference passes.

    Args:
        output: The converted folder to judge.
        source: The folder that it was converted from; without it only integrity and runs are checked. A str may
            also be a model of the Hub, which is downloaded.
        decoder_from: The folder or model whose layers the decoder was given, if it was.
        vision_from: The folder or model whose vision tower the conversion was given, if it was.
        mapping: The map that the conversion was made with, if not the shipped one for the source's model type.
        dtype: Dtype to compute in, `bfloat16`, `float16` or `float32` (default: the output's).
        device: Device to compute on, `cpu` or `cuda`.
        tolerance: Largest difference that passes, as a part of the largest value; 0 is exact.
        text: A text file to read in place of seeded tokens, with the output's tokenizer.
        image: A picture file to look at in place of seeded pixels.
        frozen: Of a folder that was trained elsewhere: parts or layers that were frozen on purpose; see
            `judge_trained_elsewhere`.
        record: Write the result into the output's t5g2.json.
        progress: Told what is being done.

    Raises:
        CheckpointError: The source is not sound, or the output is no folder.
        HubError: The Hub does not have the source or give it out, or cannot be reached.
        MappingError: The map is faulty.
        UsageError: An argument has no meaning.
    """
    check_device(dtype, device)
    if not 0 <= tolerance < 1:
        raise UsageError(f"a tolerance of {tolerance} has no meaning", hint="0 is exact; 1e-3 lets pass a thousandth")
    check_folder(output)
    # Faults of the source, of the map and of the inputs are not the output's: they end the work before any check.
    if source is None and (decoder_from, vision_from) != (None, None):
        raise UsageError("another checkpoint was given, and no source")
    sources = None if source is None else Sources.open(source, decoder_from=decoder_from, vision_from=vision_from)
    if sources is not None and is_trained_elsewhere(output, sources.source):
        _check_unused({
            "--decoder-from": decoder_from, "--vision-from": vision_from, "--mapping": mapping, "--text": text,
            "--image": image, "--tolerance": tolerance or None,
        })  # fmt: skip
        return judge_trained_elsewhere(
            output,
            sources,
            frozen=frozen,
            dtype=dtype,
            device=device,
            inputs=Inputs(None, None),
            progress=progress or silent,
        )
    if frozen:
        raise UsageError(
            "--frozen is for a folder that was trained elsewhere",
            hint="give that folder, which has no t5g2.json, and the T5Gemma 2 that was trained as --source",
        )
    if sources is not None:
        check_manifest_fits(output, sources.source)
    kind = kind_of(output, None if sources is None else sources.source)
    parent = None if sources is None else kind.parent(sources)
    inputs = Inputs(text, image)
    inputs.check(output, parent)
    judge = Judge(output, parent, inputs, device, tolerance, progress or silent)
    judge.read_manifest()
    if sources is not None and (remark := remark_on_source(output, sources.source)):
        judge.remarks.append(remark)
    trained = judge.manifest is not None and judge.manifest.adaptation is not None
    if sources is not None and trained and not isinstance(kind, Adapted):
        raise UsageError(
            f"it was trained further, from another model than {sources.source.name}",
            hint="give the T5Gemma 2 that was trained; t5g2 compare measures how far it is from a Gemma 3",
        )
    origins = {SOURCE: source, DECODER_FROM: decoder_from, VISION_FROM: vision_from}
    if sources is not None and judge.manifest is not None:
        _check_roles(sources, judge.manifest)
        for role, checkpoint in sources.by_role.items():
            told = judge.manifest.sources[role]
            _check_commit(origins[role], checkpoint, told)
            if told.hub is not None and checkpoint.hub is None:
                judge.remarks.append(
                    f"that the {role} is {told.hub.repo} of the Hub was not looked at: a folder was given"
                )
    # Asked of the converter now, since a map that does not fit is no fault of the output either.
    plan = lie = None
    if parent is not None:
        if isinstance(kind, Adapted):
            plan, lie = planned_adapted(parent.sources, judge.manifest)
        else:
            plan, lie = planned(parent.sources, judge.manifest, mapping, kind.part)
        size = parent.sources.size(parent.sources.missing(plan.reads))
        parent.sources.fetch(plan.reads, percent("download", size, judge.progress))
    judge.integrity()
    target = judge.opened(kind.read, dtype, ("provenance", "tokenizer", *kind.parities, "runs"))
    if target is not None:
        if judge.dtype == "float16":
            judge.remarks.append(
                "computed in float16, which a real Gemma 3 may overflow with other inputs; --dtype float32 does not"
            )
        if parent is None or plan is None:
            judge.skip(("provenance", "config", "tokenizer", *kind.parities), "no source was given")
        else:
            # A map of one's own is given by its file.
            shipped = mapping is None or not (mapping.endswith((".yaml", ".yml")) or "/" in mapping)
            prove = partial(judge_provenance, plan, parent, target, judge.manifest, judge.progress, shipped=shipped)
            judge.remarks += [] if judge.manifest is None else maker_remarks(plan, judge.manifest)
            judge.make(["provenance"], lambda: [prove() if lie is None else Check("provenance", False, lie)])
            kind.against(judge, parent, target)
        if not judge.unfit(["runs"], target):
            judge.make(["runs"], lambda: [kind.runs(judge, target)])
    report = judge.report()
    # What was not compared with its source proves nothing that is worth keeping.
    if judge.manifest is None or not (record and report.complete):
        return report
    return record_report(report, judge.manifest)


def _check_unused(options: Mapping[str, object]) -> None:
    """Refuse options that say nothing about a folder that was trained elsewhere; None means not given.

    Raises:
        UsageError: One was given.
    """
    if given := [option for option, value in options.items() if value is not None]:
        raise UsageError(
            f"{', '.join(given)} cannot be used for a folder that was trained elsewhere",
            hint="--source is the T5Gemma 2 that was trained, and --frozen says what was not",
        )


def _check_roles(sources: Sources, manifest: Manifest) -> None:
    """Refuse to judge with other checkpoints than a conversion read."""
    for role, what in ((DECODER_FROM, "decoder"), (VISION_FROM, "vision tower")):
        option = f"--{role.replace('_', '-')}"
        if role in manifest.sources and role not in sources.others:
            raise UsageError(f"its {what} is from another checkpoint", hint=f"give that one with {option}")
        if role in sources.others and role not in manifest.sources:
            raise UsageError(f"its {what} is from no other checkpoint", hint=f"leave {option} out")


def _check_commit(given: Origin | None, checkpoint: Checkpoint, told: SourceRecord) -> None:
    """A branch that has moved on since a conversion is no fault of the conversion, and no proof of it either."""
    hub, found = told.hub, checkpoint.hub
    named = parse_id(given) if isinstance(given, str) else None
    if named is None or named.revision is not None or found is None or hub is None or hub.repo != found.repo:
        return
    if hub.revision != found.revision:
        raise UsageError(
            f"it was made of commit {hub.revision} of {found.repo}, which is at {found.revision} now",
            hint=f"if you trust that commit, give {found.repo}@{hub.revision}",
        )


def kind_of(output: Path, source: Checkpoint | None) -> Kind[Any]:
    """The kind of conversion that a folder is judged as.

    One that the source can have and that leads to such a folder, if there is one. Otherwise either the folder or the
    source is another than it should be: the folder, where its manifest names a source of this family.
    """
    found, family = _told(output / "config.json", "model_type"), _told(output / MANIFEST_FILE, "source", "family")
    leading = [kind for kind in KINDS if found in kind.targets]
    adapted = _told(output / MANIFEST_FILE, "adaptation") is not None
    if source is None:
        return next((kind for kind in leading if isinstance(kind, Adapted) == adapted), (leading or KINDS)[0])
    if not adapted and family not in (None, MODEL_TYPE):
        # It was converted: a T5Gemma 2 is no source of it.
        leading = [kind for kind in leading if not isinstance(kind, Adapted)]
    model_type = source.config.get("model_type")
    possible = [kind for kind in KINDS if model_type in kind.sources]
    both = [kind for kind in leading if kind in possible]
    return (both or (possible if family == model_type or not leading else leading) or KINDS)[0]


def _told(path: Path, *keys: str) -> object:
    """What a JSON file of the output says, None where it says nothing that can be read."""
    try:
        node: Any = read_json_object(path)
    except CheckpointError:
        return None
    for key in keys:
        node = node.get(key) if isinstance(node, dict) else None
    return node
