"""Runs of `t5g2 adapt`, and the files they write."""

import argparse
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from t5g2convert.adaptation.adapt import Request
from t5g2convert.adaptation.adapt import adapt as adapt_here
from t5g2convert.adaptation.options import AdaptOptions
from t5g2convert.adaptation.run_request import Outcome
from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from t5g2convert.adaptation.train.metrics import Metrics
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.mixture import read_mixture
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


# Runs in this process


@contextmanager
def runs_in_this_process() -> Iterator[None]:
    """Restore the environment and destroy the process group at the end of the block."""
    before = dict(os.environ)
    try:
        yield
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def settings_of(**changes: Any) -> Settings:
    values = {
        "mixture": read_mixture(),
        "encoder_length": 64,
        "decoder_length": 64,
        "batch_tokens": 256,
        "steps": 4,
        "lr": 1e-3,
        "warmup": 2,
    }
    return Settings(**{**values, **changes})


def request_of(small: Path, run: Path, settings: Settings, **changes: Any) -> Request:
    how = {"micro_batch": 4, "save_every": 2, "keep": 2, "accelerator": "cpu", "devices": 1, "nodes": 1}
    defaults = {"export": False, "recompute": "none", "async_save": False}
    options = AdaptOptions(**{**dict(settings), **how, **defaults, **changes})
    return Request(small / "model", small / "data", run, options)


def changed(request: Request, **changes: Any) -> Request:
    return replace(request, options=request.options.replace(**changes))


def run(request: Request) -> tuple[Outcome, list[Metrics]]:
    steps: list[Metrics] = []
    return adapt_here(request, begun=lambda notes: None, report=steps.append), steps


def send(number: int, *, at: int) -> Callable[[Metrics], None]:
    """Return a report that sends this process a signal after a step."""
    return lambda metrics: os.kill(os.getpid(), number) if metrics.step == at else None
