"""Runs in separate processes, as users start them: what they learn, and what a kill costs."""

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from t5g2convert.adaptation.train.checkpoint_manifest import complete_checkpoints
from tests.adaptation.trainings import OPTIONS, RUN_OPTIONS, TASKS, adapt, steps_of, tensors_of

TOLERANCE = 1e-5
"""Different numbers of processes add up gradients in different orders; see test_kills.py."""


def mean_loss(steps: list[dict[str, Any]], task: str) -> float:
    pairs = [(step["tasks"][task], step["labels"][task]) for step in steps if task in step["tasks"]]
    return sum(loss * labels for loss, labels in pairs) / sum(labels for _, labels in pairs)


@pytest.mark.parametrize("task", [*sorted(TASKS), "images"])
def test_the_loss_of_every_task_falls(task: str, trained: Path) -> None:
    steps = steps_of(trained / "run")
    assert [step["step"] for step in steps] == list(range(1, 61))
    assert mean_loss(steps[40:], task) < mean_loss(steps[:20], task) - 0.5


def test_text_and_image_steps_alternate(trained: Path) -> None:
    for step in steps_of(trained / "run"):
        assert step["kind"] == ("text" if step["step"] % 4 else "images")
        assert set(step["tasks"]) == (TASKS if step["step"] % 4 else {"images"})


def test_the_tower_keeps_its_bytes_and_all_else_is_trained(small: Path, trained: Path) -> None:
    before = load_file(small / "model/model.safetensors")
    after = load_file(trained / "run/model/model.safetensors")
    assert before.keys() == after.keys()
    same = {name for name in before if torch.equal(before[name], after[name])}
    tower = {name for name in before if ".vision_tower." in name}
    assert tower
    # Only documents with images read the embedding of the end-of-image token, and so train it.
    assert same == tower


def test_json_output_is_one_document(trained: Path) -> None:
    output = json.loads((trained / "output.json").read_text())
    assert output["steps"] == 60
    assert output["resumed_from"] == 0
    assert Path(output["checkpoint"]).name == "step-00000060"
    assert output["model"]["parameters"]["vision"] > 0
    assert output["tasks"].keys() == {"images"}


