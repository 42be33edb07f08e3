"""An interrupted conversion is resumed: finished shards are kept, everything else is rewritten."""

import errno
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest

from t5g2convert import CheckpointError, OutputError, T5g2Error, UsageError, VerificationError, convert, plan
from t5g2convert.checkpoint.file_store import sha256_of
from t5g2convert.conversion.output.recovery import JOURNAL_FILE, STAGING_SUFFIX
from t5g2convert.errors import Interrupted
from tests.folders import contents

SHARD: Final = 60_000
"""Bytes of a shard that give the demo about twenty."""


def names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def staging_of(target: Path) -> Path:
    return target.with_name(f".{target.name}{STAGING_SUFFIX}")


def finished_in(staging: Path) -> set[str]:
    lines = (staging / JOURNAL_FILE).read_text().splitlines()
    return {json.loads(line)["shard"] for line in lines if line}


@pytest.fixture
def source(demo_source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source") / "gemma"
    demo_source.rename(folder)
    return folder


@pytest.fixture
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """Return the files of an uninterrupted conversion."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    convert(source, folder, max_shard_bytes=SHARD)
    return contents(folder)


def stopping(after: int, error: BaseException) -> Callable[[int], None]:
    """Return a progress callback that raises after `after` bytes."""
    seen = 0

    def progress(count: int) -> None:
        nonlocal seen
        seen += count
        if seen >= after:
            raise error

    return progress


def stop(source: Path, target: Path, error: BaseException | None = None, **options: Any) -> None:
    """Convert with --resume and stop at two thirds."""
    error = error or Interrupted(signal.SIGTERM)
    after = plan(source, max_shard_bytes=SHARD).nbytes * 2 // 3
    with pytest.raises(type(error)):
        convert(source, target, max_shard_bytes=SHARD, resume=True, progress=stopping(after, error), **options)


@pytest.mark.parametrize("error", [Interrupted(signal.SIGINT), OutputError("the disk is full")], ids=["signal", "disk"])
def test_finished_shards_are_kept_and_the_rest_is_written(
    source: Path, tmp_path: Path, whole: dict[str, bytes], error: T5g2Error, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    stop(source, target, error)
    assert error.hint == "finished shards are kept; continue with --resume"
    staging = staging_of(target)
    finished = finished_in(staging)
    assert 4 < len(finished) < len([name for name in whole if name.endswith(".safetensors")])
    assert {name: (staging / name).read_bytes() for name in finished} == {name: whole[name] for name in finished}
    inodes = {(staging / name).stat().st_ino for name in finished}

    written = 0
    real = os.pwrite

    def count(fd: int, data: memoryview, offset: int) -> int:
        nonlocal written
        done = real(fd, data, offset)
        written += done
        return done

    monkeypatch.setattr(os, "pwrite", count)
    progressed: list[int] = []
    done = convert(source, target, max_shard_bytes=SHARD, resume=True, progress=progressed.append)
    assert contents(target) == whole
    assert set(done.kept) == finished
    assert f"kept {len(finished)} of {len(done.shards)} shards, which an earlier run finished" in done.notes
    assert inodes <= {path.stat().st_ino for path in target.iterdir()}
    assert written == done.nbytes - sum(len(whole[name]) for name in finished)
    assert sum(progressed) == sum(tensor.nbytes for tensor in plan(source, max_shard_bytes=SHARD).tensors)
    assert names(tmp_path) == ["out"]


def test_a_run_may_be_stopped_again_and_again(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    target, kept, runs = tmp_path / "out", 0, 0
    while not target.exists():
        runs += 1
        # Each run gets a little further than the last.
        there = sum(len(whole[name]) for name in finished_in(staging_of(target))) if runs > 1 else 0
        try:
            done = convert(
                source,
                target,
                max_shard_bytes=SHARD,
                resume=True,
                progress=stopping(there + (3 + runs) * SHARD, Interrupted(signal.SIGTERM)),
            )
        except Interrupted:
            now = len(finished_in(staging_of(target)))
            assert now >= kept
            kept = now
    assert runs > 2
    assert len(done.kept) == kept
    assert contents(target) == whole


def test_without_the_flag_nothing_is_kept(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    target = tmp_path / "out"
    with pytest.raises(Interrupted):
        convert(source, target, max_shard_bytes=SHARD, progress=stopping(600_000, Interrupted(signal.SIGTERM)))
    assert names(tmp_path) == []
    stop(source, target)
    done = convert(source, target, max_shard_bytes=SHARD)
    assert done.kept == ()
    assert contents(target) == whole


@pytest.mark.parametrize(
    "error",
    [CheckpointError("bad"), VerificationError("wrong"), ValueError("a bug")],
    ids=lambda error: type(error).__name__,
)
def test_shards_of_a_run_that_was_wrong_are_not_kept(source: Path, tmp_path: Path, error: Exception) -> None:
    stop(source, tmp_path / "out", error)
    assert names(tmp_path) == []


def test_a_run_that_is_stopped_before_a_shard_is_finished_leaves_nothing(source: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        convert(source, tmp_path / "out", resume=True, progress=stopping(600_000, Interrupted(signal.SIGTERM)))
    assert names(tmp_path) == []


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def second_name(path: Path) -> None:
    os.link(path, path.parent.parent / "second name")


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize(
    "damage", [flip, cut, link, second_name, folder, Path.unlink], ids=lambda damage: damage.__name__
)
def test_a_changed_shard_is_rewritten(
    source: Path, tmp_path: Path, whole: dict[str, bytes], damage: Callable[[Path], None]
) -> None:
    target = tmp_path / "out"
    stop(source, target)
    finished = finished_in(staging_of(target))
    damaged = min(finished)
    damage(staging_of(target) / damaged)
    done = convert(source, target, max_shard_bytes=SHARD, resume=True)
    assert set(done.kept) == finished - {damaged}
    assert contents(target) == whole
    assert all(path.is_file() and not path.is_symlink() for path in target.iterdir())


@pytest.mark.sampled
@pytest.mark.parametrize(
    "text",
    [b"", b"\n\n", b"{", b"[1]\n", b"\xff\xfe\n", b'{"plan": 1}\n', b'{"plan": "x", "shard": ["a"], "sha256": 3}\n'],
)
def test_an_unreadable_journal_is_ignored(source: Path, tmp_path: Path, whole: dict[str, bytes], text: bytes) -> None:
    target = tmp_path / "out"
    stop(source, target)
    (staging_of(target) / JOURNAL_FILE).write_bytes(text)
    done = convert(source, target, max_shard_bytes=SHARD, resume=True)
    assert done.kept == ()
    assert contents(target) == whole


def finished_in_spite_of_torn(staging: Path) -> list[str]:
    return [line for line in (staging / JOURNAL_FILE).read_text().splitlines() if line.endswith("}")]


def stop_in_verification(source: Path, target: Path, **options: Any) -> None:
    def interrupted(folder: Path) -> None:
        raise Interrupted(signal.SIGTERM)

    convert(source, target, max_shard_bytes=SHARD, resume=True, judge=interrupted, **options)


def test_a_torn_line_loses_one_shard(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    target = tmp_path / "out"
    stop(source, target)
    finished = finished_in(staging_of(target))
    journal = staging_of(target) / JOURNAL_FILE
    journal.write_bytes(journal.read_bytes()[:-20])
    # Stopped once more: entries after the torn line count.
    with pytest.raises(Interrupted):
        stop_in_verification(source, target)
    assert len(finished_in_spite_of_torn(staging_of(target))) > len(finished)
    done = convert(source, target, max_shard_bytes=SHARD, resume=True)
    assert len(done.kept) == len(done.shards)
    assert contents(target) == whole


@pytest.mark.parametrize(
    "options",
    [{"dtype": "float32"}, {"max_shard_bytes": 90_000}, {"allow_nonfinite": True}],
    ids=lambda options: next(iter(options)),
)
def test_another_conversion_keeps_nothing(source: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    target = tmp_path / "out"
    stop(source, target)
    options = {"max_shard_bytes": SHARD, **options}
    done = convert(source, target, resume=True, **options)
    convert(source, tmp_path / "expected", **options)
    assert done.kept == ()
    assert contents(target) == contents(tmp_path / "expected")


def test_another_source_keeps_nothing(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    target = tmp_path / "out"
    stop(source, target)
    weights = source / "model.safetensors"
    flip(weights)
    done = convert(source, target, max_shard_bytes=SHARD, resume=True)
    assert done.kept == ()
    convert(source, tmp_path / "expected", max_shard_bytes=SHARD)
    assert contents(target) == contents(tmp_path / "expected") != whole


def test_other_files_in_the_staging_folder_are_removed(source: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    target = tmp_path / "out"
    stop(source, target)
    staging = staging_of(target)
    (staging / "strange.json").write_text("{}")
    (staging / "deep/er").mkdir(parents=True)
    (staging / "config.json").write_text("half")
    convert(source, target, max_shard_bytes=SHARD, resume=True)
    assert contents(target) == whole


def test_kept_shards_get_the_usual_permissions(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    before = os.umask(0o077)
    try:
        stop(source, target)
        os.umask(0o022)
        convert(source, target, max_shard_bytes=SHARD, resume=True)
    finally:
        os.umask(before)
    assert {path.stat().st_mode & 0o7777 for path in target.iterdir()} == {0o644}
    assert target.stat().st_mode & 0o7777 == 0o755


def test_resuming_without_sha256_is_refused(source: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--resume needs sha256"):
        convert(source, tmp_path / "out", resume=True, hashing=False)
    assert names(tmp_path) == []


def test_kept_shards_do_not_count_as_needed_space(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    stop(source, target)
    requested: list[int] = []
    monkeypatch.setattr("t5g2convert.conversion.convert.check_space", lambda where, need: requested.append(need))
    done = convert(source, target, max_shard_bytes=SHARD, resume=True)
    kept = sum((target / name).stat().st_size for name in done.kept)
    assert requested == [done.nbytes - kept + (64 << 20)]


def test_a_judge_that_was_killed_leaves_shards_that_are_all_kept(
    source: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    target = tmp_path / "out"
    with pytest.raises(Interrupted):
        stop_in_verification(source, target)
    done = convert(source, target, max_shard_bytes=SHARD, resume=True)
    assert len(done.kept) == len(done.shards)
    assert contents(target) == whole


def test_only_finished_shards_take_room_when_a_run_was_stopped(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    stop(source, target)
    assert set(names(staging_of(target))) == {JOURNAL_FILE, *finished_in(staging_of(target))}


def test_another_conversion_says_that_nothing_was_kept(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    stop(source, target)
    done = convert(source, target, max_shard_bytes=90_000, resume=True)
    assert any(note.startswith("no shards of an earlier run match this conversion") for note in done.notes)


def test_O5_kept_shards_are_flushed_if_the_run_that_wrote_them_did_not_wait(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    with pytest.raises(Interrupted):
        stop_in_verification(source, target, flush=False)
    flushed: list[str] = []
    fsync = os.fsync

    def watch(fd: int) -> None:
        flushed.append(Path(f"/proc/self/fd/{fd}").readlink().name)
        fsync(fd)

    monkeypatch.setattr(os, "fsync", watch)
    done = convert(source, target, max_shard_bytes=SHARD, resume=True)
    assert set(done.kept) == set(done.shards) <= set(flushed)


def test_O2_a_shard_with_a_failed_flush_is_never_kept(
    source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk reports a failure once; the next flush succeeds."""
    target = tmp_path / "out"
    failed: list[str] = []
    fsync = os.fsync

    def fail_once(fd: int) -> None:
        name = Path(f"/proc/self/fd/{fd}").readlink().name
        if name.startswith("model-00003") and not failed:
            failed.append(name)
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        fsync(fd)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fail_once)
        with pytest.raises(OutputError, match=r"model-00003.*Input/output error"):
            convert(source, target, max_shard_bytes=SHARD, resume=True)
    assert set(failed).isdisjoint(finished_in(staging_of(target)))
    done = convert(source, target, max_shard_bytes=SHARD, resume=True)
    assert done.kept
    assert set(failed).isdisjoint(done.kept)
    assert contents(target) == whole


