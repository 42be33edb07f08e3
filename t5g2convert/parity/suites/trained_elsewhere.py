"""How a T5Gemma 2 is judged that was trained elsewhere: a folder that `save_pretrained` of transformers or peft wrote.

It has no t5g2.json, so nothing says what was done to it; but what must hold of any training can be seen. Settings and
tokens mean what they meant at the start. Parts that were frozen are the start's, bit for bit. Parts that were trained
are the start's no longer, and still near it: transformers' Trainer loses the encoder on resume and with
load_best_model_at_end (huggingface/transformers#48805), and only warns; it leaves the encoder as it was at the start,
or a random one.
"""

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final

from t5g2convert.checkpoint.families.registry import implied_tensors
from t5g2convert.checkpoint.families.t5gemma2 import ENCODER_TYPE, MODEL_TYPE
from t5g2convert.checkpoint.families.t5gemma2_spellings import HEADED, Published, as_published, is_t5gemma2
from t5g2convert.checkpoint.file_names import GENERATION_FILE
from t5g2convert.checkpoint.file_store import is_there
from t5g2convert.checkpoint.folder import Checkpoint, read_json_object
from t5g2convert.checkpoint.inputs import SOURCE
from t5g2convert.checkpoint.manifest import MANIFEST_FILE, unverified
from t5g2convert.checkpoint.sources import Sources, percent
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.parity.batches import Inputs
from t5g2convert.parity.checks.config import tensor_faults
from t5g2convert.parity.checks.integrity import fits_its_files
from t5g2convert.parity.checks.movement import Movement, by_layer, differing, movements, together
from t5g2convert.parity.checks.resaved_config import judge_resaved_config, meaning
from t5g2convert.parity.checks.resaved_tokenizer import READ, judge_resaved_tokenizer
from t5g2convert.parity.checks.runs import judge_dependence, judge_runs
from t5g2convert.parity.parents import Parent
from t5g2convert.parity.reports.report import Check, Report, refused
from t5g2convert.parity.session import Judge
from t5g2convert.reference.t5gemma2 import EncoderReference, T5Gemma2Reference
from t5g2convert.reference.weights import DTYPES

PARTS: Final = ("vision", "projector", "embedding", "encoder", "decoder")
"""Parts that are judged, each by a check of its own, in this order."""

TRAINED: Final = ("encoder", "decoder")
"""Parts that every training moves unless they were frozen; LoRA and many recipes leave the other ones alone."""

FROZEN: Final = ("vision",)
"""Parts that are taken to be frozen: SigLIP is, in the paper."""

NONE: Final = "none"
"""In place of a part: not even the vision tower was frozen."""

PROJECTOR: Final = "mm_input_projection_weight"

LOST: Final = (
    "transformers' Trainer puts the encoder back to the start on resume and with load_best_model_at_end "
    "(huggingface/transformers#48805)"
)

_LAYER: Final = re.compile(
    r"(?:model\.)?(?:(encoder|decoder)\.)?(vision_tower\.vision_model\.encoder\.)?layers\.(\d+)\."
)

_ADAPTED: Final = re.compile(r"vision_tower\..*(?:_proj|fc1|fc2)\.")


def is_trained_elsewhere(output: Path, source: Checkpoint) -> bool:
    """Whether a folder claims to be what came of training `source`, with no word of this tool about it.

    It is of the source's model type, and has no t5g2.json; or the source's, copied along, which does not fit it.
    """
    if not is_t5gemma2(source):
        return False
    try:
        if read_json_object(output / "config.json").get("model_type") != source.config.get("model_type"):
            return False
        if not is_there(output / MANIFEST_FILE):
            return True
        theirs, ours = (unverified(read_json_object(folder / MANIFEST_FILE)) for folder in (source.path, output))
    except CheckpointError:
        return False
    # What fits its manifest is a conversion, and was not trained.
    return theirs == ours and not fits_its_files(output, ours)


def judge_trained_elsewhere(
    output: Path,
    sources: Sources,
    *,
    frozen: Sequence[str],
    dtype: str | None,
    device: str,
    inputs: Inputs,
    progress: Callable[[str], None],
) -> Report:
    """All checks of a folder that was trained elsewhere.

    Args:
        output: The folder.
        sources: What was trained, alone.
        frozen: Parts, or layers like `encoder.layers.0`, that were frozen on purpose, beside the vision tower; `none`
            where that was trained too.
        dtype: Dtype to compute in (default: the folder's).
        device: Device to compute on.
        inputs: What the passes read.
        progress: Told what is being done.

    Raises:
        CheckpointError: The source is not sound.
        UsageError: What was frozen is not a part or layer of the model.
    """
    _check_start(sources.source)
    still = frozen_names(frozen, as_published(sources.source).checkpoint)
    sources = _fetched(sources, progress)
    start = as_published(sources.source).checkpoint
    judge = Judge(output, Parent(sources), inputs, device, 0.0, progress)
    copied = " (that is the start's, copied along)" if is_there(output / MANIFEST_FILE) else ""
    judge.skip(["integrity"], f"trained elsewhere: no {MANIFEST_FILE} tells of these files{copied}")
    raw = judge.opened(meaning, dtype, ("tensors", "tokenizer", *PARTS, "runs"))
    if raw is None:
        return judge.report()
    judge.remarks.append("trained elsewhere: on what, and how well, is judged by nothing here")
    found: list[Published] = []
    judge.make(["tensors"], lambda: [_tensors(raw, found)])
    judge.make(["config"], lambda: [_said(judge, judge_resaved_config(sources.source, raw))])
    if not found:
        judge.skip(["tokenizer", *PARTS, "runs"], "its tensors are not those of one model")
        return judge.report()
    target = found[0].checkpoint
    judge.make(["tokenizer"], lambda: _tokenizer(judge, sources.source, target))
    judge.make(PARTS, lambda: _parts(judge, start, target, still))
    if not judge.unfit(["runs"], target):
        judge.make(["runs"], lambda: [_runs(judge, start, target)])
    return judge.report()


