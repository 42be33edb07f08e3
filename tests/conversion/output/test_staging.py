import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any, Final

import pytest

from t5g2convert import CheckpointError, OutputError, T5g2Error, convert, plan
from t5g2convert.conversion.output.path_rules import check_target
from t5g2convert.conversion.output.recovery import OLD_SUFFIX, REMOVED_SUFFIX, STAGING_SUFFIX
from t5g2convert.conversion.output.staging import JOURNAL_FILE, Staging
from t5g2convert.conversion.plan.builder import build_plan
from t5g2convert.conversion.write.resources import free_bytes
from t5g2convert.errors import Interrupted
from tests.folders import OLD, contents, write_old


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def staging_of(target: Path) -> Path:
    return target.with_name(f".{target.name}{STAGING_SUFFIX}")


def old_of(target: Path) -> Path:
    return target.with_name(f".{target.name}{OLD_SUFFIX}")


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.fixture
def source(demo_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the demo source in its own folder, so that `tmp_path` holds only outputs."""
    folder = tmp_path_factory.mktemp("source") / "gemma"
    demo_source.rename(folder)
    return folder


@pytest.fixture
def finished(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files that a conversion of the source gives."""
    folder = tmp_path_factory.mktemp("finished") / "out"
    convert(source, folder)
    return contents(folder)


class Calls:
    """Count system calls on files below a folder, and run an action at the N-th."""

    WORK: Final = ("mkdir", "open", "ftruncate", "posix_fallocate", "pwrite", "fsync", "rename")
    CLEANING: Final = ("rmdir", "unlink")

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, *, cleaning: bool) -> None:
        self.folder, self.cleaning = str(folder), cleaning
        self.seen: list[str] = []
        self.at: int | None = None
        self.before: Callable[[], None] = lambda: None
        self.after: Callable[[], None] = lambda: None
        for name in self.WORK + self.CLEANING:
            monkeypatch.setattr(os, name, self._wrapped(name, getattr(os, name)))

    def arm(self, at: int) -> None:
        self.at, self.seen = at, []

    def _wrapped(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            if self.at is None or not self._counts(name, arguments):
                return real(*arguments, **options)
            hit = len(self.seen) == self.at
            self.seen.append(name)
            if hit:
                self.before()
            result = real(*arguments, **options)
            if hit:
                self.after()
            return result

        return call

    def _counts(self, name: str, arguments: tuple[Any, ...]) -> bool:
        if name == "pwrite" and self.seen.count("pwrite") >= 4:
            return False  # the other 250 are no different
        if not self.cleaning and (name in self.CLEANING or str(arguments[0]).endswith((OLD_SUFFIX, REMOVED_SUFFIX))):
            return False
        return isinstance(arguments[0], int) or str(arguments[0]).startswith(self.folder)


def sweep(calls: Calls, source: Path, folder: Path, finished: dict[str, bytes], *, way: str, ends: str) -> str:
    """Convert with a failure at each call in turn, until a run has fewer calls; return the problems.

    A failed run must raise the named exception, with the target unchanged or complete, and nothing next to it.
    """
    faults: list[str] = []
    number, reached = 0, True
    while reached:
        parent = folder / str(number)
        target = parent / "new/out"
        if way == "overwrite":
            write_old(target)
        elif way == "fill":
            target.mkdir(parents=True)
        ended = "well"
        calls.arm(number)
        try:
            convert(source, target, overwrite=way == "overwrite")
        except Exception as error:  # noqa: BLE001 - named in the answer
            ended = type(error).__name__
        calls.at = None
        reached = len(calls.seen) > number
        found = contents(target) if target.exists() else None
        # A signal that comes when everything is in place may find nothing left to stop.
        too_late = ends == "Interrupted" and ended == "well" and found == finished
        wrong = [f"ended {ended}, expected {ends}"] * (ended != (ends if reached else "well") and not too_late)
        if found not in ({"new": None, "fill": {}, "overwrite": OLD}[way], finished):
            wrong.append(f"the target holds {found and sorted(found)}")
        if hidden := names(target.parent) - {"out"} if target.parent.exists() else set():
            wrong.append(f"{sorted(hidden)} left behind")
        elif found is None and parent.exists():
            wrong.append("empty folders left behind")
        faults += [f"after call {number} ({' '.join(calls.seen[: number + 1][-3:])}): {fault}" for fault in wrong]
        number += 1
    assert number > 15
    return "\n".join(faults)


# Targets that are refused before any work


def test_O1_a_target_that_is_absent_or_empty_is_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for target in ("empty", "absent", "deep/below"):
        for overwrite in (False, True):
            check_target(tmp_path / target, tmp_path / "source", overwrite=overwrite)
    assert names(tmp_path) == {"empty"}


def test_O1_a_target_with_something_in_it_needs_overwrite(tmp_path: Path) -> None:
    write_old(tmp_path / "out")
    with pytest.raises(OutputError, match="not empty"):
        check_target(tmp_path / "out", tmp_path / "source", overwrite=False)
    check_target(tmp_path / "out", tmp_path / "source", overwrite=True)
    assert contents(tmp_path / "out") == OLD


@pytest.mark.parametrize(
    ("target", "relation"),
    [
        ("models/source", "is"),
        ("models/source/out", "lies inside"),
        ("models", "contains"),
        (".", "contains"),
        ("link", "is"),
        ("link/out", "lies inside"),
        ("models/source/../source", "is"),
        ("uplink", "contains"),
    ],
)
def test_O1_target_and_source_must_not_touch(tmp_path: Path, target: str, relation: str) -> None:
    (tmp_path / "models/source").mkdir(parents=True)
    (tmp_path / "link").symlink_to("models/source")
    (tmp_path / "uplink").symlink_to("models")
    for source in ("models/source", "link"):
        with pytest.raises(OutputError, match=f"{relation} the source folder"):
            check_target(tmp_path / target, tmp_path / source, overwrite=True)


def test_O1_a_name_that_only_starts_alike_does_not_touch(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    check_target(tmp_path / "source-out", tmp_path / "source", overwrite=False)


def test_O1_a_link_to_an_empty_folder_stays_a_link(source: Path, tmp_path: Path, finished: dict[str, bytes]) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk/real").mkdir()
    (tmp_path / "out").symlink_to("disk/real")
    convert(source, tmp_path / "out")
    assert (tmp_path / "out").readlink() == Path("disk/real")
    assert contents(tmp_path / "disk/real") == finished
    assert names(tmp_path) == {"disk", "out"}
    assert names(tmp_path / "disk") == {"real"}


def test_O9_overwrite_never_goes_through_a_link_but_in_the_path_to_it(
    source: Path, tmp_path: Path, finished: dict[str, bytes]
) -> None:
    write_old(tmp_path / "real")
    (tmp_path / "out").symlink_to("real")
    with pytest.raises(OutputError, match="not empty"):
        convert(source, tmp_path / "out")
    with pytest.raises(OutputError, match="is a link, and --overwrite does not follow links"):
        convert(source, tmp_path / "out", overwrite=True)
    assert contents(tmp_path / "real") == OLD
    (tmp_path / "parent").symlink_to(".")
    convert(source, tmp_path / "parent/real", overwrite=True)
    assert contents(tmp_path / "real") == finished
    assert names(tmp_path) == {"real", "out", "parent"}


def test_O1_overwrite_keeps_the_old_folder_until_the_new_one_is_whole(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: dict[str, bytes]
) -> None:
    target = tmp_path / "out"
    write_old(target)
    seen: list[bool] = []
    fsync = os.fsync

    def watch(fd: int) -> None:
        if staging_of(target).exists():
            seen.append(contents(target) == OLD)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watch)
    convert(source, target, overwrite=True)
    assert len(seen) >= len(finished)
    assert all(seen)
    assert contents(target) == finished
    assert names(tmp_path) == {"out"}


# Disks


def test_O2_a_disk_that_is_too_small_is_known_before_the_start(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=12_345))
    with pytest.raises(OutputError) as error:
        convert(source, tmp_path / "new/out")
    have, need = (int(number.replace(",", "")) for number in re.findall(r"\d[\d,]*", error.value.message))
    assert have == 12_345
    assert need >= plan(source).nbytes
    assert error.value.where == str(tmp_path / "new/out")
    assert list(tmp_path.iterdir()) == []


