import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from t5g2convert.adaptation.adapt import adapt
from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.train import evaluation as module_under_test
from t5g2convert.adaptation.train.evaluation import evaluate, hide_encoder
from t5g2convert.adaptation.train.evaluation_log import Evaluation, overfitting, read_evaluations, write_evaluations
from t5g2convert.adaptation.train.loss import ModelWithLoss
from t5g2convert.adaptation.train.micro_batches import MicroBatch
from t5g2convert.adaptation.train.model import load_model
from t5g2convert.adaptation.train.preflight import prepare
from t5g2convert.adaptation.ul2.dataset import task_names
from t5g2convert.adaptation.ul2.held_out import open_held_out
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.errors import CheckpointError, DataError
from tests.adaptation.trainings import changed, request_of, run, settings_of

ENGINE: Any = SimpleNamespace(global_rank=0, world_size=1, device=torch.device("cpu"), to_device=lambda batch: batch)


def module_of(small: Path, tasks: int) -> ModelWithLoss:
    network = load_model(open_checkpoint(small / "model"))
    return ModelWithLoss(network, tasks=tasks, softcap=None, chunk=100)


def test_the_losses_equal_those_of_single_samples(small: Path) -> None:
    settings = settings_of(image_every=2)
    held_out = open_held_out(small / "model", small / "data", settings, 10)
    assert [samples.settings.samples_of(0) for samples in held_out] == [16, 10]
    names = task_names(settings)
    module = module_of(small, len(names))
    found = evaluate(ENGINE, module, held_out, loop=LoopConfig(micro_tokens=300), step=7)
    assert found.step == 7
    assert set(found.tasks) == set(found.hidden) == set(found.labels) == set(names)
    expected = torch.zeros(3, len(names), dtype=torch.float64)
    with torch.no_grad():
        for samples in held_out:
            for number in range(samples.settings.samples_of(0)):
                batch = samples[MicroBatch(0, (number,), (True,))]
                for row, seen in enumerate((batch, hide_encoder(batch))):
                    _, losses, labels = module(seen)
                    expected[row] += losses
                expected[2] += labels
    for number, name in enumerate(names):
        assert found.labels[name] == expected[2, number]
        assert found.tasks[name] == pytest.approx(float(expected[0, number] / expected[2, number]), rel=1e-5)
        assert found.hidden[name] == pytest.approx(float(expected[1, number] / expected[2, number]), rel=1e-5)
    assert module.training


def test_a_list_of_corpora_gives_the_loss_of_each_by_its_weight(small: Path, two_corpora: Path) -> None:
    settings = settings_of(image_every=2)
    held_out = open_held_out(small / "model", two_corpora, settings, 20)
    assert [(each.corpora[0].name, each.settings.samples_of(0)) for each in held_out] == [
        ("one", 16), ("one", 12), ("two", 8),
    ]  # fmt: skip
    module = module_of(small, len(task_names(settings)))
    found = evaluate(ENGINE, module, held_out, loop=LoopConfig(), step=1)
    (one, two) = (
        evaluate(ENGINE, module, [each for each in held_out if each.corpora[0].name == name], loop=LoopConfig(), step=1)
        for name in ("one", "two")
    )
    assert found.corpora == pytest.approx({"one": one.loss, "two": two.loss})
    assert (one.corpora, two.corpora) == ({}, {})
    assert found.scalars["held out corpus/two"] == found.corpora["two"]
    assert f"; one {one.loss:.3f}, two {two.loss:.3f})" in found.line
    assert found.labels["images"] == one.labels["images"]


def test_the_input_of_a_hidden_encoder_has_no_effect(small: Path) -> None:
    samples = prepare(small / "model", small / "data", settings_of()).samples
    module = module_of(small, len(task_names(samples.settings))).eval()
    batch = samples[MicroBatch(0, (0, 1), (True, True))]
    other = {**batch, "input_ids": batch["input_ids"].flip(1)}
    with torch.no_grad():
        (visible, *_), (changed, *_) = module(batch), module(other)
        (hidden, *_), (hidden_changed, *_) = module(hide_encoder(batch)), module(hide_encoder(other))
    assert visible != changed
    assert hidden == hidden_changed


