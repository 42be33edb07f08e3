"""Runs that start again from an earlier checkpoint, or pass over data."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from t5g2convert.adaptation import training
from t5g2convert.adaptation.adapt import Request, adapt, foresee
from t5g2convert.adaptation.train import checkpoint_manifest, evaluation, loop
from t5g2convert.adaptation.train.checkpoint_manifest import complete_checkpoints
from t5g2convert.adaptation.train.history import read_history
from t5g2convert.adaptation.train.resume import go_back
from t5g2convert.adaptation.train.schedule import learning_rate
from t5g2convert.errors import CheckpointError, DataError, Interrupted, OutputError, UsageError
from tests.adaptation.trainings import (
    changed,
    request_of,
    run,
    runs_in_this_process,
    send,
    settings_of,
    steps_of,
    tensors_of,
)

pytestmark = pytest.mark.usefixtures("one_process")


def request_in(small: Path, folder: Path, **changes: Any) -> Request:
    how = {"save_every": 2, "keep": 9, "eval": small / "data", "eval_every": 2, "eval_samples": 8}
    settings = settings_of(precision="float32", steps=6, image_every=3)
    return request_of(small, folder, settings, **{**how, **changes})


@pytest.fixture(scope="module")
def made(small: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps, made once."""
    folder = tmp_path_factory.mktemp("going-back") / "run"
    with runs_in_this_process():
        run(request_in(small, folder))
    return folder


@pytest.fixture
def again(small: Path, made: Path, tmp_path: Path) -> Request:
    """The same run in a folder of its own, to be resumed."""
    shutil.copytree(made, tmp_path / "run")
    return request_in(small, tmp_path / "run", resume=True)


def names_in(run: Path) -> list[str]:
    return sorted(path.name for path in (run / "checkpoints").iterdir())


def assert_equal(one: Path, other: Path, step: int) -> None:
    first, second = tensors_of(one, step), tensors_of(other, step)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def evaluated(run: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (run / "evaluation.jsonl").read_text().splitlines()]


def test_a_run_goes_back_to_a_checkpoint_and_sets_newer_ones_aside(again: Request, made: Path) -> None:
    seen: list[list[str]] = []
    notes: list[str] = []

    def report(_: object) -> None:
        seen.append(names_in(again.run))

    outcome = adapt(changed(again, from_step=2), begun=notes.extend, report=report)
    assert outcome.start == 2
    assert "resuming after 2 steps" in notes
    aside = ["step-00000004.abandoned", "step-00000006.abandoned"]
    assert seen[0] == ["step-00000002", *aside]
    assert names_in(again.run) == sorted(["step-00000002", "step-00000004", "step-00000006", *aside])
    assert steps_of(again.run) == steps_of(made)
    assert evaluated(again.run) == evaluated(made) == [0, 2, 4, 6]
    assert_equal(again.run, made, 6)
    assert read_history(again.run).returned == 2


def test_the_same_command_goes_back_once(again: Request) -> None:
    with pytest.raises(Interrupted):
        adapt(changed(again, from_step=2), begun=lambda _: None, report=send(signal.SIGTERM, at=4))
    before = names_in(again.run)
    outcome, steps = run(changed(again, from_step=2))
    assert (outcome.start, [step.step for step in steps]) == (5, [6])
    assert set(before) - set(names_in(again.run)) == {"step-00000005"}
    # To another step, or with other settings, it goes back again.
    outcome, _ = run(changed(again, from_step=4))
    assert (outcome.start, read_history(again.run).returned) == (4, 4)
    assert "step-00000006.abandoned-2" in names_in(again.run)
    outcome, _ = run(changed(again, from_step=4, change=True, lr=5e-4))
    assert (outcome.start, read_history(again.run).returned) == (4, 4)
    assert "step-00000006.abandoned-3" in names_in(again.run)


