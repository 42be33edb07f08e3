"""SIGINT and SIGTERM at any moment of a real process: it cleans up and says so, or had finished."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from t5g2convert import convert
from tests.faults.scene import contents, leftovers, output_problem, write_source

LARGE: Final = {"vocab_size": 16384, "hidden_size": 512, "intermediate_size": 6144, "num_hidden_layers": 2}
"""60 MB, which take as long to write as the interpreter takes to start."""


@pytest.fixture(scope="session")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("large") / "source"
    write_source(folder, **LARGE)
    return folder


@pytest.fixture(scope="session")
def finished(large: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("finished") / "out"
    convert(large, folder)
    return contents(folder) or {}


def start(source: Path, target: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "t5g2convert", "convert", "--no-verify", "--no-card", str(source), str(target)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def writes(target: Path) -> bool:
    """Return whether a run has begun to write: anything exists at the target's place."""
    return target.parent.exists() and any(target.parent.iterdir())


def wait(until: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not until():
        assert time.monotonic() < deadline
        time.sleep(0.001)


def wrong_after(target: Path, number: int, code: int, stderr: str, finished: dict[str, bytes]) -> list[str]:
    found = contents(target)
    wrong = []
    if code in (-number, 1) and "t5g2: " not in stderr:
        # While the interpreter starts no handler is installed; it exits with 1 for a SIGINT in `site`.
        wrong += [f"died in the imports of the command line: {stderr[-200:]!r}"] * ("/t5g2convert/cli" in stderr)
    elif code not in (128 + number, 0):
        wrong.append(f"exit code {code}")
    elif ill := output_problem(stderr, code):
        wrong.append(ill)
    if found not in (None, finished) or (found is None and code == 0):
        wrong.append(f"the target holds {found and sorted(found)}")
    if left := leftovers(target):
        wrong.append(f"{left} left beside")
    return wrong


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("when", ["starting", "writing"])
def test_O3_a_signal_at_any_moment(
    large: Path, finished: dict[str, bytes], tmp_path: Path, number: signal.Signals, when: str,
    record_property: Callable[[str, object], None],
) -> None:  # fmt: skip
    """Send half of the signals during start-up and planning, half after the first write."""
    moments = random.Random(f"{number} {when}")
    wrong: list[str] = []
    stopped = 0
    times = 10 if when == "starting" else 15
    for attempt in range(times):
        target = tmp_path / f"{attempt}/out"
        with start(large, target) as process:
            if when == "writing":
                wait(lambda target=target: writes(target) or process.poll() is not None)
            moment = moments.uniform(0, 0.4 if when == "starting" else 0.2)
            time.sleep(moment)
            process.send_signal(number)
            _, stderr = process.communicate(timeout=300)
        stopped += process.returncode != 0
        problems = wrong_after(target, number, process.returncode, stderr, finished)
        wrong += [f"after {moment:.3f} s of {when}: {text}" for text in problems]
    lost = sum("the target" in text for text in wrong)
    record_property("faults", {signal.Signals(number).name: times, "lost": lost})
    assert not wrong, "\n".join(wrong)
    assert stopped > times // 3, "most came too late"


@pytest.mark.slow
@pytest.mark.parametrize("first", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_O3_a_second_signal_ends_it_at_once_and_the_next_run_cleans_up(
    large: Path, finished: dict[str, bytes], tmp_path: Path, first: signal.Signals
) -> None:
    moments = random.Random(int(first))
    for attempt in range(5):
        target = tmp_path / f"{attempt}/out"
        with start(large, target) as process:
            wait(lambda target=target: writes(target) or process.poll() is not None)
            time.sleep(moments.uniform(0, 0.05))
            process.send_signal(first)
            time.sleep(moments.uniform(0.0005, 0.005))
            process.send_signal(signal.SIGINT)
            _, stderr = process.communicate(timeout=300)
        # If both arrive before Python checks, it handles the lower number first.
        assert process.returncode in (0, -signal.SIGINT, 130, 128 + first), stderr
        assert "Traceback" not in stderr
        assert contents(target) in (None, finished)
        convert(large, target, overwrite=True)
        assert contents(target) == finished
        assert leftovers(target) == set()


@pytest.mark.sampled
@pytest.mark.parametrize("when", [0.0, 0.02, 0.05])
def test_O3_both_signals_at_one_moment(large: Path, finished: dict[str, bytes], tmp_path: Path, when: float) -> None:
    """Both are pending when the process continues, as when a supervisor's SIGTERM meets a ^C."""
    target = tmp_path / "new/out"
    with start(large, target) as process:
        wait(lambda: writes(target) or process.poll() is not None)
        time.sleep(when)
        for number in (signal.SIGSTOP, signal.SIGTERM, signal.SIGINT, signal.SIGCONT):
            process.send_signal(number)
        _, stderr = process.communicate(timeout=300)
    assert process.returncode in (0, 130, 143, -signal.SIGINT, -signal.SIGTERM)
    assert len(stderr.splitlines()) <= 1 or process.returncode == 0, stderr
    assert "Traceback" not in stderr
    convert(large, target, overwrite=True)
    assert contents(target) == finished
    assert leftovers(target) == set()
