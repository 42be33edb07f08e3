"""vision, projector, embedding, encoder, decoder: each part of a trained model moved from the start, or was frozen."""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

from t5g2convert.parity.movement import Movement, by_layer, combined
from t5g2convert.parity.reports.report import Check

PARTS: Final = ("vision", "projector", "embedding", "encoder", "decoder")
"""The parts in order; a check of the same name judges each."""

TRAINED: Final = ("encoder", "decoder")
"""Parts that every training moves unless they are frozen; LoRA and many recipes leave the other parts alone."""

NONE: Final = "none"
"""The value of --frozen for a training that froze no part, not even the vision tower."""

LOST: Final = "transformers' Trainer puts the encoder back to the start on resume (huggingface/transformers#48805)"

_LAYER: Final = re.compile(
    r"(?:model\.)?(?:(encoder|decoder)\.)?(vision_tower\.vision_model\.encoder\.)?layers\.(\d+)\."
)

_ADAPTED: Final = re.compile(r"vision_tower\..*(?:_proj|fc1|fc2)\.")


def judge_part(
    part: str, found: Mapping[str, Movement], frozen: Collection[str], *, moved_parts: Collection[str]
) -> Check:
    """Judge whether a part moved the way training moves it.

    Args:
        part: Its name.
        found: The movements of its tensors, by published name.
        frozen: Tensors that must equal the start's.
        moved_parts: The parts with at least one moved tensor.
    """
    if not found:
        return Check(part, False, "none of its tensors can be compared with the start's")
    layers = by_layer(found, {name: layer_of(name) for name in found})
    whole, shown = combined(part, list(found.values())), tuple(layers.values())
    faults = [*whole.broken, *_moved_though_frozen(found, frozen)]
    faults += [f"{name} is not near its start: random, or diverged{_cosine(found[name])}" for name in whole.unrelated]
    faults += [f"{name} is all zeros, but the start's is not" for name in whole.emptied]
    trained_layers = {layer_of(name) for name in found if name not in frozen}
    trained = {layer: each for layer, each in layers.items() if layer in trained_layers}
    if part in TRAINED and trained and all(each.still for each in trained.values()):
        faults += _never_moved(part, moved_parts)
    elif part in TRAINED:
        faults += _left_behind(part, trained)
    if faults:
        return Check(part, False, _summary(faults), tuple(faults), movements=shown)
    return Check(part, True, _figures(whole), movements=shown)


def layer_of(name: str) -> str:
    """Return the layer of a tensor, like `encoder.layers.3` or `vision.layers.3`, or its own name outside of layers."""
    found = _LAYER.match(name)
    if found is None:
        return name
    # In a folder with only the encoder, its layers have no prefix.
    return f"{'vision' if found[2] else found[1] or 'encoder'}.layers.{found[3]}"


def _moved_though_frozen(found: Mapping[str, Movement], frozen: Collection[str]) -> Iterator[str]:
    for name, each in found.items():
        if name in frozen and not each.still and not each.broken:
            why = f"; if that was intended, add --frozen {NONE}" if "vision_tower" in name else ""
            if _ADAPTED.search(name) and each.distance < 0.5:
                why = f': LoRA on "q_proj" and "v_proj" adapts SigLIP too{why}'
            away = f"is {each.distance:.2%} away from the start's" if each.start else "the start's is zeros"
            yield f"{name} was frozen, but {away}{why}"


def _never_moved(part: str, moved_parts: Collection[str]) -> Iterator[str]:
    others = [other for other in TRAINED if other != part and other in moved_parts]
    if not others:
        yield f"every tensor is still the start's; if it was frozen on purpose, add --frozen {part}"
        return
    lost = f": {LOST}" if part == "encoder" else ""
    yield (
        f"every tensor is still the start's, but the {others[0]} has moved{lost}; "
        f"if it was frozen on purpose, add --frozen {part}"
    )


def _left_behind(part: str, layers: Mapping[str, Movement]) -> Iterator[str]:
    """Yield layers that did not move though most others did; single tensors may stay, like those that LoRA skips."""
    numbered = {layer: each for layer, each in layers.items() if layer.startswith(f"{part}.layers.")}
    unmoved = [layer for layer, each in numbered.items() if each.still]
    if len(unmoved) * 2 < len(numbered):
        for layer in unmoved:
            yield f"{layer} is still the start's, but most layers have moved; if it was frozen, add --frozen {layer}"
    elif unmoved:
        yield (
            f"{len(unmoved)} of {len(numbered)} layers are still the start's: {', '.join(unmoved[:5])}"
            f"{', ...' if len(unmoved) > 5 else ''}; if they were frozen, add --frozen for each of them"
        )


def _cosine(each: Movement) -> str:
    return "" if each.cosine is None else f" (cosine {each.cosine:.2f})"


def _summary(faults: Sequence[str]) -> str:
    return faults[0] if len(faults) == 1 else f"{len(faults)} faults, the first: {faults[0]}"


def _figures(whole: Movement) -> str:
    if whole.still:
        return f"{whole.tensors} tensors are the start's, bit for bit"
    moved = whole.tensors - whole.unmoved
    return f"{moved} of {whole.tensors} tensors moved, by {whole.distance:.2%} of the start's length{_cosine(whole)}"
