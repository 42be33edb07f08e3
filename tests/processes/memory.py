"""Peak memory of a run of the command line, as the kernel counts it, and a limit for this process."""

import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# VmHWM starts from zero in each process; ru_maxrss would include the tests' own memory.
_SCRIPT = """
import sys
from pathlib import Path
from t5g2convert.cli.main import main
try:
    main(sys.argv[1:])
finally:
    status = Path("/proc/self/status").read_text()
    print(next(line for line in status.splitlines() if line.startswith("VmHWM")), file=sys.stderr)
"""


def run_and_measure(*arguments: str | Path) -> tuple[str, int]:
    """Run `t5g2` with these arguments; return its stdout and its peak resident memory in bytes."""
    command = [sys.executable, "-c", _SCRIPT, *map(str, arguments)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return run.stdout, int(run.stderr.splitlines()[-1].split()[1]) * 1024


@contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """Limit this process to `more` bytes beyond its mapped memory; larger requests raise MemoryError."""
    mapped = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + more, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)
