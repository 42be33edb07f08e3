"""Training runs that are killed at random moments and resumed, again and again: what a kill may cost, and what not.

`python -m tests.faults.chaos --kills 200` trains a tiny model on one and on two processes in turn. SIGKILL ends all
processes of a run at a random moment: while they start, in a step, in a checkpoint, in a save in the background, in an
evaluation. After every kill

- each complete checkpoint has the sha256 of its checkpoint.json,
- the newest is not older than before, nor than what the log says must have been saved,
- and once the run has resumed, nothing is left of an unfinished checkpoint.

A run that reaches its end must equal the run that was never killed, bit for bit: values, moments, log and evaluations.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch

from t5g2convert.adaptation.adapt import Request, adapt
from t5g2convert.adaptation.train.checkpoint_manifest import (
    check_files,
    complete_checkpoints,
    read_checkpoint_manifest,
)
from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader, read_shards, shape_of
from tests.adaptation.conftest import _write_small as write_small
from tests.adaptation.trainings import changed, request_of, settings_of, steps_of

STEPS: Final = 8
EVERY: Final = 2
"""Steps between checkpoints."""


@dataclass(frozen=True, slots=True)
class Life:
    """Processes of one run, forked from this one."""

    processes: tuple[int, ...]
    log: Path

    def wait(self, seconds: float) -> bool:
        """Return whether all processes ended in that time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            # Without reaping: the ids stay theirs.
            if all(os.waitid(os.P_PID, each, os.WEXITED | os.WNOHANG | os.WNOWAIT) for each in self.processes):
                return True
            time.sleep(0.002)
        return False

    def kill(self) -> None:
        """Kill all processes at once: none lives to report the end of another."""
        os.killpg(self.processes[0], signal.SIGKILL)

    def codes(self) -> list[int]:
        """Wait for the processes, and return their exit codes."""
        return [os.waitstatus_to_exitcode(os.waitpid(each, 0)[1]) for each in self.processes]


