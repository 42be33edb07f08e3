"""Commands in separate processes, without the seconds of importing torch.

`python(...)` replaces `subprocess.run([sys.executable, ...])`: it forks a server that has imported everything, and the
child gets its own environment, folder, streams and exit code. huggingface_hub reads the environment when it is
imported, so the server of `Preload.TOOL` leaves it and transformers to the child. Tests of start-up, signals and
Python's own options use `subprocess`.
"""

import atexit
import contextlib
import gc
import io
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import threading
import traceback
from collections.abc import Mapping, Sequence
from enum import StrEnum
from importlib import import_module
from pathlib import Path
from typing import Any, Final

ROOT: Final = Path(__file__).parents[2]


class Preload(StrEnum):
    """The modules that a server imports before it forks."""

    TOOL = "tool"
    TRANSFORMERS = "transformers"


MODULES: Final[Mapping[Preload, tuple[str, ...]]] = {
    Preload.TOOL: ("torch", "tokenizers", "PIL.Image", "t5g2convert.parity.verify"),
    Preload.TRANSFORMERS: (
        "torch",
        "t5g2convert.adaptation.adapt",
        "lightning_fabric",
        "transformers",
        "sentence_transformers",
    ),
}

_servers: dict[Preload, "subprocess.Popen[bytes]"] = {}


def python(
    arguments: Sequence[str | Path],
    *,
    preload: Preload = Preload.TOOL,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    input: str | None = None,  # noqa: A002 - the name that subprocess has
    timeout: float = 300,
    check: bool = False,
) -> subprocess.CompletedProcess[str]:
    """Run `-m MODULE ...`, `-c CODE ...` or `SCRIPT ...`, its output captured as text.

    Raises:
        CalledProcessError: With `check`, the command failed.
        TimeoutExpired: It took longer; it was killed.
    """
    server = _servers.get(preload)
    if server is None or server.poll() is not None:
        server = _servers[preload] = _start(preload)
    assert server.stdin is not None
    assert server.stdout is not None
    command = [str(argument) for argument in arguments]
    with tempfile.TemporaryDirectory() as folder:
        streams = [f"{folder}/{name}" for name in ("in", "out", "err")]
        Path(streams[0]).write_text(input or "", encoding="utf-8")
        request = [command, str(cwd or Path.cwd()), dict(env or os.environ), streams]
        server.stdin.write(json.dumps(request).encode() + b"\n")
        server.stdin.flush()
        child = int(server.stdout.readline())
        if not select.select([server.stdout], [], [], timeout)[0]:
            os.kill(child, signal.SIGKILL)
            server.stdout.readline()
            raise subprocess.TimeoutExpired(command, timeout)
        code = int(server.stdout.readline())
        out, err = (Path(path).read_text(encoding="utf-8", errors="surrogateescape") for path in streams[1:])
    if check and code:
        raise subprocess.CalledProcessError(code, command, out, err)
    return subprocess.CompletedProcess(command, code, out, err)


def run_t5g2(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run `t5g2` with these arguments; see `python`."""
    return python(["-m", "t5g2convert", *arguments], **options)


def _start(preload: Preload) -> "subprocess.Popen[bytes]":
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.processes.forked", preload],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )
    atexit.register(server.communicate)
    return server


def _serve(preload: Preload) -> None:
    """Answer each request with its process id, then with its exit code."""
    from t5g2convert.cli.command import load
    from t5g2convert.cli.main import COMMANDS

    for name in MODULES[preload]:
        import_module(name)
    for name in COMMANDS:
        load(name)
    if preload is Preload.TOOL:
        assert not {"huggingface_hub", "transformers"} & set(sys.modules)
    # Garbage collection in the children would touch, and so copy, every page.
    gc.freeze()
    for line in sys.stdin.buffer:
        child = os.fork()
        if not child:
            _run(*json.loads(line))
        print(child, flush=True)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(arguments: list[str], cwd: str, env: dict[str, str], streams: list[str]) -> None:
    """Run the command in this process, and exit with its code."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, (path, flags) in enumerate(zip(streams, (os.O_RDONLY, *[os.O_WRONLY | os.O_CREAT] * 2), strict=True)):
        opened = os.open(path, flags, 0o644)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="utf-8")  # noqa: SIM115
    sys.stderr = io.TextIOWrapper(
        open(2, "wb", closefd=False),  # noqa: SIM115
        encoding="utf-8",
        errors="backslashreplace",
        line_buffering=True,
    )
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    for folder in env.get("PYTHONPATH", "").split(os.pathsep):
        if folder and folder not in sys.path:
            sys.path.insert(0, folder)
    code = 1
    try:
        code = _exit_code(arguments)
    except BaseException:  # noqa: BLE001 - as the interpreter does
        traceback.print_exc()
    finally:
        with contextlib.suppress(Exception):
            threading._shutdown()  # type: ignore[attr-defined]
        with contextlib.suppress(Exception):
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(Exception):
                stream.flush()
        os._exit(code)


def _exit_code(arguments: list[str]) -> int:
    try:
        if arguments[0] == "-c":
            sys.argv = ["-c", *arguments[2:]]
            exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
        elif arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = arguments
            sys.path.insert(0, str(Path(arguments[0]).parent))
            runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit as end:
        if end.code is None or isinstance(end.code, int):
            return end.code or 0
        print(end.code, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    _serve(Preload(sys.argv[1]))
