"""The cost of a conversion: system calls, flushes, and resident memory as the kernel counts it."""

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from t5g2convert import plan
from t5g2convert.conversion.write.copy import CHUNK_BYTES
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.synthetic import write_synthetic_source

STRACE: Final = shutil.which("strace")
needs_strace = pytest.mark.skipif(STRACE is None, reason="strace is not installed")

READ_BACK: Final = 1 << 18
"""Bytes that a hasher reads back at once."""

Config = Mapping[str, Any]


def sized(demo_config: Config, vocabulary: int, intermediate: int = 96) -> Config:
    text = {**demo_config["text_config"], "vocab_size": vocabulary, "intermediate_size": intermediate}
    return {**demo_config, "text_config": text}


@pytest.fixture
def make_source(gemma3_map: WeightMap, demo_config: Config, tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, vocabulary: int, intermediate: int = 96, max_shard_bytes: int = 5_000_000_000) -> Path:
        (tmp_path / name).mkdir()
        config = sized(demo_config, vocabulary, intermediate)
        write_synthetic_source(tmp_path / name, gemma3_map, config, seed=None, max_shard_bytes=max_shard_bytes)
        return tmp_path / name

    return make


class Trace:
    """Count the system calls of one `t5g2` run on files below a folder, by call and file."""

    def __init__(self, folder: Path, *arguments: str | Path) -> None:
        log = folder / "trace.log"
        calls = "openat,open,pread64,preadv,preadv2,read,pwrite64,pwritev,write,fsync,fdatasync,sync_file_range,rename"
        command = ["strace", "-f", "-y", "-qq", "-s", "0", "-o", str(log), "-e", f"trace={calls}"]
        command += [sys.executable, "-m", "tests.processes.small_shards", *map(str, arguments)]
        subprocess.run(command, capture_output=True, check=True, timeout=300)
        self.lines = [line for line in log.read_text(errors="replace").splitlines() if str(folder) in line]
        log.unlink()
        self.counts: Counter[str] = Counter()
        self.opened: Counter[str] = Counter()
        for line in self.lines:
            call = re.match(r"\d+\s+(\w+)\(", line)
            if call is None or "resumed" in line:
                continue
            self.counts[call[1]] += 1
            if call[1] in ("open", "openat") and " = -1 " not in line:
                self.opened[Path(line.split('"')[1]).name] += 1

    def reads(self) -> int:
        return sum(self.counts[name] for name in ("pread64", "preadv", "preadv2", "read"))

    def writes(self) -> int:
        return sum(self.counts[name] for name in ("pwrite64", "pwritev", "write"))


