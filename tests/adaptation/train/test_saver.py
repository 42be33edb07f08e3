"""Checkpoints that are written while training goes on, in runs of one process."""

import errno
import json
import os
import signal
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from t5g2convert.adaptation.adapt import Request, adapt
from t5g2convert.adaptation.train import checkpoints, loop, saver
from t5g2convert.adaptation.train.checkpoint_manifest import (
    check_files,
    checkpoint_path,
    complete_checkpoints,
    read_checkpoint_manifest,
    regular_checkpoints,
)
from t5g2convert.adaptation.train.checkpoint_writer import CheckpointWriter
from t5g2convert.adaptation.train.metrics import Metrics
from t5g2convert.errors import DataError, Interrupted, MachineError, OutputError
from tests.adaptation.runs import SHARD
from tests.adaptation.trainings import changed, request_of, run, settings_of, tensors_of

pytestmark = pytest.mark.usefixtures("one_process")


def background(small: Path, folder: Path, *, steps: int = 6, **changes: Any) -> Request:
    how = {"save_every": 2, "keep": 9, "async_save": True}
    return request_of(small, folder, settings_of(precision="float32", steps=steps), **{**how, **changes})


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Hold every save in the background before its first byte, until the event is set."""
    write, event = CheckpointWriter.write_data, threading.Event()

    def held(*arguments: Any) -> Any:
        if threading.current_thread() is not threading.main_thread():
            assert event.wait(60)
        return write(*arguments)

    monkeypatch.setattr(CheckpointWriter, "write_data", held)
    return event


def contents(checkpoint: Path) -> tuple[Mapping[str, object], bytes]:
    """Return the header of a checkpoint's only file, and the bytes of all tensors.

    The library writes the entries of the header's metadata in random order, so that files differ.
    """
    data = (checkpoint / SHARD).read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:start]), data[start:]


def at(step: int, act: Callable[[], None]) -> Callable[[Metrics], None]:
    return lambda metrics: act() if metrics.step == step else None


def test_a_save_in_the_background_has_the_bytes_of_its_step(small: Path, tmp_path: Path, held: threading.Event) -> None:
    seen: dict[int, list[int]] = {}

    def report(metrics: Metrics) -> None:
        seen[metrics.step] = list(complete_checkpoints(tmp_path / "run"))
        at(4, held.set)(metrics)

    adapt(background(small, tmp_path / "run"), begun=lambda _: None, report=report)
    run(background(small, tmp_path / "other", async_save=False))
    assert {step: seen[step] for step in (1, 2, 3, 4)} == {1: [], 2: [], 3: [], 4: []}
    assert list(complete_checkpoints(tmp_path / "run")) == [2, 4, 6]
    for step, folder in complete_checkpoints(tmp_path / "run").items():
        check_files(folder, read_checkpoint_manifest(folder))
        assert contents(folder) == contents(checkpoint_path(tmp_path / "other", step))
    # The parameters had changed twice when the first checkpoint was written.
    second, fourth = (tensors_of(tmp_path / "run", step) for step in (2, 4))
    assert not any(torch.equal(second[name], fourth[name]) for name in second if "eoi" not in name)


def test_one_save_runs_at_a_time_and_keep_holds(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, running, most = CheckpointWriter.write_data, [0], []

    def counted(*arguments: Any) -> Any:
        running[0] += 1
        most.append(running[0])
        try:
            return write(*arguments)
        finally:
            running[0] -= 1

    monkeypatch.setattr(CheckpointWriter, "write_data", counted)
    run(background(small, tmp_path / "run", save_every=1, keep=2))
    assert most == [1] * 6
    assert list(complete_checkpoints(tmp_path / "run")) == [5, 6]
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == ["step-00000005", "step-00000006"]


def test_an_error_in_the_background_ends_the_run_with_one_line(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "flush_folder", full)
    made: list[Metrics] = []
    with pytest.raises(OutputError, match=r"step-00000002: cannot be written: No space left on device$") as raised:
        adapt(background(small, tmp_path / "run"), begun=lambda _: None, report=made.append)
    assert raised.value.exit_code == 5
    # The error is found at the end of a later step, and by the next save at the latest.
    assert [step.step for step in made] in ([1, 2], [1, 2, 3], [1, 2, 3, 4])
    assert not complete_checkpoints(tmp_path / "run")


def test_memory_that_runs_out_in_the_background_is_named(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(CheckpointWriter, "write_data", full)
    with pytest.raises(MachineError, match="out of memory"):
        run(background(small, tmp_path / "run"))


def test_a_signal_waits_for_the_running_save_and_writes_its_own(
    small: Path, tmp_path: Path, held: threading.Event
) -> None:
    def stop() -> None:
        assert not complete_checkpoints(tmp_path / "run")
        os.kill(os.getpid(), signal.SIGTERM)
        threading.Timer(0.3, held.set).start()

    with pytest.raises(Interrupted) as raised:
        adapt(background(small, tmp_path / "run", steps=9), begun=lambda _: None, report=at(2, stop))
    # The signal of step 2 comes after its totals, so that step 3 is the last.
    assert raised.value.exit_code == 143
    assert list(complete_checkpoints(tmp_path / "run")) == [2, 3]
    assert list(regular_checkpoints(tmp_path / "run")) == [2]
    for folder in complete_checkpoints(tmp_path / "run").values():
        check_files(folder, read_checkpoint_manifest(folder))


def test_an_error_of_a_step_does_not_lose_the_running_save(
    small: Path, tmp_path: Path, held: threading.Event, monkeypatch: pytest.MonkeyPatch
) -> None:
    get, made = loop.get_total_norm, []

    def broken(gradients: list[torch.Tensor]) -> Any:
        if len(made) < 3:
            return get(gradients)
        assert not complete_checkpoints(tmp_path / "run")
        held.set()
        return get(gradients) * float("nan")

    monkeypatch.setattr(loop, "get_total_norm", broken)
    with pytest.raises(DataError, match="the gradient of step 4 is not finite"):
        adapt(background(small, tmp_path / "run"), begun=lambda _: None, report=made.append)
    assert list(complete_checkpoints(tmp_path / "run")) == [2]


@pytest.mark.parametrize(("share", "copies"), [(1.5, 2), (1.49, 0), (None, 0)])
def test_by_default_memory_decides_at_each_save(
    share: float | None, copies: int, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begin, sizes, made = checkpoints.save_in_background, [], []
    size = checkpoints.bytes_here

    def noted(*arguments: Any, **options: Any) -> Any:
        made.append(arguments[2])
        return begin(*arguments, **options)

    def sized(state: checkpoints.State) -> int:
        sizes.append(size(state))
        return sizes[-1]

    monkeypatch.setattr(checkpoints, "save_in_background", noted)
    monkeypatch.setattr(saver, "bytes_here", sized)
    monkeypatch.setattr(saver, "free_memory", lambda: None if share is None else int(share * sizes[-1]))
    run(background(small, tmp_path / "run", async_save=None))
    # The last checkpoint is never written in the background: nothing comes after it.
    assert made == [2, 4][:copies]
    assert list(complete_checkpoints(tmp_path / "run")) == [2, 4, 6]


def test_a_run_resumes_from_a_checkpoint_of_the_background(small: Path, tmp_path: Path) -> None:
    request = background(small, tmp_path / "run")
    with pytest.raises(Interrupted):
        adapt(request, begun=lambda _: None, report=at(4, lambda: os.kill(os.getpid(), signal.SIGTERM)))
    outcome, _ = run(changed(request, resume=True))
    run(background(small, tmp_path / "whole"))
    assert outcome.start == 5
    resumed, whole = (tensors_of(tmp_path / name, 6) for name in ("run", "whole"))
    assert all(torch.equal(resumed[name], whole[name]) for name in whole)
