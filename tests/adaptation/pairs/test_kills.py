"""Runs of fine-tuning on one and two processes, killed and resumed on another number: all are equal."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from t5g2convert.adaptation.train.checkpoint_manifest import complete_checkpoints
from t5g2convert.adaptation.train.evaluation_log import read_evaluations
from tests.adaptation.finetunings import OPTIONS, finetuned
from tests.adaptation.train.test_kills import TOLERANCE, assert_close
from tests.adaptation.trainings import steps_of

STEPS = 12
HELD_OUT = ("--eval-pairs", "6", "--eval-every", "4", "--generate-eval", "--generate-samples", "4")
KILLED = "tests.adaptation.killed"


def options_of(processes: int, *more: str) -> tuple[str, ...]:
    # With the default epsilon, AdamW makes a visible step from the rounding of a gradient that is nearly 0.
    own = (
        "--eps",
        "1e-5",
        "--steps",
        str(STEPS),
        "--save-every",
        "4",
        "--keep",
        "9",
        "--no-export",
        "--micro-batch",
        "2",
    )
    return (*OPTIONS, *own, *HELD_OUT, "--devices", str(processes), *more)


@pytest.fixture(scope="module")
def whole(shared: Any, small: Path, pairs: Path) -> dict[int, Path]:
    """Runs that nothing interrupts, by their number of processes."""

    def build(folder: Path) -> None:
        for processes in (1, 2):
            finetuned(small, pairs, folder / str(processes), *options_of(processes))

    folder = shared("whole-pairs", build)
    return {processes: folder / str(processes) for processes in (1, 2)}


def kill(small: Path, pairs: Path, run: Path, *options: str, moment: str, at: int) -> None:
    """Make steps of a run, and kill it at a moment of a step."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KILLED_IN", moment)
        patch.setenv("KILLED_AT", str(at))
        finetuned(small, pairs, run, *options, code=-signal.SIGKILL, module=KILLED)


def assert_equal(run: Path, other: Path, *, exact: bool) -> None:
    assert list(complete_checkpoints(run)) == list(complete_checkpoints(other)) == [4, 8, STEPS]
    for step in (4, 8, STEPS):
        assert_close(run, other, step, 0.0 if exact else TOLERANCE)
    ours, theirs = steps_of(run), steps_of(other)
    assert [step["labels"] for step in ours] == [step["labels"] for step in theirs]
    if exact:
        assert ours == theirs
        assert (run / "evaluation.jsonl").read_bytes() == (other / "evaluation.jsonl").read_bytes()
    for one, two in zip(*(read_evaluations(each / "evaluation.jsonl") for each in (run, other)), strict=True):
        assert one.step == two.step
        assert one.loss == pytest.approx(two.loss, abs=1e-4)
        assert one.generated == two.generated


def test_two_processes_equal_one_with_pairs_of_both_kinds(whole: dict[int, Path]) -> None:
    assert_equal(whole[1], whole[2], exact=False)
    kinds = [json.loads(line)["labels"].keys() for line in (whole[1] / "metrics.jsonl").read_text().splitlines()]
    assert any(len(names) == 2 for names in kinds)


def test_a_run_killed_on_one_on_two_and_resumed_on_one_process_equals_one_that_is_not(
    small: Path, pairs: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    kill(small, pairs, run, *options_of(1), moment="step", at=6)
    assert list(complete_checkpoints(run)) == [4]
    kill(small, pairs, run, *options_of(2, "--resume"), moment="step", at=10)
    assert list(complete_checkpoints(run)) == [4, 8]
    done = finetuned(small, pairs, run, *options_of(1, "--resume"))
    assert "resuming after 8 steps" in done.stderr
    assert_equal(run, whole[1], exact=False)


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("moment", ["commit", "evaluation"])
def test_resuming_on_as_many_processes_continues_bit_for_bit(
    moment: str, processes: int, small: Path, pairs: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    kill(small, pairs, run, *options_of(processes), moment=moment, at=8)
    finetuned(small, pairs, run, *options_of(processes, "--resume"))
    assert_equal(run, whole[processes], exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--reduce", "pass"), ("--reduce", "step", "--shard-size", "1")])
def test_ways_to_sum_gradients_give_the_same(
    options: tuple[str, ...], small: Path, pairs: Path, whole: dict[int, Path], tmp_path: Path
) -> None:
    finetuned(small, pairs, tmp_path / "run", *options_of(2, *options))
    assert_equal(tmp_path / "run", whole[1], exact=False)


@pytest.mark.slow
def test_the_best_checkpoint_of_an_early_end_is_exported_on_two_processes(
    small: Path, pairs: Path, tmp_path: Path
) -> None:
    options = ("--patience", "1", "--lr-floor", "1", "--lr", "0.5", "--eval-every", "2", "--export", "--json")
    done = finetuned(small, pairs, tmp_path / "run", *options_of(2), *options)
    found = json.loads(done.stdout)
    assert found["stopped"] < STEPS
    assert found["best"] < found["stopped"]
    assert found["model"]["output"] == str(tmp_path / "run/model")
    copy = tmp_path / "copy"
    shutil.copytree(tmp_path / "run", copy)
    again = json.loads(finetuned(small, pairs, copy, *options_of(2), *options, "--resume").stdout)
    assert (again["stopped"], again["best"]) == (found["stopped"], found["best"])
    assert len(steps_of(copy)) == found["stopped"]


def test_two_processes_train_in_bfloat16_with_a_teacher(small: Path, pairs: Path, tmp_path: Path) -> None:
    # FSDP sums gradients of one dtype: the projector's must not begin after the first pass of a step.
    options = ("--precision", "bfloat16", "--kd", str(small / "parent"))
    finetuned(small, pairs, tmp_path / "run", *options_of(2), *options)
    steps = steps_of(tmp_path / "run")
    assert steps[-1]["loss"] < steps[0]["loss"]
