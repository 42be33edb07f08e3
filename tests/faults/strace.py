"""Conversions under strace: their calls on a test's files, one of which can fail or kill the process.

`strace -P` restricts the trace, the injection and its counter to the paths given, and to descriptors open on them; each
must be given, so they are read from a trace of the same conversion without faults. `when=N` counts per thread. With
`--seccomp-bpf`, which makes a start-up bearable, strace 6.1 injects errors but no signals: hence the forks.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

STRACE: Final = shutil.which("strace")

INJECTED: Final = {
    "SIGKILL": "signal=KILL",
    "SIGTERM": "signal=TERM",
    "SIGINT": "signal=INT",
    "ENOSPC": "error=ENOSPC",
    "EIO": "error=EIO",
}


@dataclass(frozen=True, slots=True)
class Call:
    """A system call as logged at its start; descriptors are followed by their paths."""

    thread: int
    name: str
    text: str

    @property
    def paths(self) -> list[str]:
        return [quoted or opened for quoted, opened in re.findall(r'"(/[^"]*)"|<(/[^>]*)>', self.text)]


@dataclass(frozen=True, slots=True)
class Run:
    """A finished process: exit code (negative for a signal), output, and calls."""

    code: int
    stderr: str
    calls: tuple[Call, ...]

    @property
    def hit(self) -> int | None:
        """Return the position of the (last) failed call, or of the call at which the process died."""
        failed = [number for number, call in enumerate(self.calls) if "(INJECTED)" in call.text]
        if self.code == -9:
            return max(number for number, call in enumerate(self.calls) if call.text.rstrip().endswith(("= ?", "...>")))
        return failed[-1] if failed else None

    @property
    def injected(self) -> int:
        """Count the faults: with `when=N` every thread has one at its N-th call."""
        return sum(call.text.count("(INJECTED)") for call in self.calls)


def parse(log: str) -> tuple[Call, ...]:
    """Return the calls of a log; join calls that another thread interrupted."""
    calls: list[Call] = []
    open_calls: dict[int, int] = {}
    for line in log.splitlines():
        if found := re.match(r"(\d+) +<\.\.\. (\w+) resumed>(.*)", line):
            number = open_calls.pop(int(found[1]))
            begun = calls[number]
            calls[number] = Call(begun.thread, begun.name, begun.text.removesuffix("<unfinished ...>") + found[3])
        elif (found := re.match(r"(\d+) +--- SIG(TERM|INT) ", line)) and calls:
            # strace marks errors only.
            calls[-1] = replace(calls[-1], text=f"{calls[-1].text} (INJECTED)")
        elif found := re.match(r"(\d+) +(\w+)\(", line):
            if line.endswith("<unfinished ...>"):
                open_calls[int(found[1])] = len(calls)
            calls.append(Call(int(found[1]), found[2], line))
    return tuple(calls)


class NotTraced(Exception):  # noqa: N818 - a finding, no error
    """strace could not attach."""


class Tracer:
    """Run `t5g2` in forks of one process that has imported it, each under its own strace."""

    def __init__(self, folder: Path, source: Path) -> None:
        self.log, self.stderr = folder / "log", folder / "stderr"
        gate, self.gate = os.pipe()
        command = [sys.executable, str(Path(__file__).with_name("server.py")), str(gate), str(source)]
        self.server = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1, pass_fds=[gate]
        )
        os.close(gate)

    def close(self) -> None:
        self.server.communicate(timeout=300)
        os.close(self.gate)

    def refused(self) -> str | None:
        """Return strace's reason why it cannot trace here."""
        try:
            self.run(["--version"])
        except NotTraced as error:
            return str(error)
        return None

    def run(
        self,
        arguments: Sequence[str | Path],
        *,
        calls: str = "%file,%desc",
        paths: Iterable[str] = (),
        inject: Iterable[str] = (),
    ) -> Run:
        """Run to completion.

        Args:
            arguments: The command line.
            calls: The system calls to trace.
            paths: The only paths whose calls count; empty for all.
            inject: What is injected, as strace's option says it: `CALL:FAULT:when=N`.
        """
        assert STRACE is not None
        assert self.server.stdin is not None
        self.server.stdin.write(json.dumps([str(self.stderr), *map(str, arguments)]) + "\n")
        options = [*_options(self.log, calls, paths, inject), "-p", self._answer()]
        with subprocess.Popen([STRACE, *options], stderr=subprocess.PIPE, text=True) as strace:
            attached = line_of(strace.stderr)
            os.write(self.gate, b"!")
            code = int(self._answer())
            strace.communicate(timeout=300)
        if not attached.endswith("attached\n"):
            raise NotTraced(attached)
        return Run(code, self.stderr.read_text(), parse(self.log.read_text()))

    def _answer(self) -> str:
        return line_of(self.server.stdout).strip()


def line_of(stream: IO[str] | None) -> str:
    assert stream is not None
    return stream.readline()


def start_and_trace(
    arguments: Sequence[str | Path], folder: Path, calls: str, paths: Iterable[str] = (), *inject: str
) -> Run:
    """Run `t5g2` under strace from its first instruction; this takes a second or more."""
    assert STRACE is not None
    tool = [sys.executable, "-m", "tests.processes.small_shards", *arguments]
    command = [STRACE, *_options(folder / "log", calls, paths, inject), *tool]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=300)
    return Run(done.returncode, done.stderr, parse((folder / "log").read_text()))


def _options(log: Path, calls: str, paths: Iterable[str], inject: Iterable[str]) -> list[str]:
    options = ["-f", "-y", "-o", str(log), "-e", f"trace={calls}"]
    for path in paths:
        options += ["-P", path]
    for fault in inject:
        options += ["-e", f"inject={fault}"]
    return options
