"""A process that has imported t5g2 and forks a `t5g2` for every line it reads, to skip the start-up.

A line is a JSON list: the file for stderr, then the arguments. Answered are the pid of the fork, which waits for a byte
from the descriptor that the command line names, and later its exit code, negative for a signal.
"""

import ctypes
import gc
import io
import json
import os
import sys
from contextlib import redirect_stderr, redirect_stdout, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from t5g2convert.cli.main import main
from tests.processes import small_shards as small_shards

PR_SET_PTRACER: Final = 0x59616D61


def warm_up(source: str) -> None:
    """Import everything that a conversion imports, by running one."""
    with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()), TemporaryDirectory() as folder:
        with suppress(SystemExit):
            main(["convert", "--no-verify", "--no-card", source, f"{folder}/out"])
        assert Path(folder, "out/config.json").exists()


def become_tool(gate: int, stderr: str, arguments: list[str]) -> None:
    # With Yama, strace may attach only to its own children, unless they allow others.
    ctypes.CDLL(None).prctl(PR_SET_PTRACER, ctypes.c_long(-1))
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), 2)
    os.read(gate, 1)
    try:
        main(arguments)
    except SystemExit as end:
        # Skip torch's teardown, which takes longer than the conversion; `main` has flushed its output.
        os._exit(int(end.code or 0))


if __name__ == "__main__":
    warm_up(sys.argv[2])
    gc.freeze()
    while line := sys.stdin.readline():
        pid = os.fork()
        if not pid:
            errors, *rest = json.loads(line)
            become_tool(int(sys.argv[1]), errors, rest)
        print(pid, flush=True)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
