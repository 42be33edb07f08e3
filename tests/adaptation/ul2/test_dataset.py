import multiprocessing
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from t5g2convert.adaptation.data.example import Example
from t5g2convert.adaptation.data.tokens import ModelTokens
from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.train.dataset import Batch, collate, load_batches, teaching
from t5g2convert.adaptation.train.forecast import forecast
from t5g2convert.adaptation.train.loss import IGNORED
from t5g2convert.adaptation.train.micro_batches import MicroBatch, micro_batches
from t5g2convert.adaptation.train.preflight import prepare
from t5g2convert.adaptation.train.run_settings import differences
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.dataset import image_task, task_names
from t5g2convert.adaptation.ul2.mixture import read_mixture
from t5g2convert.errors import DataError, Interrupted, UsageError

TOKENS = ModelTokens(300, bos=2, eos=1, pad=0, boi=290, eoi=291, image=292, per_image=4, pictures=True)


def make(**changes: object) -> Settings:
    values = {"encoder_length": 64, "decoder_length": 64, "batch_tokens": 640, "steps": 100, "lr": 1e-3}
    return Settings(mixture=read_mixture(), **{**values, **changes})


def example(*, encoder: int, labels: int, task: int) -> Example:
    return Example(
        encoder=np.arange(10, 10 + encoder, dtype=np.uint32),
        labels=np.arange(50, 50 + labels, dtype=np.uint32),
        positions=np.arange(-1, labels - 1, dtype=np.int64),
        raw=np.arange(100, 100 + encoder + labels, dtype=np.uint32),
        task=task,
    )


