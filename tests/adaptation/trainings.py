"""Runs of `t5g2 adapt`, and the files they write."""

import argparse
import inspect
import json
import os
import sys
from pathlib import Path
from typing import Any

from torch import Tensor

from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from tests.processes.forked import Preload, python

OPTIONS = (
    "--lr", "4e-3", "--steps", "60", "--encoder-length", "64", "--decoder-length", "64", "--batch-tokens", "512",
    "--warmup", "5", "--image-every", "4", "--precision", "float32",
)  # fmt: skip
"""Settings of the run that tests share: 8 samples a step."""

RUN_OPTIONS = (*OPTIONS, "--save-every", "20", "--keep", "3")

TASKS = {"spans-3-15", "spans-12-50", "spans-32-15", "spans-32-50", "prefix"}


def command(small: Path, run: Path, *options: str, module: str = "t5g2convert") -> list[str]:
    """Return a command line that trains the small model."""
    return [sys.executable, "-m", module, "adapt", str(small / "model"), str(small / "data"), str(run), *options]


def adapt(small: Path, run: Path, *options: str, code: int = 0, module: str = "t5g2convert") -> Any:
    """Train the small model in a separate process, and return the completed process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = python(command(small, run, *options, module=module)[1:], preload=Preload.TRANSFORMERS, env=environment)
    assert done.returncode == code, done.stderr
    return done


def write_text(folder: Path) -> None:
    """Write real text that every machine has: the source of two modules of the standard library."""
    for module in (argparse, inspect):
        (folder / f"{module.__name__}.txt").write_text(inspect.getsource(module))


def steps_of(run: Path) -> list[dict[str, Any]]:
    """Return the log of a run without its timings."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step in steps:
        del step["tokens_per_second"]
    return steps


def tensors_of(run: Path, step: int) -> dict[str, Tensor]:
    """Return the trained tensors of a checkpoint."""
    checkpoint = CheckpointReader(run / "checkpoints" / f"step-{step:08d}")
    return {name: checkpoint.read(name) for name in checkpoint.names}
