"""The checks of a T5Gemma 2 that `t5g2 adapt` trained: everything but the trained values equals the source."""

import os
from collections.abc import Iterator
from typing import Any, Final

from t5g2convert.checkpoint.families.t5gemma2 import MODEL_TYPE, read_t5gemma2
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.parity.checks.config import flatten, judge_settings
from t5g2convert.parity.checks.runs import judge_runs
from t5g2convert.parity.replay import replay_training
from t5g2convert.parity.reports.report import Check, Skipped
from t5g2convert.parity.session import Verification
from t5g2convert.parity.source_models import T5Gemma2Source
from t5g2convert.parity.suites.base import (
    NO_IMAGES,
    Suite,
    compare_towers,
    conversion_remarks,
    copied_tokenizer,
    integrity,
    provenance,
)
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference

PROJECTOR: Final = "model.encoder.multi_modal_projector.mm_input_projection_weight"
NORM: Final = "model.encoder.multi_modal_projector.mm_soft_emb_norm.weight"
PIECE_BYTES: Final = 1 << 20


def config(verification: Verification[T5Gemma2Source]) -> Check:
    """Require the source's settings, except for a declared dtype."""
    expected: dict[str, Any] = dict(flatten(verification.source.checkpoint.config))
    if "dtype" in verification.changes:
        dtype = verification.changes["dtype"].target
        named = [path for path in expected if path.rpartition(".")[2] in ("dtype", "torch_dtype")]
        expected |= dict.fromkeys(["dtype", *named], dtype)
    return judge_settings(expected, verification.target, (), verification.changes)


def _vision_parity(verification: Verification[T5Gemma2Source]) -> Check | Skipped:
    """Compare the towers, up to the first module that was trained."""
    tower = T5Gemma2Reference(verification.source.checkpoint, **verification.reading(rounded=True)).vision
    if tower is None:
        return NO_IMAGES
    verification.require_tensors()
    trained = _trained(verification)
    target = T5Gemma2Reference(verification.target, **verification.reading()).vision
    projected, normed = not trained & {PROJECTOR, NORM}, NORM not in trained
    return compare_towers(verification, tower, target, projected=projected, normed=normed)[0]


def _runs(verification: Verification[T5Gemma2Source]) -> Check:
    verification.require_tensors()
    model = T5Gemma2Reference(verification.target, **verification.reading())
    blind = (
        model.vision is not None
        and PROJECTOR not in _trained(verification)
        and is_zeros(verification.target, PROJECTOR)
    )
    check = judge_runs(model, blind=blind, progress=verification.progress)
    return check.remarked(["its projector is zeros and was not trained, so images have no effect"] if blind else [])


def _trained(verification: Verification[Any]) -> set[str]:
    """Return the trained tensors that the manifest names, and the patterns it uses for tensors of layers."""
    adaptation = None if verification.manifest is None else verification.manifest.adaptation
    return set() if adaptation is None else {*adaptation.trained}


def is_zeros(checkpoint: Checkpoint, name: str) -> bool:
    """Return whether all bytes of a tensor are zero."""
    stored = checkpoint.tensors[name]
    with (checkpoint.path / stored.file).open("rb") as file:
        return not any(
            any(os.pread(file.fileno(), min(PIECE_BYTES, stored.entry.end - at), at))
            for at in range(stored.entry.start, stored.entry.end, PIECE_BYTES)
        )


def _remarks(verification: Verification[Any]) -> Iterator[str]:
    yield from conversion_remarks(verification)
    adaptation = None if verification.manifest is None else verification.manifest.adaptation
    if verification.known_source is None or adaptation is None:
        return
    yield "trained values are not judged: only t5g2.json records that and how they were trained"
    checkpoints = len(adaptation.checkpoints)
    yield (
        f"it records step {adaptation.steps}"
        + (f", the mean of {checkpoints} checkpoints" if checkpoints > 1 else "")
        + f", {adaptation.tokens} tokens, and data with sha256 {adaptation.data_sha256}"
    )


ADAPTED: Final = Suite(
    sources=(MODEL_TYPE,),
    targets=(MODEL_TYPE,),
    trained=True,
    open_source=T5Gemma2Source,
    read_config=read_t5gemma2,
    replay=replay_training,
    checks={
        "integrity": integrity,
        "provenance": provenance,
        "config": config,
        "tokenizer": copied_tokenizer,
        "vision_parity": _vision_parity,
        "runs": _runs,
    },
    remarks=_remarks,
)
"""T5Gemma 2 with other values in the tensors that were trained."""