def test_an_unreadable_kept_shard_is_rewritten(
    source: Path, tmp_path: Path, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out"
    stop(source, target)
    bad = min(finished_in(staging_of(target)))

    def fail(path: Path) -> str:
        if path.name == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return sha256_of(path)

    monkeypatch.setattr("t5g2convert.conversion.write.resume.sha256_of", fail)
    done = convert(source, target, max_shard_bytes=SHARD, resume=True)
    assert bad not in done.kept
    assert done.kept
    assert contents(target) == whole


KILLED: Final = """
import os, signal, sys
from pathlib import Path
from t5g2convert import convert

left = int(sys.argv[3])

def progress(count):
    global left
    left -= count
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)

convert(Path(sys.argv[1]), Path(sys.argv[2]), max_shard_bytes=60_000, progress=progress)
"""


def test_O4_a_killed_run_is_resumed_even_if_it_ran_without_resume(
    source: Path, tmp_path: Path, whole: dict[str, bytes]
) -> None:
    target = tmp_path / "out"
    command = [sys.executable, "-c", KILLED, str(source), str(target), "700000"]
    assert subprocess.run(command, check=False, timeout=300).returncode == -signal.SIGKILL
    finished = finished_in(staging_of(target))
    assert finished
    done = convert(source, target, max_shard_bytes=SHARD, resume=True)
    assert set(done.kept) == finished
    assert contents(target) == whole
    assert names(tmp_path) == ["out"]
