"""What became of every tensor of the source, for provenance: nothing may be lost without a word."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Final

from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.roles import SOURCE, role_in
from t5g2convert.conversion.plan import Kind, Plan, PlannedTensor

WIDENED: Final = {("BF16", "F32"), ("F16", "F32")}
"""Casts that lose nothing: the source can be had back."""


def accounts_of(plan: Plan, source: Checkpoint) -> dict[str, list[str]]:
    """The source's tensors by what became of them: whole, rounded, cut, dropped, or lost without a word."""
    exact: dict[str, list[tuple[int, int]]] = defaultdict(list)
    rounded: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for tensor in plan.tensors:
        content = tensor.content
        if content.source is not None and content.kind in ("copy", "cast"):
            whole = content.kind == "copy" or (content.dtype, tensor.dtype) in WIDENED
            (exact if whole else rounded)[content.source.file].append((content.source.start, content.source.end))
    declared = {drop.name for drop in plan.dropped}
    cut = any(change.field == "vocab_size" for change in plan.changes)
    accounts: dict[str, list[str]] = {kind: [] for kind in ("whole", "rounded", "cut", "dropped", "lost")}
    for name, stored in source.tensors.items():
        start, end = stored.entry.start, stored.entry.end
        held = [
            max((stop for first, stop in ranges[stored.file] if first == start), default=start)
            for ranges in (exact, rounded)
        ]
        if held[0] == end:
            kind = "whole"
        elif held[1] == end:
            kind = "rounded"
        elif max(held) > start and cut:
            kind = "cut"
        else:
            kind = "dropped" if name in declared else "lost"
        accounts[kind].append(name)
    return accounts


def account(plan: Plan, accounts: Mapping[str, list[str]], residuals: Sequence[tuple[float, float]] = ()) -> str:
    """The same in a sentence, with what the target is made of.

    Args:
        plan: The plan.
        accounts: The source's tensors by what became of them.
        residuals: For each aligned projector between which bounds the residual of its tables lies.
    """
    kinds = Counter((tensor.content.kind, _is_donated(tensor)) for tensor in plan.tensors)
    said: dict[tuple[Kind, bool], str] = {
        ("copy", False): "tensors are the source's byte for byte",
        ("cast", False): f"are the source's in {plan.dtype}, as declared",
        ("scaled_row", False): "is a row of it, scaled",
        ("copy", True): "are the donor's byte for byte",
        ("cast", True): f"are the donor's in {plan.dtype}, as declared",
        ("zeros", False): "is zeros" if kinds["zeros", False] == 1 else "are zeros",
        ("aligned", True): f"is the donor's, aligned ({', '.join(map(_residual, residuals))})",
    }
    told = ", ".join(f"{kinds[kind]} {what}" for kind, what in said.items() if kinds[kind])
    if accounts["whole"]:
        told += f"; {len(accounts['whole'])} of the source can be rebuilt"
    if accounts["rounded"]:
        told += f"; {len(accounts['rounded'])} of the source were rounded"
    if accounts["cut"]:
        told += f"; the rows that were cut from {', '.join(accounts['cut'])} are left behind, as declared"
    if accounts["dropped"]:
        told += f"; {len(accounts['dropped'])} were dropped, as declared"
    return told


def _is_donated(tensor: PlannedTensor) -> bool:
    """Whether a tensor comes from another checkpoint than the source."""
    source = tensor.content.source
    return source is not None and role_in(source.file) != SOURCE


def _residual(bounds: tuple[float, float]) -> str:
    """What is left of the source's table when the donor's has been carried over: 0 nothing, 1 all of it."""
    lower, upper = (f"{bound:.3g}" for bound in bounds)
    return f"residual {upper}" if lower == upper else f"residual at most {upper}"
