"""What became of every tensor of the source, for provenance: nothing may be lost without a word."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

from t5g2convert.checkpoint.folder import Checkpoint, some
from t5g2convert.checkpoint.inputs import DECODER_FROM, SOURCE, VISION_FROM, Role, role_in
from t5g2convert.conversion.plan.types import Kind, Plan

WIDENED: Final = {("BF16", "F32"), ("F16", "F32")}
"""Casts that lose nothing: the source can be had back."""

_NAMES: Final[dict[Role, tuple[str, str]]] = {
    SOURCE: ("it", "the source's"),
    DECODER_FROM: ("the decoder's parent", "the decoder's parent's"),
    VISION_FROM: ("the donor", "the donor's"),
}
"""What a checkpoint is called in a sentence, and what is its own; the source goes first."""


def accounts_of(plan: Plan, source: Checkpoint) -> dict[str, list[str]]:
    """The source's tensors by what became of them: whole, rounded, cut, trained, dropped, or lost without a word."""
    exact: dict[str, list[tuple[int, int]]] = defaultdict(list)
    rounded: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for tensor in plan.tensors:
        content = tensor.content
        if content.source is not None and content.kind in ("copy", "cast"):
            whole = content.kind == "copy" or (content.dtype, tensor.dtype) in WIDENED
            (exact if whole else rounded)[content.source.file].append((content.source.start, content.source.end))
    declared = {drop.name for drop in plan.dropped}
    trained = {tensor.origin for tensor in plan.tensors if tensor.content.kind == "given"}
    cut = any(change.field == "vocab_size" for change in plan.changes)
    accounts: dict[str, list[str]] = {kind: [] for kind in ("whole", "rounded", "cut", "trained", "dropped", "lost")}
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
        accounts[kind].append(name)
    return accounts


def account(
    plan: Plan,
    accounts: Mapping[str, list[str]],
    residuals: Sequence[tuple[float, float]] = (),
    unmoved: Sequence[str] = (),
) -> str:
    """The same in a sentence, with what the target is made of.

    Args:
        plan: The plan.
        accounts: The source's tensors by what became of them.
        residuals: For each aligned projector between which bounds the residual of its tables lies.
        unmoved: Trained tensors that are the source's still.
    """
    kinds: Counter[tuple[Kind, Role]] = Counter()
    for tensor in plan.tensors:
        source = tensor.content.source
        kinds[tensor.content.kind, SOURCE if source is None else role_in(source.file)] += 1
    said: dict[Kind, str] = {
        "copy": "tensors are {whose} byte for byte",
        "cast": f"are {{whose}} in {plan.dtype}, as declared",
        "scaled_row": "is a row of {it}, scaled",
        "zeros": "is zeros" if kinds["zeros", SOURCE] == 1 else "are zeros",
        "aligned": f"is {{whose}}, aligned ({', '.join(map(_residual, residuals))})",
        "given": "tensors were trained, and hold numbers that nothing here judges",
    }
    parts = [
        f"{kinds[kind, role]} {what.format(whose=whose, it=it)}"
        for kind, what in said.items()
        for role, (it, whose) in _NAMES.items()
        if kinds[kind, role]
    ]
    told = ", ".join([*parts[:1], *(part.replace(" tensors ", " ", 1) for part in parts[1:])])
    if unmoved:
        told += f"; {len(unmoved)} of those are the source's still: {some(unmoved)}"
    if accounts["whole"]:
        told += f"; {len(accounts['whole'])} of the source can be rebuilt"
    if accounts["rounded"]:
        told += f"; {len(accounts['rounded'])} of the source were rounded"
    if accounts["cut"]:
        told += f"; the rows that were cut from {', '.join(accounts['cut'])} are left behind, as declared"
    if accounts["dropped"]:
        told += f"; {len(accounts['dropped'])} were dropped, as declared"
    return told


def _residual(bounds: tuple[float, float]) -> str:
    """What is left of the source's table when the donor's has been carried over: 0 nothing, 1 all of it."""
    lower, upper = (f"{bound:.3g}" for bound in bounds)
    return f"residual {upper}" if lower == upper else f"residual at most {upper}"
