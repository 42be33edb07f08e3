"""The checks of a T5Gemma 2 that `t5g2 merge` wrote: the source, plus the products of an adapter."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from t5g2convert.parity.checks.runs import judge_runs
from t5g2convert.parity.replay import replay_merge
from t5g2convert.parity.reports.report import Check, Skipped
from t5g2convert.parity.session import Verification
from t5g2convert.parity.source_models import T5Gemma2Source
from t5g2convert.parity.suites.adapted import ADAPTED, PROJECTOR, is_zeros
from t5g2convert.parity.suites.base import (
    NO_IMAGES,
    compare_towers,
    conversion_remarks,
)
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference

CHANGED_TOWER: Final = Skipped("the adapter changes the vision tower; provenance judges its tensors")


def _vision_parity(verification: Verification[T5Gemma2Source]) -> Check | Skipped:
    """Compare the towers, if the adapter leaves the tower alone."""
    tower = T5Gemma2Reference(verification.source.checkpoint, **verification.reading(rounded=True)).vision
    if tower is None:
        return NO_IMAGES
    verification.require_tensors()
    replay = verification.replay
    if replay is not None and any(
        tensor.part == "vision" and tensor.content.kind == "merged" for tensor in replay.plan.tensors
    ):
        return CHANGED_TOWER
    target = T5Gemma2Reference(verification.target, **verification.reading()).vision
    return compare_towers(verification, tower, target)[0]


def _runs(verification: Verification[T5Gemma2Source]) -> Check:
    verification.require_tensors()
    model = T5Gemma2Reference(verification.target, **verification.reading())
    blind = model.vision is not None and is_zeros(verification.target, PROJECTOR)
    check = judge_runs(model, blind=blind, progress=verification.progress)
    return check.remarked(["its projector is zeros, so images have no effect"] if blind else [])


def _remarks(verification: Verification[Any]) -> Iterator[str]:
    yield from conversion_remarks(verification)
    if verification.replay is not None:
        yield "provenance judges that this adapter was merged into this source, not how the adapter was trained"


MERGED: Final = replace(
    ADAPTED,
    merged=True,
    replay=replay_merge,
    checks={**ADAPTED.checks, "vision_parity": _vision_parity, "runs": _runs},
    remarks=_remarks,
)
"""T5Gemma 2 with an adapter merged into some of its tensors."""
