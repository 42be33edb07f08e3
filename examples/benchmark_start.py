"""Measure the memory of the processes of a training run on one machine until they start with the first step.

    python examples/benchmark_start.py [270m 1b 4b] [--devices 2] [--folder FOLDER]

The model is a conversion of the real shapes with seeded random weights. Each process reads its share of the weights,
which are float32 here on the CPU, and on a GPU machine would not be in host memory. Printed are the size of the model's
files, the float32 weights, and the highest sum of the memory of all processes (PSS, which counts shared pages once).
"""

import argparse
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmark_sources import CONFIGS
from benchmark_training import write_model


def main() -> None:
    """Print a row for each size."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sizes", nargs="*", default=["1b"], metavar="SIZE", help="tiny, 270m, 1b, 4b")
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where the models are written (default: a temporary folder)")
    parser.add_argument("--start", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.start:
        start(arguments.folder, arguments.devices)
    print(f"{'size':>6}{'files':>10}{'weights':>10}{'peak':>10}{'besides weights':>17}")
    for size in arguments.sizes:
        with TemporaryDirectory(dir=arguments.folder) as temporary:
            folder = Path(temporary)
            write_model(folder, size, CONFIGS[size]["num_hidden_layers"])
            files = sum(file.stat().st_size for file in (folder / "model").glob("*.safetensors"))
            peak = highest_memory(folder, arguments.devices)
        weights = 2 * files
        print(f"{size:>6}{gb(files)}{gb(weights)}{gb(peak)}{gb(peak - weights, 17)}", flush=True)


def start(folder: Path, devices: int) -> None:
    """Start a run, and kill all its processes before the first step."""
    from t5g2convert.adaptation.adapt import Request, adapt
    from t5g2convert.adaptation.options import AdaptOptions

    options = AdaptOptions(
        lr=1e-4, steps=1, encoder_length=64, decoder_length=64, batch_tokens=512, devices=devices, accelerator="cpu",
        precision="float32", export=False,
    )  # fmt: skip
    request = Request(folder / "model", folder / "data", folder / "run", options)
    adapt(request, begun=lambda _: os.killpg(0, signal.SIGKILL), report=print)


def gb(nbytes: int, width: int = 10) -> str:
    """Return a size in GB, aligned right."""
    return f"{nbytes / 1e9:.2f} GB".rjust(width)


def highest_memory(folder: Path, devices: int) -> int:
    """Start a run, and return the highest memory of all its processes before its first step."""
    command = [sys.executable, __file__, "--start", "--folder", str(folder), "--devices", str(devices)]
    process = subprocess.Popen(command, start_new_session=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    highest = 0
    while process.poll() is None:
        highest = max(highest, sum(memory_of(pid) for pid in processes_of(process.pid)))
        time.sleep(0.05)
    if process.returncode != -signal.SIGKILL:
        raise SystemExit(f"the run ended with exit code {process.returncode}")
    return highest


def processes_of(group: int) -> list[int]:
    """Return the processes of a group."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if os.getpgid(int(entry.name)) == group:
                    found.append(int(entry.name))
    return found


def memory_of(pid: int) -> int:
    """Return the memory of a process, with its share of shared pages; 0 if it has ended."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return 1024 * int(line.split()[1])
    return 0


if __name__ == "__main__":
    main()