def _check_start(source: Checkpoint) -> None:
    """The start itself must be whole, in any spelling.

    Raises:
        CheckpointError: It is not.
    """
    fault = next(tensor_faults(as_published(source).checkpoint), None)
    if fault is not None:
        raise CheckpointError(f"its tensors are not those that its config implies: {fault}", where=source.path)


def frozen_names(frozen: Sequence[str], start: Checkpoint) -> frozenset[str]:
    """The tensors that must be the start's.

    Args:
        frozen: As the user gave it: parts, layers, or `none`.
        start: What was trained, under its published names.

    Raises:
        UsageError: It is not a part or layer of the model.
    """
    items = list(implied_tensors(start.config, start.path / "config.json"))
    held = [*([] if NONE in frozen else FROZEN), *(each for each in frozen if each != NONE)]
    found: set[str] = set()
    for each in held:
        names = {item.name for item in items if each in (item.part, _layer_of(item.name))}
        if not names:
            raise UsageError(
                f"--frozen {each} is not a part or layer of {start.name}",
                hint=f"expected {', '.join(PARTS)}, {NONE}, or a layer like encoder.layers.0",
            )
        found |= names
    return frozenset(found)


def _fetched(sources: Sources, progress: Callable[[str], None]) -> Sources:
    """The source's files on this machine."""
    names = [*sources.source.files, *(name for name in (*READ, GENERATION_FILE) if sources.source.holds(name))]
    size = sources.size(sources.missing({SOURCE: names}))
    return sources.fetch({SOURCE: names}, percent("download", size, progress))


def _said(judge: Judge, found: tuple[Check, tuple[str, ...]]) -> Check:
    check, remarks = found
    judge.remarks += remarks
    return check


def _tensors(raw: Checkpoint, found: list[Published]) -> Check:
    """tensors: all are there, once, in their shapes, and tied copies repeat what they are tied to."""
    published = as_published(raw)
    found.append(published)
    target = published.checkpoint
    faults = list(tensor_faults(target))
    faults += [f"{name} is not one of this model" for name in published.unexpected]
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
            faults.append(f"{name} is a tied copy of {repeated}, and has other values")
    if faults:
        return refused("tensors", "tensor(s) that are not those of the model", faults)
    beside = f", and {len(published.heads)} of a head that no other class loads" if published.heads else ""
    spelled = "" if not published.respelled else ", under other names than the published ones"
    return Check("tensors", True, f"{len(target.tensors)} tensors, each once{spelled}{beside}")


def _class_of(named: object) -> str:
    return str(named[0]) if isinstance(named, list) and named else "the model"


def _tokenizer(judge: Judge, source: Checkpoint, target: Checkpoint) -> list[Check]:
    table = next(stored for name, stored in target.tensors.items() if name.endswith("embed_tokens.weight"))
    found = judge_resaved_tokenizer(source.path, target, rows=table.entry.shape[0])
    if found is None:
        judge.skip(["tokenizer"], "it has no tokenizer.json: copy the start's tokenizer")
        return []
    return [_said(judge, found)]


def _parts(judge: Judge, start: Checkpoint, target: Checkpoint, still: frozenset[str]) -> list[Check]:
    """A check for each part, and what holds between them."""
    items = list(implied_tensors(start.config, start.path / "config.json"))
    measured: dict[str, dict[str, Movement]] = {part: {} for part in PARTS}
    for number, (item, each) in enumerate(movements(items, start, target)):
        if number % 20 == 0:
            judge.progress(f"how far tensor {number} of {len(items)} has moved")
        measured[item.part][item.name] = each
    moved = {part: any(not each.still for each in found.values()) for part, found in measured.items()}
    checks = []
    for part in PARTS:
        if not any(item.part == part for item in items):
            continue
        if not measured[part]:
            checks.append(Check(part, False, "none of its tensors can be compared with the start's"))
            continue
        checks.append(_part(part, measured[part], still, moved))
    judged = [[*measured[part].values()] for part in ("embedding", *TRAINED) if measured[part]]
    if all(any(each.unrelated for each in found) for found in judged):
        judge.remarks.append(
            f"no part of it is near {start.name}: if it was trained from another model, give that as --source"
        )
    return checks