def test_evaluations_after_the_checkpoint_are_gone_at_once(again: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    slower = changed(again, from_step=2, change=True, lr=5e-4)
    compute = evaluation.evaluate

    def die(*arguments: Any, **options: Any) -> evaluation.Evaluation:
        if options["step"] == 4:
            raise DataError("died")
        return compute(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate", die)
        with pytest.raises(DataError, match="died"):
            run(slower)
    # The checkpoint of step 4 is new, so the loss that the run had there before is not that of this checkpoint.
    assert evaluated(again.run) == [0, 2]
    assert [found.step for found in run(slower)[0].evaluations] == [0, 2, 4, 6]


def test_a_log_without_the_steps_of_the_checkpoint_is_refused_before_the_run_goes_on(again: Request) -> None:
    log = again.run / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    log.write_bytes(b"".join(lines[:1] + lines[2:]))
    with pytest.raises(CheckpointError, match="has no line for step 2"):
        run(again)
    log.write_bytes(b"")
    with pytest.raises(CheckpointError, match="has no line for step 1"):
        run(again)


def test_other_settings_hold_from_the_chosen_checkpoint_on(again: Request) -> None:
    slower = changed(again, from_step=2, change=True, lr=5e-4)
    _, steps = run(slower)
    assert [step.lr for step in steps] == [learning_rate(slower.options, step) for step in (2, 3, 4, 5)]
    history = read_history(again.run)
    assert ([(leg.until, leg.settings.lr) for leg in history.legs], history.settings.lr) == ([(2, 1e-3)], 5e-4)
    assert run(slower)[0].start == 6
    # A leg that the run has gone back before is gone.
    run(changed(again, from_step=2, change=True, lr=2e-4))
    assert [(leg.until, leg.settings.lr) for leg in read_history(again.run).legs] == [(2, 1e-3)]


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_run_that_dies_while_it_goes_back_can_go_back_again(
    renamed: int, again: Request, made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flush, flushed = checkpoint_manifest.flush_folder, []

    def die(*_: Any) -> None:
        raise OSError(5, "Input/output error")

    def flush_some(folder: Path) -> None:
        flushed.append(folder)
        (die if len(flushed) > renamed else flush)(folder)

    with monkeypatch.context() as patch:
        if renamed == 2:
            patch.setattr(training, "write_description", die)
        else:
            patch.setattr(checkpoint_manifest, "flush_folder", flush_some)
        with pytest.raises((OutputError, OSError), match="Input/output error"):
            run(changed(again, from_step=2))
    # The newest was renamed first: what is left are the first checkpoints of the run.
    assert list(complete_checkpoints(again.run)) == [2, 4, 6][: max(1, 2 - renamed)]
    outcome, _ = run(changed(again, from_step=2))
    assert outcome.start == 2
    assert_equal(again.run, made, 6)


def test_a_checkpoint_that_is_not_there_is_refused(again: Request, tmp_path: Path) -> None:
    before = names_in(again.run)
    with pytest.raises(UsageError, match=r"--from 3: .* has no checkpoint of that step; it has 2, 4, 6$"):
        run(changed(again, from_step=3))
    with pytest.raises(UsageError, match=r"lr 0\.001, now 0\.01"):
        run(changed(again, from_step=2, lr=1e-2))
    (again.run / "checkpoints/step-00000002/checkpoint.json").unlink()
    with pytest.raises(CheckpointError, match=r"checkpoint\.json: is missing"):
        run(changed(again, from_step=2))
    assert names_in(again.run) == before
    with pytest.raises(UsageError, match="--from needs --resume"):
        foresee(changed(again, from_step=2, resume=False))
    absent = request_in(again.model.parent, tmp_path / "absent", resume=True, from_step=2)
    with pytest.raises(UsageError, match="--from 2: there is no run to resume in"):
        run(absent)


def labels_of(run: Path) -> list[dict[str, int]]:
    return [step["labels"] for step in steps_of(run)]


def test_skipped_data_is_passed_over_and_resuming_is_exact(small: Path, again: Request, tmp_path: Path) -> None:
    # With an image step in the skipped ones: each kind passes over its own samples.
    longer = request_in(small, tmp_path / "longer")
    longer = changed(longer, steps=9, image_every=3)
    run(longer)
    skipping = changed(again, from_step=2, skip_steps=("4-6",))
    with pytest.raises(Interrupted):
        adapt(skipping, begun=lambda _: None, report=send(signal.SIGTERM, at=4))
    assert run(changed(skipping, from_step=None))[0].start == 5
    plain = labels_of(longer.run)
    assert labels_of(again.run) == [*plain[:3], *plain[6:9]]
    history = read_history(again.run)
    assert (history.settings.skip_steps, [leg.until for leg in history.legs]) == (("4-6",), [2])
    whole = request_in(small, tmp_path / "whole", skip_steps=("4-6",))
    run(whole)
    assert_equal(again.run, whole.run, 6)


def test_a_skip_is_part_of_the_run_from_then_on(again: Request) -> None:
    run(changed(again, from_step=2, skip_steps=("4-5",)))
    with pytest.raises(UsageError, match=r"skip_steps \[\"4-5\"\], now \[\]"):
        run(again)
    with pytest.raises(UsageError, match=r"--skip-steps 4-5 differs, but the run has made 6 steps \(--from STEP goes"):
        run(changed(again, change=True))
    with pytest.raises(UsageError, match="--skip-steps 6-6 differs, but the run has made 6 steps"):
        run(changed(again, skip_steps=("4-5", "6-6")))
    outcome, steps = run(changed(again, skip_steps=("4-5", "7-9"), steps=8))
    assert (outcome.start, [step.step for step in steps]) == (6, [7, 8])


def test_a_step_with_a_gradient_that_is_not_finite_is_skipped_as_the_hint_says(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, steps = loop.get_total_norm, []
    request = request_in(small, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "get_total_norm", lambda found: get(found) * float("nan" if len(steps) == 4 else 1))
        with pytest.raises(DataError, match="the gradient of step 5 is not finite") as raised:
            adapt(request, begun=lambda _: None, report=steps.append)
    assert "--resume --skip-steps 5-5 passes over its data" in str(raised.value.hint)
    outcome, _ = run(changed(request, resume=True, skip_steps=("5-5",)))
    assert outcome.start == 4
    assert [step["step"] for step in steps_of(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]


def test_a_model_exported_from_a_later_checkpoint_is_set_aside(again: Request) -> None:
    exported = again.run / "model"
    exported.mkdir()
    (exported / "t5g2.json").write_text("{}")
    go_back(again.run, 4)
    assert not exported.exists()
    assert (again.run / "model.abandoned/t5g2.json").read_text() == "{}"
    # A folder of the user stays.
    exported.mkdir()
    (exported / "notes.txt").write_text("mine")
    go_back(again.run, 4)
    assert (exported / "notes.txt").read_text() == "mine"
