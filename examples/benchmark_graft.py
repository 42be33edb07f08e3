"""Measure time and peak memory of converting a text-only source with a donor's vision tower, and of verifying it.

    python examples/benchmark_graft.py [SOURCE DONOR] [--folder DIR]

By default the source is shaped like a 270m and the donor like a 4b, with seeded random weights. The script runs
once with a projector of zeros and once with a projector aligned by least squares between both embedding tables.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from benchmark_sources import DISK, run_apart
from benchmark_verify import measured


def main() -> None:
    """Make both checkpoints, and convert and verify with each projector."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["270m", "4b"], help="size of the source, size of the donor")
    parser.add_argument("--folder", type=Path, default=None, help="where to work (default: a temporary folder)")
    arguments = parser.parse_args()
    source_size, donor_size = arguments.sizes
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        if shutil.disk_usage(folder).free < DISK[source_size] + DISK[donor_size] / 4:
            print(f"left out: it needs {(DISK[source_size] + DISK[donor_size] / 4) / 1e9:.0f} GB of disk")
            return
        source, donor, output = Path(folder, "source"), Path(folder, "donor"), Path(folder, "output")
        for size, place in ((source_size, source), (donor_size, donor)):
            place.mkdir()
            run_apart("make_source", size, str(place))
        print(f"{source_size} with the tower of {donor_size}")
        print(f"{'projector':12}{'':10}{'seconds':>10}{'peak MB':>10}")
        for projector in ("zeros", "aligned"):
            options = ["--vision-from", donor]
            _, seconds, peak = measured(
                "convert", source, output, *options, "--projector", projector, "--no-flush", "--no-verify"
            )
            print(f"{projector:12}{'convert':10}{seconds:10.1f}{peak:10.0f}", flush=True)
            said, seconds, peak = measured("verify", output, "--source", source, *options, "--json")
            if not json.loads(said)["passed"]:
                raise SystemExit(f"{projector} was not verified: {said}")
            print(f"{projector:12}{'verify':10}{seconds:10.1f}{peak:10.0f}", flush=True)
            shutil.rmtree(output)


if __name__ == "__main__":
    main()