@pytest.mark.usefixtures("one_process")
def test_a_run_writes_its_held_out_losses_and_appends_when_resumed(small: Path, tmp_path: Path) -> None:
    settings = settings_of(steps=4, precision="float32", lr=4e-3)
    request = request_of(small, tmp_path / "run", settings, eval=small / "data", eval_every=2, eval_samples=8)
    seen: list[Evaluation] = []
    outcome = adapt(request, begun=lambda notes: None, report=lambda _: None, evaluated=seen.append)
    assert [found.step for found in seen] == [0, 2, 4]
    assert outcome.evaluations == tuple(seen) == tuple(read_evaluations(tmp_path / "run/evaluation.jsonl"))
    assert seen[-1].loss < seen[0].loss
    assert outcome.to_json()["held_out"]["step"] == 4
    assert "held out" in (tmp_path / "run/loss.svg").read_text()
    again = adapt(
        type(request)(request.model, request.data, request.run, request.options.replace(resume=True)),
        begun=lambda notes: None,
        report=lambda _: None,
        evaluated=seen.append,
    )
    assert again.evaluations == outcome.evaluations
    assert len(seen) == 3


@pytest.mark.parametrize("step", [2, 4])
@pytest.mark.usefixtures("one_process")
def test_an_evaluation_that_a_run_died_in_is_made_when_it_resumes(
    step: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(steps=4, precision="float32", lr=4e-3)
    request = request_of(small, tmp_path / "run", settings, eval=small / "data", eval_every=2, eval_samples=8)
    compute = module_under_test.evaluate

    def die(*arguments: Any, **options: Any) -> Evaluation:
        if options["step"] == step:
            raise DataError("died")
        return compute(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(module_under_test, "evaluate", die)
        with pytest.raises(DataError, match="died"):
            run(request)
    outcome, _ = run(changed(request, resume=True))
    run(replace(request, run=tmp_path / "whole"))
    assert (outcome.start, [found.step for found in outcome.evaluations]) == (step, [0, 2, 4])
    assert (tmp_path / "run/evaluation.jsonl").read_bytes() == (tmp_path / "whole/evaluation.jsonl").read_bytes()


def evaluation(step: int, loss: float) -> Evaluation:
    return Evaluation(step, {"prefix": loss}, {"prefix": loss + 1}, {"prefix": 10})


def test_the_mean_counts_labels() -> None:
    found = Evaluation(1, {"a": 1.0, "b": 4.0}, {"a": 2.0, "b": 5.0}, {"a": 30, "b": 10})
    assert (found.loss, found.hidden_loss) == (1.75, 2.75)
    assert found.line == ("held out after step 1  loss 1.7500  (a 1.000, b 4.000)  with the encoder hidden 2.7500")
    assert found.scalars == {
        "held out/loss": 1.75,
        "held out/loss with the encoder hidden": 2.75,
        "held out/a": 1.0,
        "held out/b": 4.0,
    }


@pytest.mark.parametrize(
    ("losses", "note"),
    [
        ([3, 2], None),
        ([3, 2, 1], None),
        ([3, 2, 2.5], None),
        ([3, 2, 2.5, 2.4], "was lowest after step 1 (2.0000) and is now 2.4000: the model overfits"),
        ([1, 2, 3], "was lowest after step 0 (1.0000) and is now 3.0000: the model overfits"),
    ],
)
def test_a_held_out_loss_that_rises_is_noted(losses: list[float], note: str | None) -> None:
    found = overfitting([evaluation(step, loss) for step, loss in enumerate(losses)])
    assert found == (None if note is None else f"the held-out loss {note}")


@pytest.mark.parametrize("line", ["{}", "[]", "x", '{"step": 1, "tasks": {}, "hidden": {}, "labels": {}, "more": 1}'])
def test_a_line_that_is_not_an_evaluation_is_refused(line: str, tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    assert read_evaluations(path) == []
    write_evaluations(path, [evaluation(1, 2.0)])
    assert read_evaluations(path) == [evaluation(1, 2.0)]
    assert json.loads(path.read_text())["step"] == 1
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(CheckpointError, match="has a line that is not an evaluation"):
        read_evaluations(path)


def test_something_else_in_place_of_the_file_is_refused_without_waiting(tmp_path: Path) -> None:
    path = tmp_path / "evaluation.jsonl"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match=r"evaluation\.jsonl: "):
        read_evaluations(path)
    path.unlink()
    path.symlink_to("nowhere")
    with pytest.raises(CheckpointError, match=r"evaluation\.jsonl: "):
        read_evaluations(path)
