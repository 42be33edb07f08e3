"""A conversion to disturb: its state before, and the invariants after."""

import os
import shutil
import signal
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from t5g2convert import OutputError, convert
from t5g2convert.conversion.output.recovery import INSIDE
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.synthetic import write_synthetic_source
from tests.faults.strace import INJECTED, Call, Run, Tracer
from tests.folders import OLD, write_old

CONFIG: Final[dict[str, Any]] = {
    "architectures": ["Gemma3ForCausalLM"],
    "model_type": "gemma3_text",
    "dtype": "bfloat16",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "query_pre_attn_scalar": 4,
    "sliding_window": 4,
    "max_position_embeddings": 64,
}
"""The smallest model: every tensor is a read and two writes, and each is a place for a fault."""

SHARD_BYTES: Final = 20_000
"""Gives three shards and an index."""

CLEANING: Final = {"unlink", "unlinkat", "rmdir"}

RENAMES: Final = "?rename,?renameat,?renameat2"


def write_source(folder: Path, **config: Any) -> None:
    folder.mkdir(parents=True)
    write_synthetic_source(folder, find_map("gemma3").map, {**CONFIG, **config}, seed=0)
    (folder / "tokenizer.json").write_text('{"version": "1.0"}\n')


def contents(folder: Path) -> dict[str, bytes] | None:
    """Return the files of a folder without a run's temporary ones; None if the folder is missing."""
    if not folder.exists():
        return None
    names = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return {name.as_posix(): (folder / name).read_bytes() for name in names if name.parts[0] != INSIDE}


EMPTY: Final = "a folder with nothing in it"


def leftovers(target: Path) -> set[str]:
    """Return leftovers next to or inside a target, or a note that its new parent folder is empty."""
    if not target.parent.exists():
        return set()
    others = {path.name for path in target.parent.iterdir()} - {target.name}
    others |= {INSIDE} if (target / INSIDE).exists() else set()
    return others if others or target.exists() else {EMPTY}


def output_problem(stderr: str, code: int) -> str | None:
    """Return the problems of a conversion's last output."""
    lines = stderr.splitlines()
    if code == 0:
        return None if all(line.startswith("note: ") for line in lines) else f"said {stderr!r} although all went well"
    if len(lines) != 1 or not stderr.startswith("t5g2: ") or "a bug in t5g2" in stderr:
        return f"said {stderr.strip()[-300:]!r}"
    return None


@dataclass(frozen=True)
class Mode:
    """The state of the target before the disturbed run.

    Attributes:
        overwrite: Whether an old target is replaced.
        fill: Whether the target is an empty folder to fill in place.
        resume: Whether the run resumes from the killed run's shards, with one shard deleted since.
        killed: Where a run before this one was killed.
        failing: A fault that the run has in any case, so that it must clean up.
    """

    overwrite: bool = False
    fill: bool = False
    resume: bool = False
    killed: str | None = None
    failing: str | None = None


MODES: Final = {
    "new": Mode(),
    "overwrite": Mode(overwrite=True),
    "fill": Mode(fill=True),
    "failing": Mode(failing="fsync:error=EIO:when=1"),
    "after-kill": Mode(killed="rename,renameat2:signal=KILL:when=1"),
    # Killed before the journal was removed: all shards are finished.
    "resumed": Mode(resume=True, killed="?unlink,?unlinkat:signal=KILL:when=1"),
    "after-torn-swap": Mode(overwrite=True, killed="rename,renameat2:signal=KILL:when=2"),
    # Killed after some files were moved.
    "after-torn-fill": Mode(fill=True, killed="rename,renameat2:signal=KILL:when=5"),
}