def test_O2_a_disk_that_is_just_large_enough_is_used(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[Path] = []

    def usage(path: Path) -> SimpleNamespace:
        requested.append(path)
        return SimpleNamespace(free=plan(source).nbytes + (64 << 20))

    monkeypatch.setattr(shutil, "disk_usage", usage)
    convert(source, tmp_path / "new/out")
    assert requested == [tmp_path / "new"], "the disk that the output will be on"


def test_O2_free_space_is_that_of_the_nearest_folder_that_exists(tmp_path: Path) -> None:
    assert free_bytes(tmp_path / "a/b/c") > 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO, errno.EFBIG], ids=errno.errorcode.get)
@pytest.mark.parametrize("number", [0, 1, 40, 250])
def test_O2_a_write_that_fails_leaves_nothing(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    pwrite, written = os.pwrite, 0

    def fail(fd: int, data: memoryview, offset: int) -> int:
        nonlocal written
        written += 1
        if written > number:
            raise OSError(code, os.strerror(code))
        return pwrite(fd, data, offset)

    monkeypatch.setattr(os, "pwrite", fail)
    for hashing in (True, False):
        written = 0
        with pytest.raises(OutputError, match=os.strerror(code)) as error:
            convert(source, tmp_path / "new/folder/out", hashing=hashing)
        assert "model.safetensors" in str(error.value.where)
        assert list(tmp_path.iterdir()) == []


def test_O2_a_short_write_is_continued(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: dict[str, bytes]
) -> None:
    pwrite = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, offset: pwrite(fd, data[:1000], offset))
    convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == finished


