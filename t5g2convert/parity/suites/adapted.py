"""How a T5Gemma 2 is judged that was trained further: all but trained values is its source's, and those are named."""

import os
from typing import Any, Final

from t5g2convert.checkpoint.families.t5gemma2 import MODEL_TYPE, T5Gemma2, read_t5gemma2
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.parity.checks.config import flatten, judge_settings
from t5g2convert.parity.checks.runs import judge_runs
from t5g2convert.parity.checks.tokenizer import judge_carried, make_tokenizer_check
from t5g2convert.parity.declared_changes import change_remarks
from t5g2convert.parity.reports.report import Check
from t5g2convert.parity.session import Judge
from t5g2convert.parity.suites.base import Kind
from t5g2convert.parity.suites.extracted import T5Gemma2Parent, look_alike
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference

PROJECTOR: Final = "model.encoder.multi_modal_projector.mm_input_projection_weight"
NORM: Final = "model.encoder.multi_modal_projector.mm_soft_emb_norm.weight"
PIECE_BYTES: Final = 1 << 20


class Adapted(Kind[T5Gemma2Parent]):
    """T5Gemma 2 to itself, with other values in the tensors that were trained."""

    sources = (MODEL_TYPE,)
    targets = (MODEL_TYPE,)
    parities = ("vision_parity",)

    def parent(self, sources: Sources) -> T5Gemma2Parent:
        """T5Gemma 2."""
        return T5Gemma2Parent(sources)

    def read(self, target: Checkpoint) -> T5Gemma2:
        """T5Gemma 2."""
        return read_t5gemma2(target.config, target.path / "config.json")

    def against(self, judge: Judge, parent: T5Gemma2Parent, target: Checkpoint) -> None:
        """config, tokenizer and vision_parity."""
        judge.make(["config"], lambda: [_config(judge, parent.checkpoint, target)])
        make_tokenizer_check(judge, target, lambda: judge_carried(parent.folders, target, judge.manifest))
        judge.remarks += change_remarks(target, judge.changes)
        judge.remarks += _remarks(judge)
        tower = T5Gemma2Reference(parent.checkpoint, **judge.reading(rounded=True)).vision
        if tower is None:
            judge.skip(["vision_parity"], "the source has no images")
        elif not judge.unfit(["vision_parity"], target):
            trained = _trained(judge)
            look_alike(
                judge,
                tower,
                T5Gemma2Reference(target, **judge.reading()).vision,
                projected=not trained & {PROJECTOR, NORM},
                normed=NORM not in trained,
            )

    def runs(self, judge: Judge, target: Checkpoint) -> Check:
        """Encoder and decoder together."""
        model = T5Gemma2Reference(target, **judge.reading())
        blind = model.vision is not None and PROJECTOR not in _trained(judge) and _is_zeros(target, PROJECTOR)
        if blind:
            judge.remarks.append("its projector is zeros, and was not trained: no image changes anything")
        return judge_runs(model, blind=blind, progress=judge.progress)


def _trained(judge: Judge) -> set[str]:
    """What the manifest names as trained: tensors, and patterns of those of layers."""
    adaptation = None if judge.manifest is None else judge.manifest.adaptation
    return set() if adaptation is None else {*adaptation.trained}


def _remarks(judge: Judge) -> list[str]:
    """What no check here can tell."""
    told = None if judge.manifest is None else judge.manifest.adaptation
    if told is None:
        return []
    return [
        "trained values are judged by nothing here: that training made them, and how, is the word of t5g2.json",
        f"it tells of step {told.steps}"
        + (f", the mean of {len(told.checkpoints)} checkpoints" if len(told.checkpoints) > 1 else "")
        + f", {told.tokens} tokens, and data with sha256 {told.data_sha256}",
    ]


def _config(judge: Judge, source: Checkpoint, target: Checkpoint) -> Check:
    """config: every setting is the source's, but for a dtype that was declared."""
    expected: dict[str, Any] = dict(flatten(source.config))
    if "dtype" in judge.changes:
        dtype = judge.changes["dtype"].target
        named = [path for path in expected if path.rpartition(".")[2] in ("dtype", "torch_dtype")]
        expected |= dict.fromkeys(["dtype", *named], dtype)
    return judge_settings(expected, target, (), judge.changes)


def _is_zeros(checkpoint: Checkpoint, name: str) -> bool:
    stored = checkpoint.tensors[name]
    with (checkpoint.path / stored.file).open("rb") as file:
        return not any(
            any(os.pread(file.fileno(), min(PIECE_BYTES, stored.entry.end - at), at))
            for at in range(stored.entry.start, stored.entry.end, PIECE_BYTES)
        )
