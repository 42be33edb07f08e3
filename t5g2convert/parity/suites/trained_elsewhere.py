"""The checks of a T5Gemma 2 trained elsewhere, in a folder written by `save_pretrained` of transformers or peft.

Without a t5g2.json there is no record of the training, but some things hold after any training. Settings and tokens
keep their meaning. Frozen parts equal the start's bit for bit. Trained parts have moved but are still near the start.
This finds a known failure: transformers' Trainer loses the encoder on resume, and only warns
(huggingface/transformers#48805); the encoder is then the start's, or random.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, Final

from t5g2convert.checkpoint.families.registry import expected_tensors
from t5g2convert.checkpoint.families.t5gemma2 import ENCODER_TYPE, MODEL_TYPE
from t5g2convert.checkpoint.families.t5gemma2_spellings import HEADED, Published, as_published
from t5g2convert.checkpoint.file_names import GENERATION_FILE
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.manifest import MANIFEST_FILE
from t5g2convert.checkpoint.sources import SOURCE, Sources, download_progress
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.parity.checks.config import tensor_faults
from t5g2convert.parity.checks.resaved_config import judge_resaved_config, meaning
from t5g2convert.parity.checks.resaved_tokenizer import READ, judge_resaved_tokenizer
from t5g2convert.parity.checks.runs import judge_dependence, judge_runs
from t5g2convert.parity.checks.trained_parts import NONE, PARTS, TRAINED, judge_part, layer_of
from t5g2convert.parity.movement import Movement, differing, movements
from t5g2convert.parity.reports.report import Check, Skipped, failed_check
from t5g2convert.parity.session import Shared, Verification
from t5g2convert.parity.source_models import SourceModel
from t5g2convert.parity.suites.base import Suite
from t5g2convert.reference.t5gemma2 import EncoderReference, T5Gemma2Reference
from t5g2convert.reference.weights import DTYPES

FROZEN: Final = ("vision",)
"""Parts that are frozen by default, as SigLIP is in the paper."""

PROJECTOR: Final = "mm_input_projection_weight"

NOT_ONE_MODEL: Final = Skipped("its tensors do not form one model")


class TrainingStart(SourceModel):
    """The T5Gemma 2 that was trained.

    Attributes:
        start: The same model under published names.
        frozen: Names of the tensors that must not have moved.

    Args:
        sources: Only the model.
        frozen: Parts, or layers like `encoder.layers.0`, that were frozen on purpose in addition to the vision tower;
            `none` if that was trained too.
        progress: Called with the percentage of a download.

    Raises:
        CheckpointError: The model lacks a tensor.
        UsageError: A frozen part is not a part or layer of the model.
    """

    def __init__(self, sources: Sources, *, frozen: Sequence[str], progress: Callable[[str], None]) -> None:
        whole = as_published(sources.source).checkpoint
        if fault := next(tensor_faults(whole), None):
            message = f"its tensors do not match its config: {fault}"
            raise CheckpointError(message, where=sources.source.path)
        self.frozen = frozen_names(frozen, whole)
        names = [*sources.source.files, *(name for name in (*READ, GENERATION_FILE) if sources.source.holds(name))]
        size = sources.size(sources.missing({SOURCE: names}))
        super().__init__(sources.fetch({SOURCE: names}, download_progress(size, progress)))
        self.start = as_published(self.checkpoint).checkpoint


def frozen_names(frozen: Sequence[str], start: Checkpoint) -> frozenset[str]:
    """Return the names of the tensors that must equal the start's.

    Args:
        frozen: Parts, layers, or `none`.
        start: The model that was trained, under its published names.

    Raises:
        UsageError: An entry is not a part or layer of the model.
    """
    items = list(expected_tensors(start.config, start.path / "config.json"))
    held = [*([] if NONE in frozen else FROZEN), *(each for each in frozen if each != NONE)]
    found: set[str] = set()
    for each in held:
        names = {item.name for item in items if each in (item.part, layer_of(item.name))}
        if not names:
            raise UsageError(
                f"--frozen {each} is not a part or layer of {start.name}",
                hint=f"expected {', '.join(PARTS)}, {NONE}, or a layer like encoder.layers.0",
            )
        found |= names
    return frozenset(found)


def _integrity(verification: Verification[TrainingStart]) -> Skipped:
    copied = " (this is a copy of the start's)" if is_there(verification.output / MANIFEST_FILE) else ""
    return Skipped(f"trained elsewhere: no {MANIFEST_FILE} records these files{copied}")


@Shared
def _published(verification: Verification[TrainingStart]) -> Published:
    """The output's tensors under published names."""
    return as_published(verification.target)