def _part(part: str, found: Mapping[str, Movement], still: Collection[str], moved: Mapping[str, bool]) -> Check:
    """Whether a part moved as it should have."""
    layers = by_layer(found, {name: _layer_of(name) for name in found})
    whole, shown = together(part, list(found.values())), tuple(layers.values())
    faults = [*whole.broken, *_moved_though_frozen(found, still)]
    faults += [f"{name} is not near its start: random, or diverged{_cosine(found[name])}" for name in whole.unrelated]
    faults += [f"{name} is all zeros, and the start's is not" for name in whole.emptied]
    trained = {
        layer: each for layer, each in layers.items() if any(_layer_of(n) == layer for n in found if n not in still)
    }
    if part in TRAINED and trained and all(each.still for each in trained.values()):
        faults += _never_moved(part, moved)
    elif part in TRAINED:
        faults += _left_behind(part, trained)
    if faults:
        return Check(part, False, _told(faults), tuple(faults), movements=shown)
    return Check(part, True, _figures(whole), movements=shown)


def _moved_though_frozen(found: Mapping[str, Movement], still: Collection[str]) -> Iterator[str]:
    for name, each in found.items():
        if name in still and not each.still and not each.broken:
            why = f"; if it was meant, say --frozen {NONE}" if "vision_tower" in name else ""
            if _ADAPTED.search(name) and each.distance < 0.5:
                why = f': LoRA on "q_proj" and "v_proj" adapts SigLIP too{why}'
            away = f"is {each.distance:.2%} away from the start's" if each.start else "the start's is zeros"
            yield f"{name} was frozen, and {away}{why}"


def _never_moved(part: str, moved: Mapping[str, bool]) -> Iterator[str]:
    others = [other for other in TRAINED if other != part and moved[other]]
    if not others:
        yield f"every tensor is still the start's; if it was frozen on purpose, say --frozen {part}"
        return
    lost = f": {LOST}" if part == "encoder" else ""
    yield (
        f"every tensor is still the start's, while the {others[0]} has moved{lost}; "
        f"if it was frozen on purpose, say --frozen {part}"
    )


def _left_behind(part: str, layers: Mapping[str, Movement]) -> Iterator[str]:
    """Layers that did not move while most others did; single tensors may, as those that LoRA leaves alone."""
    numbered = {layer: each for layer, each in layers.items() if layer.startswith(f"{part}.layers.")}
    unmoved = [layer for layer, each in numbered.items() if each.still]
    if len(unmoved) * 2 < len(numbered):
        for layer in unmoved:
            yield f"{layer} is still the start's, while most layers have moved; if it was frozen, say --frozen {layer}"
    elif unmoved:
        yield (
            f"{len(unmoved)} of {len(numbered)} layers are still the start's: {', '.join(unmoved[:5])}"
            f"{', ...' if len(unmoved) > 5 else ''}; if they were frozen, say so with --frozen, once each"
        )


def _layer_of(name: str) -> str:
    """The layer of a tensor, `encoder.layers.3` or `vision.layers.3`; the tensor itself where it is of none."""
    found = _LAYER.match(name)
    if found is None:
        return name
    # In a folder of the encoder alone its layers have nothing before them.
    return f"{'vision' if found[2] else found[1] or 'encoder'}.layers.{found[3]}"


def _cosine(each: Movement) -> str:
    return "" if each.cosine is None else f" (cosine {each.cosine:.2f})"


def _told(faults: Sequence[str]) -> str:
    return faults[0] if len(faults) == 1 else f"{len(faults)} faults, the first: {faults[0]}"


def _figures(whole: Movement) -> str:
    if whole.still:
        return f"{whole.tensors} tensors are the start's, bit for bit"
    moved = whole.tensors - whole.unmoved
    return f"{moved} of {whole.tensors} tensors moved, by {whole.distance:.2%} of the start's length{_cosine(whole)}"


def _runs(judge: Judge, start: Checkpoint, target: Checkpoint) -> Check:
    """The model, used as what it is."""
    if target.config.get("model_type") == ENCODER_TYPE:
        alone = EncoderReference(target, **judge.reading())
        return judge_dependence(alone, "states", alone.encode)
    assert target.config.get("model_type") == MODEL_TYPE, "no other is judged here"
    model = T5Gemma2Reference(target, **judge.reading())
    blind = model.vision is not None and _is_zeros(target) and _is_zeros(start)
    if blind:
        judge.remarks.append("its projector is zeros, as at the start: no image changes anything")
    return judge_runs(model, blind=blind, progress=judge.progress)


def _is_zeros(checkpoint: Checkpoint) -> bool:
    item = next(
        each
        for each in implied_tensors(checkpoint.config, checkpoint.path / "config.json")
        if each.name.endswith(PROJECTOR)
    )
    (found,) = (each for _, each in movements([item], checkpoint, checkpoint))
    return not found.found
