"""Texts that the model generates for held-out pairs, compared with their targets: exact match, chrF and ROUGE-L."""

import math
from collections.abc import Sequence
from copy import copy
from pathlib import Path
from typing import TYPE_CHECKING, Final

import torch
from torch import nn

from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.pairs.dataset import PairDataset
from t5g2convert.adaptation.train.evaluation import held_out_batches
from t5g2convert.adaptation.train.evaluation_log import Scores
from t5g2convert.reference.prompts import TextCodec

if TYPE_CHECKING:
    from lightning_fabric import Fabric


SCORERS: Final = ("sacrebleu", "rouge_score")
"""The libraries of the scores."""


@torch.no_grad()
def generate_and_score(
    engine: "Fabric", module: nn.Module, held_out: Sequence[PairDataset], *, loop: LoopConfig, pairs: int, model: Path
) -> Scores:
    """Generate the most likely token at each step for the first held-out pairs, and compare the texts.

    Each process generates its share. A text ends with eos, or with as many tokens as the longest target has.

    Args:
        engine: Fabric, launched.
        module: The sharded `ModelWithLoss`.
        held_out: Held-out pairs, each a run of one step.
        loop: Settings of the loop.
        pairs: The most pairs.
        model: The folder of the tokenizer.

    Raises:
        T5g2Error: A pair cannot be read; on other ranks than 0, `ReportedElsewhere`.
    """
    codec = TextCodec(model)
    parts = first_pairs(held_out, pairs)
    longest = max(part.size(0, i).labels for part in parts for i in range(part.settings.batch_pairs))
    found: list[tuple[int, int, str, str]] = []
    module.eval()
    for number, part in enumerate(parts):
        for place, batch in held_out_batches(engine, part, loop):
            written = module(batch, new_tokens=longest, eos=part.tokens.eos)
            for i, counts, row in zip(place.samples, place.counted, written.tolist(), strict=True):
                if counts:
                    wanted = part.pair(i).target.tolist()
                    eos = part.tokens.eos
                    found.append((number, i, _text(codec, row, eos), _text(codec, wanted, eos)))
    module.train()
    return compare([each[2:] for each in sorted(_of_all_ranks(engine, found))])


def first_pairs(held_out: Sequence[PairDataset], pairs: int) -> list[PairDataset]:
    """Return the first pairs of each part, all together about as many as requested, at most all."""
    total = sum(part.settings.batch_pairs for part in held_out)
    share = min(1.0, pairs / total)
    parts = [copy(part) for part in held_out]
    for part in parts:
        count = math.ceil(share * part.settings.batch_pairs)
        part.settings = part.settings.model_copy(update={"batch_pairs": count})
    return parts


def compare(texts: Sequence[tuple[str, str]]) -> Scores:
    """Return the scores of texts, each with its target; white space around them does not count."""
    from rouge_score.rouge_scorer import RougeScorer  # type: ignore[import-untyped]
    from sacrebleu.metrics.chrf import CHRF

    written, wanted = ([each.strip() for each in column] for column in zip(*texts, strict=True))
    exact = sum(one == other for one, other in zip(written, wanted, strict=True)) / len(texts)
    rouge = RougeScorer(["rougeL"])
    overlap = [rouge.score(other, one)["rougeL"].fmeasure for one, other in zip(written, wanted, strict=True)]
    return Scores(len(texts), exact, CHRF().corpus_score(written, [wanted]).score, sum(overlap) / len(texts))


def _text(codec: TextCodec, ids: list[int], eos: int) -> str:
    return codec.decode(ids[: ids.index(eos)] if eos in ids else ids)


def _of_all_ranks(engine: "Fabric", found: list[tuple[int, int, str, str]]) -> list[tuple[int, int, str, str]]:
    if engine.world_size == 1:
        return found
    gathered: list[list[tuple[int, int, str, str]]] = [[] for _ in range(engine.world_size)]
    torch.distributed.all_gather_object(gathered, found)
    return [each for part in gathered for each in part]