def pieces(size: int) -> int:
    return -(-size // CHUNK_BYTES)


@pytest.mark.sampled
@needs_strace
@pytest.mark.parametrize("options", [[], ["--no-hash"]], ids=["hash", "no-hash"])
@pytest.mark.parametrize("shard", ["5GB", "8MB"])
def test_calls_are_bounded_by_tensors_and_chunks(
    options: list[str], shard: str, make_source: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_source("source", 120_000, max_shard_bytes=4_000_000)
    made = plan(source, max_shard_bytes=5_000_000_000 if shard == "5GB" else 8_000_000)
    trace = Trace(
        tmp_path, "convert", "--no-verify", "--no-card", source, tmp_path / "out", "--max-shard-size", shard, *options
    )
    ranges = {tensor.content.source for tensor in made.tensors if tensor.content.source is not None}
    reads = sum(pieces(span.end - span.start) for span in ranges)
    read_back = made.nbytes // READ_BACK + len(made.shards) + len(made.source_files)
    # The last term: headers (twice each), config, index and map, each read to its end.
    assert trace.reads() <= reads + (read_back if not options else 0) + 4 * len(made.source_files) + 40
    writes = sum(pieces(tensor.nbytes) for tensor in made.tensors)
    # Each shard's header and its line in the journal; the other files; output on both streams.
    files = len(list((tmp_path / "out").iterdir()))
    assert trace.writes() <= writes + 2 * len(made.shards) + files + 3
    for file in made.source_files:
        assert trace.opened[file.name] == 2, "once for its header, once for its bytes"
    for item in made.shards:
        assert trace.opened[item.name] == 1


@needs_strace
def test_every_file_and_both_folders_are_flushed_once(make_source: Callable[..., Path], tmp_path: Path) -> None:
    source = make_source("source", 3_000)
    trace = Trace(
        tmp_path, "convert", "--no-verify", "--no-card", source, tmp_path / "out", "--max-shard-size", "400kB"
    )
    files = len(list((tmp_path / "out").iterdir()))
    shards = len(list((tmp_path / "out").glob("*.safetensors")))
    flushes = files + shards  # each finished shard is one line of the journal
    assert trace.counts["fsync"] == flushes + 2
    assert trace.counts["fdatasync"] == trace.counts["sync_file_range"] == 0
    assert trace.counts["rename"] == 1
    order = [line for line in trace.lines if " fsync(" in line or " rename(" in line]
    assert ["rename" in line for line in order] == [False] * (flushes + 1) + [True, False], "the parent's flush is last"
    again = Trace(
        tmp_path,
        "convert",
        "--no-verify",
        "--no-card",
        source,
        tmp_path / "other",
        "--max-shard-size",
        "400kB",
        "--no-flush",
    )
    assert again.counts["fsync"] == 0


@pytest.mark.slow
@needs_strace
def test_twice_the_bytes_cost_their_chunks_and_nothing_else(make_source: Callable[..., Path], tmp_path: Path) -> None:
    calls = []
    for name, vocabulary in (("one", 120_000), ("two", 240_000)):
        source = make_source(name, vocabulary)
        calls.append(
            (Trace(tmp_path, "convert", "--no-verify", "--no-card", source, tmp_path / f"{name}-out"), plan(source))
        )
    (one, small), (two, large) = calls
    more = pieces(large.nbytes - small.nbytes) + 1
    assert len(small.tensors) == len(large.tensors)
    assert {name: two.opened[name] for name in one.opened if name.endswith((".safetensors", ".json"))} == {
        name: count for name, count in one.opened.items() if name.endswith((".safetensors", ".json"))
    }
    assert two.counts["fsync"] == one.counts["fsync"]
    assert two.writes() - one.writes() <= more
    # One file holds both stacks here: parts written out of order are read back, at most the whole file.
    assert two.reads() - one.reads() <= more + (large.nbytes - small.nbytes) // READ_BACK + 1


@pytest.mark.sampled
@needs_strace
@pytest.mark.parametrize("command", ["inspect", "plan"])
def test_headers_are_all_that_is_read_to_describe_a_model(
    command: str, make_source: Callable[..., Path], tmp_path: Path
) -> None:
    counts = [
        Trace(tmp_path, command, make_source(name, vocabulary)).counts
        for name, vocabulary in (("small", 10_000), ("large", 10_000_000))
    ]
    assert counts[0] == counts[1]
    assert counts[0]["write"] == counts[0]["pwrite64"] == 0


# Memory

_PARENT: Final = """
import json, resource, subprocess, sys
run = subprocess.run([sys.executable, "-m", "t5g2convert", *sys.argv[1:]], capture_output=True, text=True)
sys.exit(run.stderr) if run.returncode else None
print(json.dumps(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024))
"""

TOLERANCE: Final = 4e6
"""Bytes by which two runs of the same may differ: a thread's arena more or less."""


def peak(*arguments: str | Path) -> int:
    """Return a run's ru_maxrss in bytes, from a small parent: a forked child starts with its parent's memory."""
    command = [sys.executable, "-c", _PARENT, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    return int(json.loads(run.stdout))


@pytest.mark.sampled
@pytest.mark.parametrize("arguments", ["inspect", "plan", "convert", "convert --no-hash"])
def test_peak_memory_is_the_same_for_a_model_of_ten_times_the_size(
    arguments: str, make_source: Callable[..., Path], tmp_path: Path
) -> None:
    command, *options = arguments.split()
    peaks = []
    for name, vocabulary, intermediate in (("small", 160_000, 1_000), ("large", 1_600_000, 10_000)):
        source = make_source(name, vocabulary, intermediate)
        output: list[str | Path] = (
            [tmp_path / f"{name}-out", "--no-flush", "--no-verify", "--no-card"] if command == "convert" else []
        )
        peaks.append(peak(command, source, *output, *options))
        shutil.rmtree(tmp_path / f"{name}-out", ignore_errors=True)
    assert max(peaks) < 64e6
    assert abs(peaks[1] - peaks[0]) < TOLERANCE