def test_the_export_loads_in_transformers_and_generates(trained: Path) -> None:
    from transformers import T5Gemma2ForConditionalGeneration

    model, found = T5Gemma2ForConditionalGeneration.from_pretrained(
        trained / "run/model", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    prompt = torch.tensor([[2, 40, 41, 42]])
    written = model.generate(
        input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, min_new_tokens=5, do_sample=False
    )
    assert written.shape == (1, 6)


def test_the_export_is_the_last_checkpoint_rounded(trained: Path) -> None:
    exported = load_file(trained / "run/model/model.safetensors")
    for name, tensor in tensors_of(trained / "run", 60).items():
        assert torch.equal(tensor.to(torch.bfloat16), exported[name])


def test_the_files_of_a_run(trained: Path) -> None:
    run = trained / "run"
    names = {item.name for item in run.iterdir()}
    assert names == {"run.json", "metrics.jsonl", "tensorboard", "checkpoints", "loss.svg", "model"}
    assert list(complete_checkpoints(run)) == [20, 40, 60]
    assert any(item.name.startswith("events.") for item in (run / "tensorboard").iterdir())


@pytest.fixture(scope="module")
def killed(shared: Any, small: Path) -> Path:
    """`run` and `other`, of two processes, killed when the checkpoint of step 40 was written but not yet renamed."""

    def build(folder: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("KILLED_IN", "commit")
            patch.setenv("KILLED_AT", "40")
            options = (*RUN_OPTIONS, "--devices", "2", "--micro-batch", "3", "--no-export", "--async-save")
            adapt(small, folder / "run", *options, code=-signal.SIGKILL, module="tests.adaptation.killed")
        shutil.copytree(folder / "run", folder / "other")

    return shared("killed", build)


def assert_close(one: Path, other: Path, step: int) -> None:
    first, second = tensors_of(one, step), tensors_of(other, step)
    assert first.keys() == second.keys()
    for name in first:
        print(name, float((first[name] - second[name]).abs().max()))
        assert (first[name] - second[name]).abs().max() < TOLERANCE, name


@pytest.mark.slow
def test_two_processes_equal_one_and_a_kill_leaves_the_older_checkpoint(killed: Path, trained: Path) -> None:
    run = killed / "other"
    assert list(complete_checkpoints(run)) == [20]
    assert (run / "checkpoints/.step-00000040.partial/checkpoint.json").exists()
    assert_close(run, trained / "run", 20)
    for ours, theirs in zip(steps_of(run), steps_of(trained / "run"), strict=False):
        assert ours["labels"] == theirs["labels"]
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=TOLERANCE)
        assert ours["tasks"] == pytest.approx(theirs["tasks"], abs=TOLERANCE)


@pytest.mark.slow
def test_resuming_on_as_many_processes_continues_bit_for_bit(killed: Path, small: Path, trained: Path) -> None:
    before = steps_of(killed / "run")
    assert [step["step"] for step in before] == list(range(1, 41))
    options = (*RUN_OPTIONS, "--devices", "2", "--micro-batch", "3", "--no-export", "--resume")
    done = adapt(small, killed / "run", *options)
    assert "resuming after 20 steps" in done.stderr
    after = steps_of(killed / "run")
    assert after[:40] == before
    assert [step["step"] for step in after] == list(range(1, 61))
    assert list(complete_checkpoints(killed / "run")) == [20, 40, 60]
    assert not list((killed / "run/checkpoints").glob(".step-*"))
    assert_close(killed / "run", trained / "run", 60)


def test_resuming_on_one_process_equals_the_uninterrupted_run(killed: Path, small: Path, trained: Path) -> None:
    adapt(small, killed / "other", *RUN_OPTIONS, "--micro-batch", "8", "--no-export", "--resume", "--workers", "1")
    assert_close(killed / "other", trained / "run", 60)
    ours, theirs = steps_of(killed / "other"), steps_of(trained / "run")
    assert [step["labels"] for step in ours] == [step["labels"] for step in theirs]


@pytest.mark.slow
def test_a_signal_ends_a_run_with_its_own_exit_code(small: Path, tmp_path: Path) -> None:
    import os
    import subprocess

    from tests.adaptation.trainings import command

    run = tmp_path / "run"
    options = (*OPTIONS, "--save-every", "1000", "--no-export")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command(small, run, *options), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 3 "):
            process.send_signal(signal.SIGTERM)
            break
    _, stderr = process.communicate(timeout=300)
    assert process.returncode == 128 + signal.SIGTERM, stderr
    assert "stopped by signal 15 (repeat the command with --resume to continue from the last checkpoint" in stderr
    (last,) = complete_checkpoints(run)
    assert last == len(steps_of(run)) >= 3
    assert tensors_of(run, last)


@pytest.mark.slow
def test_an_error_is_printed_once_and_all_processes_end_with_its_code(small: Path, trained: Path) -> None:
    options = (*RUN_OPTIONS, "--devices", "2", "--no-export", "--resume", "--seed", "1")
    done = adapt(small, trained / "run", *options, code=2)
    assert done.stderr.count("seed 0, now 1") == 1
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_an_error_of_the_second_process_is_printed_once_with_its_code(small: Path, tmp_path: Path) -> None:
    options = (*OPTIONS, "--devices", "2", "--micro-batch", "1", "--no-export")
    done = adapt(small, tmp_path / "run", *options, code=3, module="tests.adaptation.faulty")
    assert done.stderr.count("no such file") == 1
    assert "Traceback" not in done.stderr
    assert [step["step"] for step in steps_of(tmp_path / "run")] == [1, 2, 3]


def test_the_export_has_the_models_dtype(small: Path, trained: Path) -> None:
    for folder in (small / "model", trained / "run/model"):
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert file.get_slice("model.encoder.norm.weight").get_dtype() == "BF16"


@pytest.mark.slow
@pytest.mark.parametrize("options", [("--shard-size", "2", "--reduce", "step"), ("--reduce", "pass")])
def test_four_processes_equal_one_with_two_copies_of_the_model_and_with_one(
    options: tuple[str, ...], small: Path, trained: Path, tmp_path: Path
) -> None:
    adapt(small, tmp_path / "run", *RUN_OPTIONS, "--devices", "4", "--micro-batch", "1", "--no-export", *options)
    assert_close(tmp_path / "run", trained / "run", 60)
    ours, theirs = steps_of(tmp_path / "run"), steps_of(trained / "run")
    assert [step["labels"] for step in ours] == [step["labels"] for step in theirs]
