"""Texts generated for held-out pairs, compared with transformers' own and with their targets."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from t5g2convert.adaptation.finetune import prepare
from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.pairs.generation import compare, first_pairs, generate_and_score
from t5g2convert.adaptation.train.loss import PIXELS, ModelWithLoss
from t5g2convert.adaptation.train.micro_batches import MicroBatch
from t5g2convert.adaptation.train.model import load_model
from t5g2convert.checkpoint.folder import open_checkpoint
from tests.adaptation.finetunings import finetune_request

ENGINE: Any = SimpleNamespace(global_rank=0, world_size=1, device=torch.device("cpu"), to_device=lambda batch: batch)


@pytest.fixture(scope="module")
def module(small: Path) -> ModelWithLoss:
    network = load_model(open_checkpoint(small / "model"))
    return ModelWithLoss(network, tasks=2, softcap=None, chunk=100)


def test_a_batch_generates_what_each_pair_generates_alone(
    small: Path, pairs: Path, tmp_path: Path, module: ModelWithLoss
) -> None:
    samples = prepare(finetune_request(small, pairs, tmp_path / "run")).samples
    module.eval()
    chosen = tuple(range(12))
    assert any(samples.pair(i).images for i in chosen)
    together = module(samples[MicroBatch(0, chosen, (True,) * 12)], new_tokens=6, eos=samples.tokens.eos)
    for number in chosen:
        batch = samples[MicroBatch(0, (number,), (True,))]
        pixels = {PIXELS: batch[PIXELS]} if PIXELS in batch else {}
        ids, start = batch["input_ids"], [samples.tokens.bos]
        while len(start) < 7 and start[-1] != samples.tokens.eos:
            with torch.no_grad():
                logits = module.model(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    decoder_input_ids=torch.tensor([start]),
                    **pixels,
                ).logits
            start.append(int(logits[0, -1].argmax()))
        assert together[number, : len(start) - 1].tolist() == start[1:]


def test_the_scores_are_those_of_the_first_held_out_pairs(
    small: Path, pairs: Path, tmp_path: Path, module: ModelWithLoss
) -> None:
    held_out = prepare(finetune_request(small, pairs, tmp_path / "run", eval_pairs=9)).held_out
    assert [part.settings.batch_pairs for part in first_pairs(held_out, 4)] == [4]
    assert [part.settings.batch_pairs for part in held_out] == [9]
    few = generate_and_score(ENGINE, module, held_out, loop=LoopConfig(), pairs=4, model=small / "model")
    assert few.texts == 4
    assert module.training
    ways = [
        generate_and_score(
            ENGINE, module, held_out, loop=LoopConfig(micro_batch=size), pairs=100, model=small / "model"
        )
        for size in (1, 3, 9)
    ]
    assert {score.texts for score in ways} == {9}
    assert ways[0] == ways[1] == ways[2]


def test_equal_texts_count_whatever_white_space_is_around_them() -> None:
    found = compare([(" one two ", "one two"), ("three", "four"), ("", "five")])
    assert found.texts == 3
    assert found.exact == pytest.approx(1 / 3)
    assert 0 < found.chrf < 100
    assert found.rouge_l == pytest.approx(1 / 3)
    # Four of five words, in order: precision and recall are 4/5 and 4/4.
    assert compare([("a b x c d", "A b, c d.")]).rouge_l == pytest.approx(8 / 9)
    assert compare([("same", "same")]).chrf == pytest.approx(100)
