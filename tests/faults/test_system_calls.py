"""Fail every system call of a conversion once, and kill the process at it once, as SQLite tests its journal."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from t5g2convert.checkpoint.header import TensorEntry, encode_header, read_header
from tests.faults.scene import Scene, write_source
from tests.faults.strace import INJECTED, start_and_trace

Record = Callable[[str, object], None]

WRITING: Final = {
    "openat": "openat",
    "mkdir": "?mkdir,?mkdirat",
    "reserve": "?fallocate,?ftruncate",
    "write": "write",
    "pwrite": "pwrite64",
    "pread": "?preadv,?preadv2,pread64",
    "read": "read",
    "fsync": "fsync",
    "rename": "?rename,?renameat,?renameat2",
    "close": "close",
    "flock": "flock",
    "fchmod": "fchmod",
    "copy": "copy_file_range",
}
"""A name for each group of calls; with `?` those that not every processor's kernel has."""

LOOKING: Final = {"stat": "?newfstatat,?fstat", "statfs": "?statfs", "list": "getdents64"}

CLEANING: Final = {"unlink": "?unlink", "unlinkat": "unlinkat", "rmdir": "?rmdir"}

ALL: Final = WRITING | LOOKING | CLEANING


def points() -> list[tuple[str, str, str]]:
    """Return mode, calls and fault; skip calls that a mode makes no more often than a new target."""
    swapping = ("openat", "mkdir", "fsync", "rename", "close", "list", *CLEANING)
    clearing = ("openat", "close", "list", *CLEANING)
    by_mode = {
        "new": (*WRITING, *LOOKING),
        "overwrite": swapping,
        "fill": (*swapping, "write"),
        "failing": clearing,
        "after-kill": clearing,
        "resumed": (
            "openat",
            "write",
            "pwrite",
            "pread",
            "read",
            "fsync",
            "rename",
            "close",
            "fchmod",
            "list",
            *CLEANING,
        ),
        "after-torn-fill": (*clearing, "read"),
        "after-torn-swap": ("openat", "rename", "close", *CLEANING),
    }
    return [
        (mode, name, fault)
        for mode, names in by_mode.items()
        for name in names
        for fault in ("SIGKILL", "ENOSPC", "EIO")
        # Reads and removals cannot fill a disk, and a kill at a read is the same as at the next call.
        if name not in LOOKING or fault == "EIO"
        if mode in ("new", "overwrite", "fill") or fault != "ENOSPC"
    ]


CASES: Final = points()


def check(scene: Scene, mode: str, name: str, fault: str, record: Record, *, only: str = "") -> None:
    wrong, counts = scene.sweep(mode, ALL[name], fault, only=only)
    record("faults", counts)
    assert not wrong, f"{wrong.count(chr(10)) + 1} wrong:\n{wrong}"


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "name"), [case[:2] for case in CASES if case[2] == "SIGKILL"])
def test_O4_killed_at_any_call(scene: Scene, mode: str, name: str, record_property: Record) -> None:
    kept = scene.kept
    check(scene, mode, name, "SIGKILL", record_property)
    if (mode, name) == ("new", "fsync"):
        assert scene.kept > kept, "runs that were killed at the later flushes had finished shards"


@pytest.mark.slow
@pytest.mark.parametrize("name", ["openat", "fsync", "rename", "close", "unlinkat"])
@pytest.mark.parametrize(("mode", "fault"), [("new", "SIGINT"), ("overwrite", "SIGTERM")])
def test_O3_stopped_at_any_call(scene: Scene, mode: str, name: str, fault: str, record_property: Record) -> None:
    check(scene, mode, name, fault, record_property)


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "name", "fault"), [case for case in CASES if case[2] != "SIGKILL"])
def test_O2_any_call_fails(scene: Scene, mode: str, name: str, fault: str, record_property: Record) -> None:
    check(scene, mode, name, fault, record_property)


@pytest.mark.sampled
@pytest.mark.parametrize("fault", ["SIGKILL", "ENOSPC", "EIO"])
def test_O2_a_shard_cannot_be_read_back_to_be_hashed(scene: Scene, fault: str, record_property: Record) -> None:
    """The hashing threads' calls: strace counts by thread, so the copying thread's reads can hide theirs."""
    check(scene, "new", "pread", fault, record_property, only=str(scene.target.parent))


@pytest.mark.sampled
@pytest.mark.parametrize("fault", ["SIGKILL", "EIO"])
@pytest.mark.parametrize("calls", ["openat", "?mkdir,?mkdirat", "pwrite64", "fsync", "?rename,?renameat,?renameat2"])
def test_O4_a_process_with_its_own_start_up_behaves_the_same(
    scene: Scene, calls: str, fault: str, record_property: Record
) -> None:
    """`Compare `t5g2` under strace from its first instruction with the forks of the other tests."""
    paths = scene.paths("new")
    scene.lay("new")
    run = start_and_trace(scene.arguments("new"), scene.folder, calls, paths, f"{calls}:{INJECTED[fault]}:when=1")
    assert run.hit is not None
    wrong = scene.judge("new", run, run.hit, set())
    record_property("faults", {fault: 1, "lost": sum(text.startswith("the target") for text in wrong)})
    assert wrong == []


def test_O2_a_source_that_only_its_hash_reads(scene: Scene, tmp_path: Path, record_property: Record) -> None:
    """A repeated lm_head in its own file is compared in one read, and hashed by a thread in three."""
    source = tmp_path / "source"
    write_source(source, vocab_size=32_768)
    repeat_embedding(source)
    target = tmp_path / "out"
    shard = str(source / "model-00002-of-00002.safetensors")
    inject = "?preadv,?preadv2:error=EIO:when=3"
    run = scene.tracer.run(
        ["convert", "--no-verify", "--no-card", source, target],
        calls="?preadv,?preadv2",
        paths=[shard],
        inject=[inject],
    )
    assert run.hit is not None
    assert run.code == 3
    assert run.stderr.startswith(f"t5g2: {shard}: cannot be read: Input/output error")
    assert list(tmp_path.iterdir()) == [source]
    record_property("faults", {"EIO": 1, "lost": 0})


def repeat_embedding(source: Path) -> None:
    """Give a one-file source a second one with the embedding again, as lm_head, and an index."""
    one = source / "model-00001-of-00002.safetensors"
    (source / "model.safetensors").rename(one)
    header = read_header(one)
    (name,) = (name for name in header.tensors if name.endswith("embed_tokens.weight"))
    embedding = header.tensors[name]
    entry = TensorEntry("lm_head.weight", embedding.dtype, embedding.shape, 0, embedding.nbytes)
    data = one.read_bytes()[embedding.start : embedding.end]
    (source / "model-00002-of-00002.safetensors").write_bytes(encode_header([entry]) + data)
    index = dict.fromkeys(header.tensors, one.name) | {"lm_head.weight": "model-00002-of-00002.safetensors"}
    (source / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