def test_a_batch_is_padded_to_its_longest_and_the_decoder_reads_shifted_labels() -> None:
    batch = collate([example(encoder=5, labels=3, task=4), example(encoder=2, labels=4, task=0)], [True, False], TOKENS)
    assert batch["input_ids"].tolist() == [[10, 11, 12, 13, 14], [10, 11, 0, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["decoder_input_ids"].tolist() == [[2, 50, 51, 0], [2, 50, 51, 52]]
    assert batch["decoder_attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert batch["labels"].tolist() == [[50, 51, 52, IGNORED], [IGNORED] * 4]
    assert batch["tasks"].tolist() == [4, 0]


@pytest.mark.parametrize(("bos", "expected"), [(None, [-1, -1, 0, -1]), (2, [-1, -1, 1, -1])])
def test_the_teacher_predicts_a_label_from_the_position_before_it(bos: int | None, expected: list[int]) -> None:
    taught = teaching([example(encoder=5, labels=3, task=0)], bos, width=4)
    assert taught["teacher_positions"].tolist() == [expected]
    raw = taught["raw_ids"][0]
    assert len(raw) == 8 + (bos is not None)
    # The label at raw position 1 is raw[1]; the teacher has read everything before it and is at raw[0].
    assert int(raw[expected[2]]) == 100
    assert torch.equal(taught["raw_mask"], torch.ones_like(taught["raw_ids"]))


@pytest.mark.parametrize("encoder_bos", [False, True])
def test_a_teacher_reads_bos_first_whatever_the_encoder_reads(encoder_bos: bool, small: Path) -> None:
    settings = make(encoder_bos=encoder_bos, teacher="0" * 64, steps=1)
    samples = prepare(small / "model", small / "data", settings).samples
    batch = samples[MicroBatch(0, (0, 1), (True, True))]
    assert batch["raw_ids"][:, 0].tolist() == [2, 2]
    assert (batch["input_ids"][:, 0] == 2).all() == encoder_bos
    taught = batch["teacher_positions"] >= 0
    assert taught.any()
    at, expected = batch["teacher_positions"][taught], batch["labels"][taught]
    rows = taught.nonzero()[:, 0]
    assert torch.equal(batch["raw_ids"][rows, at + 1], expected)


def test_data_without_text_suffices_for_image_steps(small: Path, tmp_path: Path) -> None:
    from t5g2convert.adaptation.data.documents import read_files
    from t5g2convert.adaptation.data.pack import pack

    pack(small / "model", tmp_path / "data", read_files([small / "texts/pictures.jsonl"], "text", lambda _: None))
    with pytest.raises(DataError, match="the corpus has 0 tokens"):
        prepare(small / "model", tmp_path / "data", make(image_every=2))
    prepared = prepare(small / "model", tmp_path / "data", make(image_every=1))
    found = forecast(prepared, devices=1, loop=LoopConfig(loss_chunk=8))
    assert (found.tasks, found.corpus, found.epochs, found.operations) == ((), 0, 0.0, None)
    assert (prepared.samples.longest_raw, found.image_steps) == (0, 100)
    both = prepare(small / "model", small / "data", make(image_every=1)).samples
    settings = prepared.samples.settings
    for place in micro_batches(settings, prepared.samples.size, rank=0, world=1, tokens=None, samples=5, start=98):
        batch, expected = prepared.samples[place], both[place]
        assert all(torch.equal(batch[name], expected[name]) for name in expected)
        assert len(batch["pixel_values"]) == 5


def test_different_settings_have_different_sha256() -> None:
    one, other = make(), make(lr=2e-3)
    assert one.sha256 == make().sha256
    assert one.sha256 != other.sha256
    assert one.objective_sha256 == other.objective_sha256
    assert one.objective_sha256 != make(encoder_eos=True).objective_sha256
    assert differences(one.to_json(), other.to_json()) == ["lr 0.001, now 0.002"]
    assert differences(one.to_json(), one.to_json()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [({"lr": 0.0}, "lr: .* greater than 0"), ({"steps": 0}, "steps: "), ({"betas": (1.0, 0.9)}, "beta1: "),
     ({"lr": float("nan")}, "lr: "), ({"seed": -1}, "seed: "), ({"precision": "float16"}, "precision: ")],
)  # fmt: skip
def test_a_setting_out_of_range_is_named_by_its_option(change: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(**change)


def test_image_samples_have_the_mode_token_of_the_prefix_task() -> None:
    settings = make()
    assert task_names(settings)[-1] == "images"
    assert image_task(settings).sentinel is False
    marked = settings.mixture.tasks[-1].model_copy(update={"sentinel": True, "mode_token": 77})
    with_mode = settings.model_copy(update={"mixture": settings.mixture.model_copy(update={"tasks": (marked,)})})
    assert (image_task(with_mode).sentinel, image_task(with_mode).mode_token) == (True, 77)


PLACES = [MicroBatch(step, (step,), (True,)) for step in range(3)]


class Made(Dataset[Batch]):
    """Items with the number of a step, and whether their process handles SIGINT; step 1 cannot be made."""

    def __getitem__(self, place: MicroBatch) -> Batch:
        if place.step == 1:
            raise DataError("no such file", where="1.png", hint="look for it", details=["1.png"])
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return {"step": torch.tensor([place.step]), "ignored": torch.tensor([ignored])}


class Stopped(Dataset[Batch]):
    def __getitem__(self, place: MicroBatch) -> Batch:
        raise Interrupted(signal.SIGTERM)


def at() -> Iterator[MicroBatch]:
    return iter(PLACES)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_batch_that_cannot_be_made_is_replaced_by_its_error(workers: int) -> None:
    made = list(load_batches(Made(), at(), workers=workers))
    assert [place.step for place, _ in made] == [0, 1, 2]
    error = made[1][1]
    assert isinstance(error, DataError)
    assert (str(error), error.details, error.exit_code) == ("1.png: no such file (look for it)", ("1.png",), 3)
    for step in (0, 2):
        batch = made[step][1]
        assert isinstance(batch, dict)
        assert batch["step"].item() == step
        # Ctrl-C also reaches the workers, which ignore it.
        assert batch["ignored"].item() == (workers > 0)


def test_workers_end_when_the_batches_are_closed() -> None:
    before = set(multiprocessing.active_children())
    batches = load_batches(Made(), iter([MicroBatch(0, (0,), (True,))] * 100), workers=2)
    next(batches)
    workers = set(multiprocessing.active_children()) - before
    assert len(workers) == 2
    batches.close()
    assert not any(worker.is_alive() for worker in workers)


def test_images_are_decoded_by_workers_unless_told_otherwise() -> None:
    assert LoopConfig().workers_of(has_images=False) == 0
    assert LoopConfig().workers_of(has_images=True) == 2
    assert LoopConfig(workers=0).workers_of(has_images=True) == 0
    assert LoopConfig(workers=3).workers_of(has_images=False) == 3


def test_batches_of_workers_equal_those_of_this_process(small: Path) -> None:
    samples = prepare(small / "model", small / "data", make(image_every=2, steps=4, batch_tokens=256)).samples
    here, there = (
        list(load_batches(samples, samples.order(LoopConfig(), rank=0, world=1), workers=workers)) for workers in (0, 2)
    )
    assert [place for place, _ in here] == [place for place, _ in there]
    assert any("pixel_values" in batch for _, batch in here if isinstance(batch, dict))
    for (_, one), (_, other) in zip(here, there, strict=True):
        assert isinstance(one, dict)
        assert isinstance(other, dict)
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_signal_is_not_an_error_of_a_sample() -> None:
    with pytest.raises(Interrupted):
        list(load_batches(Stopped(), at(), workers=0))
