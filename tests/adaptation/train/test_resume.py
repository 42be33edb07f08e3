"""Runs that a signal, the clock or a change of settings divides."""

import json
import shutil
import signal
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from t5g2convert.adaptation.adapt import adapt
from t5g2convert.adaptation.average import average
from t5g2convert.adaptation.train.checkpoint_manifest import (
    complete_checkpoints,
    regular_checkpoints,
)
from t5g2convert.adaptation.train.history import read_history
from t5g2convert.adaptation.train.metrics import Metrics
from t5g2convert.adaptation.train.run_folder import check_vacant
from t5g2convert.adaptation.train.schedule import first_sample, learning_rate
from t5g2convert.checkpoint.manifest import read_manifest
from t5g2convert.conversion.write import resources
from t5g2convert.errors import DataError, Interrupted, OutputError, UsageError
from t5g2convert.publish.card import model_card
from tests.adaptation.trainings import changed, request_of, run, send, settings_of, tensors_of


@pytest.mark.usefixtures("one_process")
def test_a_run_that_a_signal_ends_finishes_its_step_and_loses_nothing(small: Path, tmp_path: Path) -> None:
    settings = settings_of(precision="float32", steps=6, image_every=3)
    request = request_of(small, tmp_path / "run", settings, save_every=100)
    with pytest.raises(Interrupted) as raised:
        adapt(request, begun=lambda notes: None, report=send(signal.SIGTERM, at=2))
    assert raised.value.exit_code == 143
    assert list(complete_checkpoints(tmp_path / "run")) == [3]
    assert not regular_checkpoints(tmp_path / "run")
    outcome, steps = run(changed(request, resume=True))
    assert (outcome.start, [step.step for step in steps]) == (3, [4, 5, 6])
    run(replace(request, run=tmp_path / "whole"))
    resumed, whole = (tensors_of(tmp_path / name, 6) for name in ("run", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
    assert list(complete_checkpoints(tmp_path / "run")) == [6]


@pytest.mark.usefixtures("one_process")
def test_a_disk_without_room_for_a_checkpoint_is_refused_before_the_first_step(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resources, "free_bytes", lambda _: 1000)
    with pytest.raises(OutputError, match=r"the disk has 1,000 bytes free, the output needs [\d,]+"):
        run(request_of(small, tmp_path / "run", settings_of()))
    check_vacant(tmp_path / "run")


@pytest.mark.usefixtures("one_process")
def test_sigusr1_writes_a_checkpoint_and_the_run_continues(small: Path, tmp_path: Path) -> None:
    request = request_of(small, tmp_path / "run", settings_of(steps=4), save_every=100)
    seen: dict[int, list[int]] = {}

    def report(metrics: Metrics) -> None:
        send(signal.SIGUSR1, at=1)(metrics)
        seen[metrics.step] = list(complete_checkpoints(tmp_path / "run"))

    adapt(request, begun=lambda notes: None, report=report)
    assert seen == {1: [], 2: [], 3: [2], 4: [2]}
    assert list(complete_checkpoints(tmp_path / "run")) == [4]


@pytest.mark.usefixtures("one_process")
def test_only_the_newest_interim_checkpoint_is_kept(small: Path, tmp_path: Path) -> None:
    request = request_of(small, tmp_path / "run", settings_of(steps=5), save_every=2, save_minutes=1e-9)
    seen: list[list[int]] = []
    adapt(request, begun=lambda notes: None, report=lambda _: seen.append(list(complete_checkpoints(tmp_path / "run"))))
    assert seen == [[], [1], [2], [2, 3], [2, 4]]
    assert list(complete_checkpoints(tmp_path / "run")) == [4, 5]


def lr_of(steps: Sequence[Metrics]) -> list[float]:
    return [step.lr for step in steps]


@pytest.mark.usefixtures("one_process")
def test_more_steps_are_made_by_resuming_with_more(small: Path, tmp_path: Path) -> None:
    request = request_of(small, tmp_path / "run", settings_of(precision="float32", image_every=2), export=True)
    run(request)
    notes: list[str] = []
    more: list[Metrics] = []
    longer = changed(request, steps=7, resume=True)
    outcome = adapt(longer, begun=notes.extend, report=more.append)
    assert notes[-2:] == ["resuming after 4 steps", "from step 5 on: steps 4, now 7"]
    exported = read_manifest(tmp_path / "run/model").adaptation
    assert exported is not None
    assert exported.steps == 7
    assert (outcome.start, [step.step for step in more]) == (4, [5, 6, 7])
    assert lr_of(more) == [learning_rate(longer.options, step) for step in (4, 5, 6)]
    document = json.loads((tmp_path / "run/run.json").read_text())
    assert [(leg["until"], leg["settings"]["steps"]) for leg in document["earlier"]] == [(4, 4)]
    again, steps = run(longer)
    assert (again.start, steps) == (7, [])
    assert json.loads((tmp_path / "run/run.json").read_text()) == document
    with pytest.raises(UsageError, match="--steps is 5, but the run has made 7"):
        run(changed(longer, steps=5, change=True))


@pytest.mark.usefixtures("one_process")
def test_changed_settings_apply_from_the_newest_checkpoint_on(small: Path, tmp_path: Path) -> None:
    request = request_of(small, tmp_path / "run", settings_of(precision="float32", steps=8, image_every=3))
    with pytest.raises(Interrupted):
        adapt(request, begun=lambda notes: None, report=send(signal.SIGTERM, at=3))
    other = changed(request, resume=True, lr=5e-4, batch_tokens=512, clip=0.5)
    with pytest.raises(
        UsageError, match=r"batch_tokens 256, now 512 \(--change lets it hold from the newest checkpoint"
    ):
        run(other)
    with pytest.raises(UsageError, match=r"encoder_eos false, now true \(use the options of the first start"):
        run(changed(other, change=True, encoder_eos=True))
    _, steps = run(changed(other, change=True))
    assert [step.step for step in steps] == [5, 6, 7, 8]
    assert lr_of(steps) == [learning_rate(other.options, step) for step in (4, 5, 6, 7)]
    history = read_history(tmp_path / "run")
    (leg,) = history.legs
    assert (leg.until, leg.settings.lr, history.settings.lr) == (4, 1e-3, 5e-4)
    # Before it came three text steps of four samples and one image step, of as many documents as fill the batch.
    images = [leg.settings.image_samples, history.settings.image_samples]
    assert images == [256 // 8, 512 // 8]
    assert first_sample(history.settings, 4, history.legs) == 12
    assert first_sample(history.settings, 5, history.legs) == images[0]
    assert first_sample(history.settings, 6, history.legs) == 12 + 8
    average(tmp_path / "run", tmp_path / "mean", last=2)
    manifest = read_manifest(tmp_path / "mean")
    assert manifest.adaptation is not None
    assert manifest.adaptation.earlier is not None
    assert [leg.until for leg in manifest.adaptation.earlier] == [4]
    card = model_card(tmp_path / "mean", repo="", source_card=None, existing=None, mode="update")
    assert card is not None
    assert "| settings changed | after step 4; the values above are those since then |" in card


@pytest.mark.usefixtures("one_process")
def test_legs_end_at_the_newest_checkpoint_that_is_left(small: Path, tmp_path: Path) -> None:
    request = request_of(small, tmp_path / "run", settings_of(precision="float32"), save_every=1, keep=9)
    run(request)
    longer = changed(request, steps=6, lr=5e-4, resume=True, change=True)
    run(longer)
    for step in (4, 5, 6):
        shutil.rmtree(tmp_path / f"run/checkpoints/step-{step:08d}")
    outcome, steps = run(changed(longer, change=False))
    assert (outcome.start, [step.step for step in steps]) == (3, [4, 5, 6])
    history = read_history(tmp_path / "run")
    assert [(leg.until, leg.settings.lr) for leg in history.legs] == [(3, 1e-3)]
    assert [step.lr for step in steps] == [learning_rate(longer.options, step) for step in (3, 4, 5)]


@pytest.mark.usefixtures("one_process")
def test_a_change_before_the_first_checkpoint_starts_over(small: Path, tmp_path: Path) -> None:
    request = request_of(small, tmp_path / "run", settings_of(), save_every=100)

    def stop(_: Metrics) -> None:
        raise DataError("stopped")

    with pytest.raises(DataError, match="stopped"):
        adapt(request, begun=lambda notes: None, report=stop)
    outcome, _ = run(changed(request, resume=True, change=True, lr=5e-4))
    history = read_history(tmp_path / "run")
    assert (outcome.start, history.legs, history.settings.lr) == (0, (), 5e-4)
