"""Measure `t5g2 convert` against `cp` of the same number of bytes and a transformers script, alternating in one run.

    python examples/benchmark_convert.py [270m 1b 4b 27b] [--rounds 5] [--folder DIR]

Sources have the real shapes and seeded random weights; the size `tiny` is for trying the script. Every command is timed
as a whole process, including start-up; before each, the data of the previous command is flushed to disk (sync). The
script prints medians over the rounds: seconds, the ratio to `cp` in the same round, and peak memory. Sizes that the
disk cannot hold are left out. 27b is only planned, from headers.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

from benchmark_sources import DISK, run_apart

TRANSFORMERS_ROUNDS = 3
"""Number of rounds for the slow script."""


@dataclass
class Contestant:
    """A command that writes a folder, and its measurements."""

    name: str
    command: list[str]
    rounds: int
    seconds: list[float] = field(default_factory=list)
    peaks: list[int] = field(default_factory=list)

    def run(self, output: Path | None) -> None:
        """Run the command once, alone, and remove its output."""
        os.sync()
        start = time.perf_counter()
        process = subprocess.Popen(self.command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        self.seconds.append(time.perf_counter() - start)
        self.peaks.append(usage.ru_maxrss * 1024)
        if status:
            raise SystemExit(f"{' '.join(self.command)} failed with status {status}")
        if output is not None:
            shutil.rmtree(output)


def main() -> None:
    """Measure the requested sizes that fit on the disk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["270m", "1b", "4b", "27b"], help="sizes to measure")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            if shutil.disk_usage(folder).free < DISK[size]:
                print(f"{size}: left out, it needs {DISK[size] / 1e9:.0f} GB of disk")
                continue
            (measure_plan if size == "27b" else measure)(size, arguments.rounds, Path(folder))


def measure(size: str, rounds: int, folder: Path) -> None:
    """Make a source, run all commands in turn, and print the table."""
    source, reference, output = folder / "source", folder / "reference", folder / "output"
    source.mkdir()
    run_apart("make_source", size, str(source))
    t5g2 = [str(Path(sys.executable).with_name("t5g2")), "convert", str(source), str(output), "--no-verify"]
    subprocess.run(
        [t5g2[0], "convert", str(source), str(reference), "--no-verify"], check=True, stdout=subprocess.DEVNULL
    )
    copied = f"cp -r '{reference}' '{output}'"
    script = str(Path(__file__).with_name("convert_with_transformers.py"))
    contestants = [
        Contestant("cp", ["sh", "-c", copied], rounds),
        Contestant("t5g2 convert --no-hash --no-flush", [*t5g2, "--no-hash", "--no-flush"], rounds),
        Contestant("t5g2 convert --no-flush", [*t5g2, "--no-flush"], rounds),
        Contestant("cp, then sync", ["sh", "-c", f"{copied} && sync '{output}'/*"], rounds),
        Contestant("t5g2 convert", t5g2, rounds),
        Contestant(
            "transformers, meta device", [sys.executable, script, str(source), str(output)], TRANSFORMERS_ROUNDS
        ),
    ]
    for number in range(rounds):
        for contestant in contestants:
            if number < contestant.rounds:
                contestant.run(output)
    report(size, contestants, sum(path.stat().st_size for path in reference.iterdir()))


def measure_plan(size: str, rounds: int, folder: Path) -> None:
    """Plan a model that consists only of headers."""
    run_apart("make_source", size, str(folder), "headers only")
    planner = Contestant("t5g2 plan", [str(Path(sys.executable).with_name("t5g2")), "plan", str(folder)], rounds)
    for _ in range(rounds):
        planner.run(None)
    seconds, peak = statistics.median(planner.seconds), statistics.median(planner.peaks)
    print(f"\n{size}: planned in {seconds:.2f} s and {peak / 1e6:.0f} MB, median of {rounds} rounds", flush=True)


def report(size: str, contestants: list[Contestant], output_bytes: int) -> None:
    """Print medians; unflushed commands are compared with `cp`, flushed ones with `cp, then sync`."""
    by_name = {contestant.name: contestant for contestant in contestants}
    print(f"\n{size}: {output_bytes / 1e9:.2f} GB of output, medians of {contestants[0].rounds} rounds")
    print(f"{'':36}{'seconds':>9}{'to cp':>8}{'over cp':>10}{'peak MB':>9}")
    for contestant in contestants:
        flushed = contestant.name in ("t5g2 convert", "cp, then sync")
        yardstick = by_name["cp, then sync" if flushed else "cp"].seconds
        pairs = list(zip(contestant.seconds, yardstick, strict=False))
        ratio = statistics.median(mine / theirs for mine, theirs in pairs)
        over = statistics.median(mine - theirs for mine, theirs in pairs)
        print(
            f"{contestant.name:36}{statistics.median(contestant.seconds):9.2f}{ratio:8.2f}{over:+9.2f}s"
            f"{statistics.median(contestant.peaks) / 1e6:9.0f}",
            flush=True,
        )
    fastest, script = by_name["t5g2 convert --no-hash --no-flush"], by_name["transformers, meta device"]
    times = statistics.median(theirs / mine for mine, theirs in zip(fastest.seconds, script.seconds, strict=False))
    print(f"the transformers script takes {times:.1f} times as long as t5g2 convert --no-hash --no-flush")


if __name__ == "__main__":
    main()
