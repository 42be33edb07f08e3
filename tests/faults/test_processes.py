"""Two and eight real processes started at once on one target: one writes at a time, and each reports its result."""

import fcntl
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import pytest

from t5g2convert import OutputError
from t5g2convert.conversion.output.staging import Staging
from tests.faults.scene import SHARD_BYTES, contents, leftovers
from tests.folders import OLD, write_old

HELD: Final = "another conversion is writing to it"
FILLED: Final = "exists and is not empty"

STARTED_TOGETHER: Final = """
import sys
from t5g2convert.cli.main import main
import t5g2convert.conversion.convert
import tests.processes.small_shards
print("ready", flush=True)
sys.stdin.readline()
main(sys.argv[1:])
"""
"""The interpreter's start takes longer than the conversion, and not equally long in each."""

DIES: Final = """
import os, signal, sys
from pathlib import Path
from t5g2convert.conversion.output.staging import Staging

with Staging(Path(sys.argv[1])) as staging:
    (staging.folder / "model.safetensors").write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def run_together(count: int, arguments: Sequence[str | Path]) -> list[tuple[int, str]]:
    """Return exit code and stderr of several processes that start at the same moment."""
    command = [sys.executable, "-c", STARTED_TOGETHER, "convert", "--no-verify", "--no-card", *map(str, arguments)]
    gate, start = os.pipe()
    running = [
        subprocess.Popen(command, stdin=gate, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    os.close(gate)
    for process in running:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    os.close(start)
    ended = [process.communicate(timeout=300)[1] for process in running]
    return [(process.returncode, stderr) for process, stderr in zip(running, ended, strict=True)]


def errors_of(ended: list[tuple[int, str]], code: int) -> list[str]:
    return [stderr for returned, stderr in ended if returned == code]


def check(ended: list[tuple[int, str]], target: Path, clean: dict[str, bytes], *, overwrite: bool) -> None:
    assert {code for code, _ in ended} <= {0, 5}, ended
    winners = len(errors_of(ended, 0))
    assert winners >= 1 if overwrite else winners == 1, ended
    for stderr in errors_of(ended, 5):
        assert len(stderr.splitlines()) == 1
        assert stderr.startswith(f"t5g2: {target}: ")
        assert HELD in stderr or (FILLED in stderr and not overwrite)
    assert contents(target) == clean
    assert leftovers(target) == set()


@pytest.mark.slow
@pytest.mark.parametrize("overwrite", [False, True], ids=["new", "overwrite"])
@pytest.mark.parametrize("count", [2, 8])
def test_O6_processes_started_at_once(
    source: Path, clean: dict[str, bytes], tmp_path: Path, count: int, overwrite: bool
) -> None:
    for attempt in range(8 // count + 1):
        target = tmp_path / f"{attempt}/new/out"
        if overwrite:
            write_old(target)
        options = ["--max-shard-size", str(SHARD_BYTES), *["--overwrite"] * overwrite]
        check(run_together(count, [source, target, *options]), target, clean, overwrite=overwrite)


@pytest.mark.slow
def test_O6_eight_runs_find_what_a_killed_run_left(source: Path, clean: dict[str, bytes], tmp_path: Path) -> None:
    target = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", DIES, str(target)], check=False, timeout=300)
    assert killed.returncode == -signal.SIGKILL
    assert leftovers(target) != set(), "something was left to be recovered"
    check(run_together(8, [source, target, "--max-shard-size", str(SHARD_BYTES)]), target, clean, overwrite=False)


@pytest.mark.slow
def test_O6_eight_find_an_old_target_that_was_moved_aside(
    source: Path, clean: dict[str, bytes], tmp_path: Path
) -> None:
    target = tmp_path / "out"
    write_old(tmp_path / ".out.t5g2-old")
    (tmp_path / ".out.t5g2-staging").mkdir()
    arguments = [source, target, "--max-shard-size", str(SHARD_BYTES)]
    ended = run_together(8, arguments)
    assert {code for code, _ in ended} == {5}
    assert [stderr for _, stderr in ended if HELD not in stderr and FILLED not in stderr] == []
    assert contents(target) == OLD
    check(run_together(8, [*arguments, "--overwrite"]), target, clean, overwrite=True)


def test_O6_a_refused_run_takes_nothing_from_the_writing_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second run locks the folder after the first creates it but before it locks it."""
    target = tmp_path / "out"
    second = Staging(target)
    flock = fcntl.flock

    def late(descriptor: int, operation: int) -> None:
        monkeypatch.undo()
        second.__enter__()
        flock(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(OutputError, match=HELD), Staging(target):
        raise AssertionError
    (second.folder / "half").write_text("written")
    second.commit()
    second.__exit__(None, None, None)
    assert contents(target) == {"half": b"written"}
    assert leftovers(target) == set()


@pytest.mark.parametrize("vanishes", ["the staging folder", "the folder made for the target"])
def test_O6_a_folder_that_another_run_removes_is_created_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, vanishes: str
) -> None:
    """Another run ends after this run finds a folder but before it uses it."""
    target = tmp_path / "new/out"
    other = Staging(target)
    other.__enter__()
    real, name = (os.open, "open") if vanishes == "the staging folder" else (os.mkdir, "mkdir")

    def late(path: Path, *arguments: Any, **options: Any) -> Any:
        if str(path).startswith(str(tmp_path)):
            monkeypatch.undo()
            other.__exit__(None, None, None)
        return real(path, *arguments, **options)

    if name == "mkdir":
        # It has removed its staging folder, but not yet the parent folder.
        other.folder.rmdir()
    monkeypatch.setattr(os, name, late)
    with Staging(target) as staging:
        (staging.folder / "whole").write_text("written")
        staging.commit()
    assert contents(target) == {"whole": b"written"}
    assert leftovers(target) == set()
