"""Runs of one, two and four processes, killed at every kind of moment and resumed on another number: all are equal."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from t5g2convert.adaptation.train.checkpoint_manifest import check_files, complete_checkpoints, read_checkpoint_manifest
from tests.adaptation.trainings import OPTIONS, RUN_OPTIONS, adapt, steps_of, tensors_of

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
"""Processes and passes add up the gradient in different orders, and AdamW divides by its size: where a gradient is
nearly 0, the rounding of the first steps moves a value by at most 7.4e-6 here, whatever follows."""

STEPS = 12


def assert_close(one: Path, other: Path, step: int, tolerance: float = TOLERANCE) -> None:
    first, second = tensors_of(one, step), tensors_of(other, step)
    assert first.keys() == second.keys()
    far = {name: float((first[name] - second[name]).abs().max()) for name in first}
    assert max(far.values()) <= tolerance, max(far.items(), key=lambda each: each[1])


@pytest.mark.parametrize("processes", [2, 4])
def test_sixty_steps_of_several_processes_equal_those_of_one(
    processes: int, small: Path, trained: Path, tmp_path: Path
) -> None:
    options = (*RUN_OPTIONS, "--devices", str(processes), "--micro-batch", str(6 // processes), "--no-export")
    adapt(small, tmp_path / "run", *options)
    for step in (20, 40, 60):
        assert_close(tmp_path / "run", trained / "run", step)
    ours, theirs = steps_of(tmp_path / "run"), steps_of(trained / "run")
    assert len(ours) == len(theirs) == 60
    for one, other in zip(ours, theirs, strict=True):
        assert one["labels"] == other["labels"]
        # Weights that differ by 1e-5 have gradients that differ by more.
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=10 * TOLERANCE)
        assert one["tasks"] == pytest.approx(other["tasks"], abs=TOLERANCE)


def options_of(small: Path, processes: int, *more: str) -> tuple[str, ...]:
    own = ("--steps", str(STEPS), "--save-every", "4", "--keep", "9", "--devices", str(processes), "--no-export")
    held_out = ("--eval", str(small / "data"), "--eval-every", "4", "--eval-samples", "8", "--micro-batch", "3")
    return (*OPTIONS, *own, *held_out, *more)


@pytest.fixture(scope="module")
def whole(shared: Any, small: Path) -> dict[int, Path]:
    """Runs that nothing interrupts, by their number of processes."""

    def build(folder: Path) -> None:
        for processes in (1, 2):
            adapt(small, folder / str(processes), *options_of(small, processes))

    folder = shared("whole", build)
    return {processes: folder / str(processes) for processes in (1, 2)}


@pytest.fixture(scope="module")
def killed(shared: Any, small: Path) -> Any:
    """Return a function that gives a run that was killed at a moment of step 8."""

    def make(moment: str, how: str, processes: int) -> Path:
        def build(folder: Path) -> None:
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("KILLED_IN", moment)
                patch.setenv("KILLED_AT", "8")
                module = "tests.adaptation.killed"
                adapt(small, folder / "run", *options_of(small, processes, how), code=-signal.SIGKILL, module=module)

        folder: Path = shared(f"killed-{moment}{how}-{processes}", build)
        return folder / "run"

    return make


@pytest.mark.parametrize(
    ("moment", "how", "before", "after"),
    [
        (*moment, 2, after)
        for moment in [
            ("step", "--async-save"),
            ("files", "--no-async-save"),
            ("files", "--async-save"),
            ("commit", "--async-save"),
            ("evaluation", "--async-save"),
        ]
        for after in (1, 2)
    ]
    + [("files", "--async-save", 1, 1), ("files", "--async-save", 1, 2)],
)
def test_a_run_that_is_killed_and_resumed_equals_one_that_is_not(
    moment: str, how: str, before: int, after: int, small: Path, killed: Any, whole: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    shutil.copytree(killed(moment, how, before), run)
    # In the evaluation of step 8, a save in the background may have ended.
    found = list(complete_checkpoints(run))
    assert found in ([[4], [4, 8]] if moment == "evaluation" else [[4]])
    done = adapt(small, run, *options_of(small, after, "--resume"))
    assert f"resuming after {found[-1]} steps" in done.stderr
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == [
        f"step-{step:08d}" for step in (4, 8, STEPS)
    ]
    for step, folder in complete_checkpoints(run).items():
        check_files(folder, read_checkpoint_manifest(folder))
        assert_close(run, whole[before], step, 0.0 if before == after else TOLERANCE)
    ours, theirs = steps_of(run), steps_of(whole[before])
    if before == after:
        assert ours == theirs
        assert (run / "evaluation.jsonl").read_text() == (whole[before] / "evaluation.jsonl").read_text()
    assert [step["labels"] for step in ours] == [step["labels"] for step in theirs]
    evaluated = [json.loads(line)["step"] for line in (run / "evaluation.jsonl").read_text().splitlines()]
    assert evaluated == [0, 4, 8, STEPS]


def test_the_runs_of_one_and_of_two_processes_are_equal(whole: dict[int, Path]) -> None:
    assert_close(whole[1], whole[2], STEPS)
    assert not all(
        torch.equal(one, other)
        for one, other in zip(tensors_of(whole[1], STEPS).values(), tensors_of(whole[2], STEPS).values(), strict=True)
    )