@dataclass
class Scene:
    """Repeated conversions of one source into one target."""

    tracer: Tracer
    source: Path
    clean: dict[str, bytes]
    folder: Path
    templates: dict[str, Path] = field(default_factory=dict)
    traced: dict[str, list[str]] = field(default_factory=dict)
    kills: int = 0
    kept: int = 0
    """Shards of killed runs that others took up."""

    @property
    def target(self) -> Path:
        return self.folder / "work/new/out"

    def arguments(self, mode: str) -> list[str | Path]:
        options = ["--overwrite"] * MODES[mode].overwrite + ["--resume"] * MODES[mode].resume
        return [
            "convert",
            "--no-verify",
            "--no-card",
            self.source,
            self.target,
            "--max-shard-size",
            str(SHARD_BYTES),
            *options,
        ]

    def lay(self, mode: str) -> None:
        """Restore the state before the run."""
        work = self.folder / "work"
        killed = MODES[mode].killed
        # Traced first, because tracing prepares the target itself.
        way = "overwrite" if MODES[mode].overwrite else "fill" if MODES[mode].fill else "new"
        paths = self.paths(way) if killed is not None else []
        shutil.rmtree(work, ignore_errors=True)
        if mode in self.templates:
            # Files in a filled folder are identified by their inodes.
            shutil.copytree(self.templates[mode], work, copy_function=os.link if MODES[mode].fill else shutil.copy2)
            return
        work.mkdir()
        if MODES[mode].overwrite:
            write_old(self.target)
        if MODES[mode].fill:
            self.target.mkdir(parents=True, mode=0o700)
        if killed is not None:
            run = self.tracer.run(self.arguments(mode), paths=paths, inject=[killed])
            assert run.code == -9
            assert (contents(self.target) is None) != MODES[mode].fill
            assert any(contents(path) == OLD for path in self.target.parent.iterdir()) == MODES[mode].overwrite
            if MODES[mode].resume:
                next(self.target.parent.rglob("model-00002-*")).unlink()
            self.templates[mode] = self.folder / mode
            work.rename(self.templates[mode])
            self.lay(mode)

    def trace(self, mode: str) -> Run:
        """Run with only the mode's own fault; return the calls on our files."""
        self.lay(mode)
        failing = MODES[mode].failing
        run = self.tracer.run(self.arguments(mode), inject=[] if failing is None else [failing])
        return Run(run.code, run.stderr, tuple(call for call in run.calls if self._ours(call)))

    def paths(self, mode: str) -> list[str]:
        """Return every path of ours that the conversion names or opens."""
        if mode not in self.traced:
            found = {path for call in self.trace(mode).calls for path in call.paths if self._ours(call)}
            self.traced[mode] = sorted(path for path in found if path.startswith(str(self.folder)))
        return self.traced[mode]

    def _ours(self, call: Call) -> bool:
        return any(path.startswith(str(self.folder)) for path in call.paths)

    def sweep(self, mode: str, calls: str, fault: str, *, only: str = "") -> tuple[str, dict[str, int]]:
        """Run with a fault at the first call, at the second, and so on, until a run has fewer calls.

        Returns:
            The problems, one a line; the number of faults; the number of outputs lost or damaged.
        """
        wrong: list[str] = []
        counts = Counter({fault: 0, "lost": 0})
        paths = [path for path in self.paths(mode) if path.startswith(only)]
        failing = MODES[mode].failing
        number = 0 if failing is None else self._before(mode, calls, "(INJECTED)")
        # After it clears what the killed run left, this run is like any other.
        last = None if MODES[mode].killed is None or MODES[mode].resume else self._before(mode, calls, "O_CREAT")
        while last is None or number < last:
            number += 1
            self.lay(mode)
            before = leftovers(self.target)
            place = self._place(mode)
            inject = [f"{calls}:{INJECTED[fault]}:when={number}", *([failing] if failing else [])]
            traced = f"{calls},{RENAMES},fsync"
            run = self.tracer.run(self.arguments(mode), calls=traced, paths=paths, inject=inject)
            hit = run.hit if failing is None else self._hit_with_own_fault(run, calls)
            if hit is None:
                assert failing is not None or contents(self.target) == self.clean
                break
            counts[fault] += 1
            stopped = signal.Signals[fault] if fault in ("SIGINT", "SIGTERM") else 0
            moved = self._place(mode) != place
            faults = self.judge(mode, run, hit, before, stopped=stopped)
            faults += ["the target is another folder than it was, or has another mode"] * moved
            counts["lost"] += any(fault.startswith("the target") for fault in faults)
            where = run.calls[hit].text.replace(str(self.folder), "")[:150]
            wrong += [f"{fault} at {calls} {number}: {where}: {text}" for text in faults]
        return "\n".join(wrong), dict(counts)

    def _place(self, mode: str) -> tuple[int, int] | None:
        """Return inode and mode of a filled target."""
        status = self.target.stat() if MODES[mode].fill else None
        return None if status is None else (status.st_ino, status.st_mode)

    def _before(self, mode: str, calls: str, sign: str) -> int:
        """Count the main thread's calls of this name before the first call with the sign."""
        traced = self.trace(mode).calls
        first = next(number for number, call in enumerate(traced) if sign in call.text)
        named = Counter(call.name for call in traced[:first] if call.thread == traced[first].thread)
        return max(named[name] for name in calls.replace("?", "").split(","))

    def _hit_with_own_fault(self, run: Run, calls: str) -> int | None:
        """Return the call that was hit, if the run has another fault before it."""
        if run.code == -9:
            return run.hit
        names = calls.replace("?", "").split(",")
        failed = [number for number, call in enumerate(run.calls) if call.name in names and "(INJECTED)" in call.text]
        return failed[-1] if failed else None

    def judge(self, mode: str, run: Run, hit: int, before: set[str], *, stopped: int = 0) -> list[str]:
        """Return the problems after a run with a fault, and after the next run.

        Args:
            mode: How the target lay.
            run: The run.
            hit: The position of the call that was hit.
            before: The files next to the target before the run.
            stopped: The signal that was sent, if it was one that can be handled.
        """
        call, overwrite = run.calls[hit], MODES[mode].overwrite
        if not self._ours(call):
            return ["the harness hit a file that is not ours"]
        # Two threads at their N-th call send two signals, and the second ends the process at once.
        killed = run.code == -9 or (stopped != 0 and run.code == -stopped and run.injected > 1)
        committed = any(self._commits(earlier) for earlier in run.calls[:hit])
        cleaning = committed or call.name in CLEANING or MODES[mode].failing is not None
        wrong = []
        if not killed:
            first = next(call for call in run.calls if "(INJECTED)" in call.text)
            expected = 3 if any(path.startswith(str(self.source)) for path in first.paths) else 5
            expected = 128 + stopped if stopped else expected
            # A failed close of a source listing loses nothing, and the mode's own fault ends the run.
            own = () if MODES[mode].failing is None or stopped else (5,)
            if run.code not in (expected, 0, *own):
                wrong.append(f"exit code {run.code}, expected {expected}")
            if ill := output_problem(run.stderr, run.code):
                wrong.append(ill)
        found = contents(self.target)
        if run.code == 0 and found != self.clean:
            wrong.append("the target is not complete, although the exit code is 0")
        if found is None and overwrite and not killed and MODES[mode].killed is None:
            wrong.append("the target was taken away")
        fill, before_killed = MODES[mode].fill, killed or MODES[mode].killed is not None
        # Not complete, and not a checkpoint: the next run takes over the files.
        partial = fill and found is not None and "config.json" not in found and found.items() <= self.clean.items()
        whole = found in ({} if fill else None, OLD if overwrite else None, self.clean)
        if not whole and not (before_killed and partial):
            wrong.append(f"the target holds {sorted(found or ())}")
        recoverable = overwrite and found is None
        # A run that fails early keeps what another run left.
        left = set() if killed or MODES[mode].resume or (cleaning and not stopped) else leftovers(self.target) - before
        if left and not (before and left == {EMPTY}):
            wrong.append(f"{sorted(left)} left beside")
        if recoverable:
            # The next run restores it, even if it does nothing else.
            with suppress(OutputError):
                convert(self.source, self.target, max_shard_bytes=SHARD_BYTES)
            if contents(self.target) != OLD:
                wrong.append("the target's old content is lost")
        # After every other kill the next run resumes from the finished shards.
        self.kills += killed
        resume = killed and self.kills % 2 == 0
        return wrong + self.next_run(overwrite=overwrite or found == self.clean, resume=resume)

    def _commits(self, call: Call) -> bool:
        places = (str(self.target), str(self.target / "config.json"))
        return call.name.startswith("rename") and call.text.endswith("= 0") and call.paths[-1] in places

    def next_run(self, *, overwrite: bool, resume: bool) -> list[str]:
        wrong = []
        try:
            done = convert(self.source, self.target, overwrite=overwrite, resume=resume, max_shard_bytes=SHARD_BYTES)
            self.kept += len(done.kept)
        except Exception as error:  # noqa: BLE001 - reported with the others
            wrong.append(f"the next run: {type(error).__name__}: {error}")
        if contents(self.target) != self.clean:
            wrong.append("the next run did not complete it")
        if left := leftovers(self.target):
            wrong.append(f"the next run leaves {sorted(left)} beside")
        return wrong
