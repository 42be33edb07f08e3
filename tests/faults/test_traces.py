"""The system calls of a conversion without faults, and their order."""

import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from tests.faults.scene import Scene, contents
from tests.faults.strace import Call, start_and_trace
from tests.faults.test_system_calls import ALL

WRITES: Final = {"write", "pwrite64", "writev", "pwritev", "pwritev2", "fallocate", "ftruncate", "copy_file_range",
                 "sendfile"}  # fmt: skip

HARMLESS: Final = {"ioctl", "lseek", "access", "faccessat", "faccessat2", "readlink", "readlinkat", "fcntl",
                   "fadvise64", "mmap", "statx", "lstat", "stat", "listxattr", "getxattr"}  # fmt: skip
"""Calls that change nothing on the disk and are not swept."""


def test_O5_everything_is_flushed_before_the_rename_and_the_parent_after_it(
    scene: Scene, clean: dict[str, bytes]
) -> None:
    scene.lay("new")
    run = start_and_trace(scene.arguments("new"), scene.folder, "%file,%desc")
    assert run.code == 0
    calls = [call for call in run.calls if any(path.startswith(str(scene.target.parent)) for path in call.paths)]
    (swap,) = (number for number, call in enumerate(calls) if call.name.startswith("rename"))
    staged = Path(calls[swap].paths[-2])
    assert calls[swap].paths[-1] == str(scene.target)
    last = {name: max(_of(calls, WRITES, staged / name)) for name in clean}
    flushed = {name: max(_of(calls, {"fsync", "fdatasync"}, staged / name)) for name in clean}
    (folder,) = _of(calls, {"fsync"}, staged)
    (parent,) = _of(calls, {"fsync"}, scene.target.parent)
    for name in clean:
        assert last[name] < flushed[name] < folder, name
        assert _flushes(calls[flushed[name]]), name
    created = [number for number, call in enumerate(calls) if "O_CREAT" in call.text]
    assert max(created) < folder < swap < parent
    assert _flushes(calls[folder])
    assert _flushes(calls[parent])
    assert not [call.text for call in calls[folder:] if call.name in WRITES]
    assert contents(scene.target) == clean


def _of(calls: list[Call], names: set[str], path: Path) -> list[int]:
    return [number for number, call in enumerate(calls) if call.name in names and call.paths[:1] == [str(path)]]


def _flushes(call: Call) -> bool:
    return call.text.endswith("= 0")


@pytest.mark.parametrize(
    "mode", ["new", "overwrite", "fill", "failing", "after-kill", "resumed", "after-torn-swap", "after-torn-fill"]
)
def test_every_call_on_our_files_is_swept(scene: Scene, mode: str) -> None:
    swept = {name for names in ALL.values() for name in names.replace("?", "").split(",")}
    assert {call.name for call in scene.trace(mode).calls} - swept - HARMLESS == set()


def test_the_result_that_all_others_are_compared_with_is_verified(
    source: Path, clean: dict[str, bytes], tmp_path: Path
) -> None:
    for name, data in clean.items():
        (tmp_path / name).write_bytes(data)
    command = [sys.executable, "-m", "t5g2convert", "verify", str(tmp_path), "--source", str(source)]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_resumed_run_writes_only_the_shard_that_has_gone(scene: Scene) -> None:
    created = {Path(call.paths[-1]).name for call in scene.trace("resumed").calls if "O_CREAT" in call.text}
    assert {name for name in created if name.endswith(".safetensors")} == {"model-00002-of-00003.safetensors"}
