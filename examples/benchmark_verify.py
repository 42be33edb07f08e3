"""Measure time and peak memory of `t5g2 verify` by the size of source and output.

    python examples/benchmark_verify.py [270m 1b 4b] [--folder DIR]

Sources have the real shapes and seeded random weights. A verification is timed as a whole process, including start-up:
it hashes all files, compares all bytes, runs Gemma 3 and both stacks side by side, and then the encoder-decoder. Sizes
that the disk cannot hold are left out.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmark_sources import DISK, run_apart

# VmHWM, the peak memory, is reset when a process starts.
SCRIPT = """
import sys
from pathlib import Path
from t5g2convert.cli.main import main
try:
    main(sys.argv[1:])
finally:
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(peak.split()[1], file=sys.stderr)
"""


def main() -> None:
    """Verify the requested sizes that fit on the disk."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["270m", "1b", "4b"], help="sizes to verify")
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    print(f"{'':8}{'source':>10}{'output':>10}{'seconds':>10}{'s per GB':>10}{'peak MB':>10}")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
            if shutil.disk_usage(folder).free < DISK[size]:
                print(f"{size}: left out, it needs {DISK[size] / 1e9:.0f} GB of disk")
                continue
            measure(size, Path(folder))


def measured(*arguments: str | Path) -> tuple[str, float, float]:
    """Run `t5g2`; return its stdout, the seconds that it took, including start-up, and its peak memory in MB."""
    start = time.perf_counter()
    command = [sys.executable, "-c", SCRIPT, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - start
    if run.returncode:
        raise SystemExit(f"t5g2 {' '.join(map(str, arguments))} failed: {run.stdout}{run.stderr}")
    return run.stdout, seconds, int(run.stderr.split()[-1]) * 1024 / 1e6


def measure(size: str, folder: Path) -> None:
    """Make a source, convert it, and verify it once."""
    source, output = folder / "source", folder / "output"
    source.mkdir()
    run_apart("make_source", size, str(source))
    measured("convert", source, output, "--no-flush", "--no-verify")
    said, seconds, peak = measured("verify", output, "--source", source, "--json")
    if not json.loads(said)["passed"]:
        raise SystemExit(f"{size} was not verified: {said}")
    sizes = [sum(path.stat().st_size for path in place.iterdir()) / 1e9 for place in (source, output)]
    print(
        f"{size:8}{sizes[0]:7.2f} GB{sizes[1]:7.2f} GB{seconds:10.1f}{seconds / sum(sizes):10.1f}{peak:10.0f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
