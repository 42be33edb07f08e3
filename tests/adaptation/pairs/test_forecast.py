"""What `t5g2 finetune --dry-run` prints."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from t5g2convert.adaptation.finetune import prepare
from t5g2convert.adaptation.pairs.forecast import forecast_pairs
from t5g2convert.adaptation.train.cost import memory
from tests.adaptation.finetunings import OPTIONS, finetune_request, finetuned

RUN = (*OPTIONS, "--epochs", "3", "--eval-pairs", "6", "--micro-batch", "2", "--devices", "2", "--dry-run")


def test_a_dry_run_says_what_the_run_would_do(small: Path, pairs: Path, tmp_path: Path) -> None:
    done = finetuned(small, pairs, tmp_path / "run", *RUN)
    lines = {line[:10].strip(): line[11:] for line in done.stdout.splitlines()}
    assert lines["steps"] == "15 of 7 pairs"
    assert lines["pairs"] == "34, read 3.09 times; 6 are evaluated"
    assert lines.keys() == {"steps", "pairs", "padding", "a step", "passes", "a device", "speed", "assumed"}
    assert " tokens/s in steps of " in lines["speed"]
    assert not (tmp_path / "run").exists()


def test_its_memory_counts_the_images_of_a_pass(small: Path, pairs: Path, tmp_path: Path) -> None:
    request = finetune_request(small, pairs, tmp_path / "run", steps=40, batch_pairs=8, micro_batch=4)
    prepared = prepare(request)
    places = list(prepared.samples.order(request.options, rank=0, world=1))
    most = max(sum(len(prepared.samples.pair(i).images) for i in place.samples) for place in places)
    assert most > 1
    found = forecast_pairs(prepared, devices=1, loop=request.options).cost.memory
    one = memory(
        prepared.samples.shapes,
        dict.fromkeys(("embedding", "encoder", "decoder", "vision", "projector", "total"), 1),
        devices=1, encoder=1, decoder=1, chunk=1, images=1,
    )  # fmt: skip
    assert found.images == most * one.images
    assert found.total == sum(asdict(found).values())


def test_its_padding_is_that_of_the_batches(small: Path, pairs: Path, tmp_path: Path) -> None:
    found = json.loads(finetuned(small, pairs, tmp_path / "run", *RUN, "--json").stdout)
    request = finetune_request(small, pairs, tmp_path / "run", steps=15, eval_pairs=6, micro_batch=2)
    samples = prepare(request).samples
    read = padded = 0
    for rank in range(2):
        for place in samples.order(request.options, rank=rank, world=2):
            if not any(place.counted):
                continue
            batch = samples[place]
            for name in ("attention_mask", "decoder_attention_mask"):
                counted = batch[name][[number for number, counts in enumerate(place.counted) if counts]]
                read += int(counted.sum())
                padded += counted.numel()
    assert found["padding"] == pytest.approx(1 - read / padded, abs=0.02)
    assert (found["steps"], found["pairs"], found["held_out"]) == (15, 34, 6)