def start(request: Request, world: int, log: Path) -> Life:
    """Start the processes of a run as torchrun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        process = os.fork()
        if not process:
            launcher = {"TORCHELASTIC_RUN_ID": "chaos", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
            launcher |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            launcher |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
            _live(request, launcher, log)
        processes.append(process)
        os.setpgid(process, processes[0])
    return Life(tuple(processes), log)


def _live(request: Request, environment: dict[str, str], log: Path) -> None:
    """Train in this process, and end it."""
    code = 1
    try:
        os.environ.update(environment)
        opened = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(opened, 1)
        os.dup2(opened, 2)

        def begun(_: Sequence[str]) -> None:
            left = list((request.run / "checkpoints").glob(".*"))
            assert not left, f"left behind: {left}"

        before = set(sys.modules)
        adapt(request, begun=begun, report=lambda _: None)
        log.with_suffix(".modules").write_text("\n".join(sorted(set(sys.modules) - before)))
        code = 0
    except BaseException:  # noqa: BLE001 - the parent reads the log
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def finish(request: Request, world: int, log: Path) -> float:
    """Let a run reach its end, and return the seconds it took."""
    began = time.monotonic()
    codes = start(request, world, log).codes()
    assert codes == [0] * world, log.read_text()
    return time.monotonic() - began


def import_modules(names: Sequence[str]) -> None:
    """Import what a run imported, so that the processes forked from this one need not."""
    for name in names:
        # Some are made by others, or are attributes of them.
        with contextlib.suppress(ImportError):
            import_module(name)


def contents(run: Path) -> dict[str, Any]:
    """Return all that a run computed: values and moments of its checkpoints, log and evaluations."""
    found: dict[str, Any] = {"log": steps_of(run), "evaluations": (run / "evaluation.jsonl").read_text()}
    for step, folder in complete_checkpoints(run).items():
        manifest = read_checkpoint_manifest(folder)
        for name, shards in read_shards(folder, manifest).items():
            found[f"{step} {name}"] = [(shape_of(shards), shard.read(0, 1 << 60).tobytes()) for shard in shards]
    return found


def check_killed(run: Path, before: int) -> int:
    """Check what a kill left, and return the step of the newest checkpoint."""
    found = complete_checkpoints(run)
    for folder in found.values():
        check_files(folder, read_checkpoint_manifest(folder))
        assert CheckpointReader(folder).names
    newest = max(found, default=0)
    assert newest >= before, f"{run}: the newest checkpoint was {before}, and is {newest}"
    log = run / "metrics.jsonl"
    logged = log.read_bytes().count(b"\n") if log.exists() else 0
    # The line of the step after a save says that the save has begun, and so that the one before it had ended.
    begun = (logged - 1) // EVERY * EVERY
    assert newest >= begun - EVERY, f"{run}: {logged} steps are logged, but the newest checkpoint is {newest}"
    return newest


def chaos(folder: Path, kills: int, seed: int) -> str:
    """Kill runs so many times, and return a line that says what happened.

    Raises:
        AssertionError: Something was lost.
    """
    rng = random.Random(seed)
    small = folder / "small"
    small.mkdir()
    write_small(small)
    settings = settings_of(precision="float32", steps=STEPS, image_every=4)
    how = {"devices": None, "nodes": None, "save_every": EVERY, "keep": 2, "resume": True}
    how |= {"eval": small / "data", "eval_every": 3, "eval_samples": 8, "micro_batch": 8}
    requests, expected, lengths = {}, {}, {}
    for world in (1, 2):
        request = request_of(small, folder / f"whole-{world}", settings, **how)
        lengths[world] = finish(request, world, folder / f"whole-{world}.log")
        if world == 1:
            import_modules((folder / "whole-1.modules").read_text().split())
            shutil.rmtree(request.run)
            lengths[world] = finish(request, world, folder / f"whole-{world}.log")
        expected[world] = contents(request.run)
        requests[world] = replace(request, run=folder / f"run-{world}")
        assert len(expected[world]["log"]) == STEPS
    newest, number, killed, in_save, ended = {1: 0, 2: 0}, 0, 0, 0, 0
    while killed < kills:
        number += 1
        world = 1 + number % 2
        log = folder / "life.log"
        log.unlink(missing_ok=True)
        request = changed(requests[world], async_save=rng.random() < 0.75)
        life = start(request, world, log)
        # The moment is random in a time that follows this machine: shorter if a run ends before, longer if it makes no
        # checkpoint.
        if not life.wait(rng.uniform(0, lengths[world])):
            life.kill()
        codes = life.codes()
        if codes == [0] * world:
            assert_equal(contents(request.run), expected[world], request.run)
            shutil.rmtree(request.run)
            newest[world], ended, lengths[world] = 0, ended + 1, lengths[world] * 0.8
            continue
        assert set(codes) <= {0, -signal.SIGKILL}, log.read_text()
        killed += 1
        in_save += any((request.run / "checkpoints").glob(".*"))
        found = check_killed(request.run, newest[world])
        lengths[world] *= 1.1 if found == newest[world] else 1
        newest[world] = found
        if killed % 20 == 0:
            print(f"{killed} kills, {in_save} in a save, {ended} runs ended", file=sys.stderr, flush=True)
    for world, request in requests.items():
        finish(request, world, folder / f"end-{world}.log")
        assert_equal(contents(request.run), expected[world], request.run)
        ended += 1
    return f"chaos: {killed} kills, {in_save} in a save, 0 checkpoints lost; {ended} runs ended as if never killed"


def assert_equal(found: dict[str, Any], expected: dict[str, Any], run: Path) -> None:
    wrong = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    assert not wrong, f"{run}: {wrong}"


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill training runs at random moments.")
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        print(chaos(Path(folder), options.kills, options.seed))
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