@pytest.mark.sampled
@pytest.mark.parametrize("way", ["new", "fill", "overwrite"])
def test_O2_any_failed_call_leaves_a_complete_target_and_nothing_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, finished: dict[str, bytes]
) -> None:
    def fail() -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    calls = Calls(monkeypatch, tmp_path, cleaning=False)
    calls.before = fail
    assert sweep(calls, source, tmp_path, finished, way=way, ends="OutputError") == ""


def test_O2_a_file_among_the_parents_is_reported(source: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("keep")
    with pytest.raises(OutputError, match="Not a directory"):
        convert(source, tmp_path / "file/new/out")
    assert (tmp_path / "file").read_text() == "keep"


def test_O2_a_failed_read_for_hashing_is_reported(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr("t5g2convert.conversion.write.hashing.os", SimpleNamespace(preadv=fail))
    with pytest.raises(T5g2Error, match="Input/output error"):
        convert(source, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_failure_in_the_middle_keeps_the_old_folder(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    write_old(target)
    inode = target.stat().st_ino

    def fail(*arguments: object, **options: object) -> None:
        assert (staging_of(target) / "model.safetensors").exists()
        raise CheckpointError("broken")

    monkeypatch.setattr("t5g2convert.conversion.convert.write_assets", fail)
    with pytest.raises(CheckpointError, match="broken"):
        convert(source, target, overwrite=True)
    assert contents(target) == OLD
    assert target.stat().st_ino == inode
    assert names(tmp_path) == {"out"}


def test_parents_that_were_there_stay_when_a_conversion_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "there").mkdir()

    def fail(*arguments: object, **options: object) -> None:
        raise CheckpointError("broken")

    monkeypatch.setattr("t5g2convert.conversion.convert.write_assets", fail)
    with pytest.raises(CheckpointError, match="broken"):
        convert(source, tmp_path / "there/made/out")
    assert names(tmp_path) == {"there"}
    assert list((tmp_path / "there").iterdir()) == []


def test_a_parent_that_another_uses_by_now_stays(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object, **options: object) -> None:
        (tmp_path / "made/by-another").touch()
        raise CheckpointError("broken")

    monkeypatch.setattr("t5g2convert.conversion.convert.write_assets", fail)
    with pytest.raises(CheckpointError, match="broken"):
        convert(source, tmp_path / "made/deeper/out")
    assert names(tmp_path / "made") == {"by-another"}


# Signals and crashes


@pytest.mark.sampled
@pytest.mark.parametrize("way", ["new", "fill", "overwrite"])
def test_O3_a_signal_after_any_call_leaves_a_complete_target_and_nothing_else(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str, finished: dict[str, bytes]
) -> None:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    calls = Calls(monkeypatch, tmp_path, cleaning=True)
    calls.after = lambda: signal.raise_signal(signal.SIGTERM)
    before = signal.signal(signal.SIGTERM, stop)
    try:
        faults = sweep(calls, source, tmp_path, finished, way=way, ends="Interrupted")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert faults == ""


def test_O4_the_staging_folder_of_a_dead_run_is_cleared(
    source: Path, tmp_path: Path, finished: dict[str, bytes]
) -> None:
    outside = tmp_path / "outside"
    write_old(outside)
    stale = staging_of(tmp_path / "out")
    write_old(stale)
    (stale / "model.safetensors").write_bytes(b"half")
    (stale / "link").symlink_to(outside)
    (stale / "below/dangling").symlink_to("nowhere")
    convert(source, tmp_path / "out")
    assert contents(tmp_path / "out") == finished
    assert not (tmp_path / "out/link").is_symlink()
    assert contents(outside) == OLD
    assert names(tmp_path) == {"out", "outside"}


def test_O4_a_staging_path_that_is_not_ours_is_not_touched(source: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    write_old(outside)
    for make in (lambda path: path.symlink_to(outside), lambda path: path.write_text("a file")):
        stale = staging_of(tmp_path / "out")
        make(stale)
        with pytest.raises(OutputError):
            convert(source, tmp_path / "out")
        assert contents(outside) == OLD
        assert not (tmp_path / "out").exists()
        stale.unlink()


def test_O4_an_old_folder_without_a_replacement_is_restored(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    write_old(old_of(target))
    staging_of(target).mkdir()
    with Staging(target, overwrite=True):
        assert contents(target) == OLD
        assert not old_of(target).exists()
    assert contents(target) == OLD
    assert names(tmp_path) == {"out"}


def test_O4_an_old_folder_is_put_back_even_if_the_next_run_fails(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, finished: dict[str, bytes]
) -> None:
    target = tmp_path / "out"
    write_old(old_of(target))
    staging_of(target).mkdir()

    def fail(*arguments: object, **options: object) -> None:
        raise CheckpointError("broken")

    with monkeypatch.context() as patch:
        patch.setattr("t5g2convert.conversion.convert.write_assets", fail)
        with pytest.raises(CheckpointError, match="broken"):
            convert(source, target, overwrite=True)
    assert contents(target) == OLD
    with pytest.raises(OutputError, match="not empty"):
        convert(source, target)
    convert(source, target, overwrite=True)
    assert contents(target) == finished
    assert names(tmp_path) == {"out"}


def test_O4_a_leftover_old_folder_is_removed_by_the_next_overwrite(
    source: Path, tmp_path: Path, finished: dict[str, bytes]
) -> None:
    target = tmp_path / "out"
    write_old(old_of(target))
    write_old(target)
    convert(source, target, overwrite=True)
    assert contents(target) == finished
    assert names(tmp_path) == {"out"}


def test_O5_data_is_flushed_before_the_rename_and_the_parent_after_it(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    trace: list[str] = []
    fsync, rename = os.fsync, os.rename

    def traced_fsync(fd: int) -> None:
        trace.append(f"flush {Path(f'/proc/self/fd/{fd}').readlink()}")
        fsync(fd)

    def traced_rename(one: Path, other: Path) -> None:
        trace.append(f"rename {one} {other}")
        rename(one, other)

    monkeypatch.setattr(os, "fsync", traced_fsync)
    monkeypatch.setattr(os, "rename", traced_rename)
    convert(source, target, max_shard_bytes=100_000)
    staged = staging_of(target)
    files = [f"flush {staged}/{name}" for name in names(target)]
    assert len(files) > 12
    trace = [step for step in trace if not step.endswith(JOURNAL_FILE)]
    assert sorted(trace[: len(files)]) == sorted(files)
    assert trace[len(files) :] == [f"flush {staged}", f"rename {staged} {target}", f"flush {tmp_path}"]


SIGNALLED: Final = """
import os, signal, sys
from t5g2convert.cli.main import main

real, seen = os.rename, 0

def rename(one, other):
    global seen
    real(one, other)
    seen += 1
    if seen == int(sys.argv[1]):
        # To the process, so that any of its threads may take it; given time to arrive.
        os.kill(os.getpid(), int(sys.argv[2]))
        for _ in range(200):
            os.stat(other)

os.rename = rename
main(sys.argv[3:])
"""


@pytest.mark.sampled
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("after", [1, 2])
def test_O3_a_signal_to_any_thread_in_the_middle_of_the_swap_waits(
    source: Path, tmp_path: Path, after: int, number: signal.Signals, finished: dict[str, bytes]
) -> None:
    """numpy has threads of its own, which a signal mask of the main thread does not cover."""
    target = tmp_path / "out"
    write_old(target)
    command = [
        sys.executable,
        "-c",
        SIGNALLED,
        str(after),
        str(int(number)),
        "convert",
        "--no-verify",
        "--no-card",
        source,
        target,
        "--overwrite",
    ]
    run = subprocess.run(list(map(str, command)), check=False, capture_output=True, text=True, timeout=300)
    assert run.returncode == 128 + number
    assert run.stderr == f"t5g2: stopped by signal {int(number)}\n"
    assert contents(target) == finished
    assert names(tmp_path) == {"out"}


# Two at once


def test_O6_a_second_conversion_is_refused_while_the_first_holds_the_target(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    with Staging(target) as first:
        (first.folder / "half").write_text("written")
        with pytest.raises(OutputError, match="another conversion"):
            convert(source, target)
        assert (first.folder / "half").read_text() == "written"
        assert not target.exists()
        first.commit()
    assert contents(target) == {"half": b"written"}
    assert names(tmp_path) == {"out"}


def test_O6_the_refused_one_leaves_the_parents_of_the_first(tmp_path: Path) -> None:
    target = tmp_path / "new/out"
    with Staging(target) as first:
        with pytest.raises(OutputError, match="another conversion"), Staging(target):
            raise AssertionError
        first.commit()
    assert target.is_dir()


HOLDER: Final = """
import sys
from pathlib import Path
from t5g2convert.conversion.output.staging import Staging

with Staging(Path(sys.argv[1])) as staging:
    (staging.folder / "half").write_text("written")
    print("held", flush=True)
    sys.stdin.readline()
"""


def test_O6_another_process_holds_the_target_until_it_is_killed(
    source: Path, tmp_path: Path, finished: dict[str, bytes]
) -> None:
    target = tmp_path / "out"
    command = [sys.executable, "-c", HOLDER, str(target)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(OutputError, match="another conversion"):
            convert(source, target)
        assert (staging_of(target) / "half").exists()
        holder.kill()
        holder.communicate(timeout=300)
    assert (staging_of(target) / "half").exists(), "the killed one cleaned nothing"
    convert(source, target)
    assert contents(target) == finished
    assert names(tmp_path) == {"out"}


def test_O6_two_targets_side_by_side_do_not_meet(tmp_path: Path) -> None:
    with Staging(tmp_path / "one") as one, Staging(tmp_path / "two") as two:
        one.commit()
        two.commit()
    assert names(tmp_path) == {"one", "two"}


def test_O6_the_same_target_by_a_link_is_the_same_target(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    with (
        Staging(tmp_path / "real/out"),
        pytest.raises(OutputError, match="another conversion"),
        Staging(tmp_path / "link/out"),
    ):
        raise AssertionError


def test_O6_a_target_that_was_filled_while_planning_is_not_replaced(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"

    def slow(*arguments: Any, **options: Any) -> Any:
        write_old(target)
        return build_plan(*arguments, **options)

    monkeypatch.setattr("t5g2convert.conversion.convert.build_plan", slow)
    with pytest.raises(OutputError, match="not empty"):
        convert(source, target)
    assert contents(target) == OLD
    assert names(tmp_path) == {"out"}


# The finished output


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002], ids=oct)
def test_O7_permissions_are_those_of_the_umask(source: Path, tmp_path: Path, mask: int) -> None:
    with umask(mask):
        convert(source, tmp_path / "new/out", max_shard_bytes=100_000)
    for folder in (tmp_path / "new", tmp_path / "new/out"):
        assert folder.stat().st_mode & 0o7777 == 0o777 & ~mask
    files = list((tmp_path / "new/out").iterdir())
    assert len(files) > 12
    assert {path.stat().st_mode & 0o7777 for path in files} == {0o666 & ~mask}


def test_O7_permissions_of_a_private_source_file_do_not_travel(source: Path, tmp_path: Path) -> None:
    for path in source.iterdir():
        path.chmod(0o600)
    with umask(0o022):
        convert(source, tmp_path / "out")
    assert {path.stat().st_mode & 0o7777 for path in (tmp_path / "out").iterdir()} == {0o644}


def test_O7_the_staging_folder_of_a_dead_private_run_does_not_decide(source: Path, tmp_path: Path) -> None:
    staging_of(tmp_path / "out").mkdir(mode=0o700)
    with umask(0o022):
        convert(source, tmp_path / "out")
    assert (tmp_path / "out").stat().st_mode & 0o7777 == 0o755


def test_O7_no_output_file_is_a_link_to_the_source(source: Path, tmp_path: Path) -> None:
    before = contents(source)
    convert(source, tmp_path / "out")
    for path in (tmp_path / "out").iterdir():
        assert path.is_file()
        assert not path.is_symlink()
        assert path.stat().st_nlink == 1
    (tmp_path / "out/tokenizer.json").write_text("changed")
    assert contents(source) == before


@pytest.mark.parametrize(
    "options",
    [{}, {"max_shard_bytes": 100_000}, {"hashing": False}, {"dtype": "float32"}],
    ids=["one-file", "shards", "no-hash", "cast"],
)
def test_O8_the_same_input_gives_the_same_bytes(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    copy = tmp_path / "a copy under another name"
    shutil.copytree(source, copy)
    for path in copy.iterdir():
        os.utime(path, (1, 1))
    convert(source, tmp_path / "one", **options)
    convert(source, tmp_path / "two", **options)
    convert(copy, tmp_path / "deep/three", **options)
    one = contents(tmp_path / "one")
    assert {"config.json", "t5g2.json", "tokenizer.json"} < set(one)
    assert contents(tmp_path / "two") == one
    assert contents(tmp_path / "deep/three") == one
    assert str(tmp_path).encode() not in b"".join(one.values())
    assert source.name not in json.loads(one["t5g2.json"])["source"]


def test_O8_the_bytes_depend_on_no_hash_seed(source: Path, tmp_path: Path, finished: dict[str, bytes]) -> None:
    for seed in ("1", "2"):
        command = [
            sys.executable,
            "-m",
            "t5g2convert",
            "convert",
            "--no-verify",
            "--no-card",
            str(source),
            str(tmp_path / seed),
        ]
        subprocess.run(command, check=True, capture_output=True, env={**os.environ, "PYTHONHASHSEED": seed})
        assert contents(tmp_path / seed) == finished


def test_O8_another_input_gives_other_bytes(source: Path, tmp_path: Path, finished: dict[str, bytes]) -> None:
    with (source / "model.safetensors").open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        last = file.read(1)
        file.seek(-1, os.SEEK_END)
        file.write(bytes([last[0] ^ 1]))
    convert(source, tmp_path / "out")
    changed = contents(tmp_path / "out")
    assert {name for name in finished if changed[name] != finished[name]} == {"model.safetensors", "t5g2.json"}