def _tensors(verification: Verification[TrainingStart]) -> Check:
    """Require every tensor once, with its shape, and tied copies with equal values."""
    raw, published = verification.target, _published(verification)
    target = published.checkpoint
    faults = list(tensor_faults(target))
    faults += [f"{name} is not a tensor of this model" for name in published.unexpected]
    named = raw.config.get("architectures")
    headed = isinstance(named, list) and any(each in HEADED for each in named)
    if not headed:
        faults += [f"{name} is a head that {_class_of(named)} does not have" for name in published.heads]
    faults += [
        f"{name} has dtype {stored.entry.dtype}, expected one of {', '.join(DTYPES)}"
        for name, stored in raw.tensors.items()
        if stored.entry.dtype not in DTYPES
    ]
    for name, repeated in published.copies.items():
        if repeated in target.tensors and differing(raw, name, target, repeated):
            faults.append(f"{name} is a tied copy of {repeated}, but has other values")
    if faults:
        return failed_check("tensors", "tensor(s) that do not belong to the model", faults)
    heads = f", and {len(published.heads)} of a head that no other class loads" if published.heads else ""
    respelled = "" if not published.respelled else ", under other names than the published ones"
    return Check("tensors", True, f"{len(target.tensors)} tensors, each once{respelled}{heads}")


def _class_of(named: object) -> str:
    return str(named[0]) if isinstance(named, list) and named else "the model"


def _config(verification: Verification[TrainingStart]) -> Check:
    return judge_resaved_config(verification.source.checkpoint, verification.target)


def _tokenizer(verification: Verification[TrainingStart]) -> Check | Skipped:
    if (published := _published.if_known(verification)) is None:
        return NOT_ONE_MODEL
    target = published.checkpoint
    table = next(stored for name, stored in target.tensors.items() if name.endswith("embed_tokens.weight"))
    found = judge_resaved_tokenizer(verification.source.checkpoint.path, target, rows=table.entry.shape[0])
    return Skipped("tokenizer.json is missing: copy the start's tokenizer") if found is None else found


@Shared
def _movements(verification: Verification[TrainingStart]) -> Mapping[str, Mapping[str, Movement]]:
    """The movement of every tensor by part and name."""
    start, target = verification.source.start, _published(verification).checkpoint
    items = list(expected_tensors(start.config, start.path / "config.json"))
    found: dict[str, dict[str, Movement]] = {part: {} for part in PARTS if any(item.part == part for item in items)}
    for number, (item, each) in enumerate(movements(items, start, target)):
        if number % 20 == 0:
            verification.progress(f"how far tensor {number} of {len(items)} has moved")
        found[item.part][item.name] = each
    return found


def _part(verification: Verification[TrainingStart], part: str) -> Check | Skipped | None:
    """Judge one part; return None if the model does not have it."""
    if _published.if_known(verification) is None:
        return NOT_ONE_MODEL
    found = _movements(verification)
    if part not in found:
        return None
    moved = {name for name, each in found.items() if not all(movement.still for movement in each.values())}
    check = judge_part(part, found[part], verification.source.frozen, moved_parts=moved)
    return check.remarked(_unrelated_remarks(verification)) if part == "embedding" else check


def _unrelated_remarks(verification: Verification[TrainingStart]) -> Iterator[str]:
    """Yield a remark if no part of the model is near its start: it was then trained from another model."""
    found = _movements(verification)
    judged = [found[part].values() for part in ("embedding", *TRAINED) if found.get(part)]
    if all(any(each.unrelated for each in movements) for movements in judged):
        name = verification.source.start.name
        yield f"no part of it is close to {name}: if it was trained from another model, pass that as --source"


def _runs(verification: Verification[TrainingStart]) -> Check | Skipped:
    """Run the model as an encoder-decoder, or as a standalone encoder."""
    if (published := _published.if_known(verification)) is None:
        return NOT_ONE_MODEL
    target, start = published.checkpoint, verification.source.start
    if fault := next(tensor_faults(target), None):
        detail = f"cannot be computed: its tensors do not match its config: {fault}"
        return Check("runs", False, detail)
    if target.config.get("model_type") == ENCODER_TYPE:
        alone = EncoderReference(target, **verification.reading())
        return judge_dependence(alone, "states", alone.encode)
    model = T5Gemma2Reference(target, **verification.reading())
    blind = model.vision is not None and _is_blind(target) and _is_blind(start)
    check = judge_runs(model, blind=blind, progress=verification.progress)
    return check.remarked(["its projector is zeros, as at the start: images have no effect"] if blind else [])


def _is_blind(checkpoint: Checkpoint) -> bool:
    """Return whether the projector is all zeros."""
    items = expected_tensors(checkpoint.config, checkpoint.path / "config.json")
    projector = next(each for each in items if each.name.endswith(PROJECTOR))
    ((_, movement),) = movements([projector], checkpoint, checkpoint)
    return not movement.found


def _remarks(_: Verification[Any]) -> Iterator[str]:
    yield "trained elsewhere: neither the training data nor the quality of the model is judged"


TRAINED_ELSEWHERE: Final = Suite(
    sources=(MODEL_TYPE, ENCODER_TYPE),
    targets=(MODEL_TYPE, ENCODER_TYPE),
    open_source=SourceModel,
    read_config=meaning,
    replay=None,
    checks={
        "integrity": _integrity,
        "tensors": _tensors,
        "config": _config,
        "tokenizer": _tokenizer,
        **{part: partial(_part, part=part) for part in PARTS},
        "runs": _runs,
    },
    remarks=_remarks,
)
"""A T5Gemma 2 or its encoder that another program trained; `suite_for` recognises it by its source."""
