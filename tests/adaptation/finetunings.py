"""Runs of `t5g2 finetune`, and the pairs that they read."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from t5g2convert.adaptation.data.rows import PairRow
from t5g2convert.adaptation.finetune import FinetuneRequest, finetune
from t5g2convert.adaptation.finetune_options import FinetuneOptions
from t5g2convert.adaptation.run_request import Outcome
from t5g2convert.adaptation.train.metrics import Metrics
from tests.processes.forked import Preload, python

NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]

OPTIONS = ("--lr", "4e-3", "--batch-pairs", "7", "--warmup", "2", "--precision", "float32")


def pair_rows(pictures: Path) -> Iterator[PairRow]:
    """Yield 40 pairs: a number in digits, and in words; every fourth has a picture, and one of these two."""
    for number in range(40):
        images = (pictures / f"{number % 12}.png",) * (0 if number % 4 else 2 if number == 20 else 1)
        words = " ".join(NUMBERS[int(digit)] for digit in str(number))
        yield PairRow(f"pair {number}", f"The number {number}" * (1 + number % 3), words, images)


def command(small: Path, pairs: Path, run: Path, *options: str, module: str = "t5g2convert") -> list[str]:
    """Return a command line that fine-tunes the small model."""
    return [sys.executable, "-m", module, "finetune", str(small / "model"), str(pairs), str(run), *options]


def finetuned(small: Path, pairs: Path, run: Path, *options: str, code: int = 0, module: str = "t5g2convert") -> Any:
    """Fine-tune the small model in a separate process, and return the completed process."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    arguments = command(small, pairs, run, *options, module=module)[1:]
    done = python(arguments, preload=Preload.TRANSFORMERS, env=environment)
    assert done.returncode == code, done.stderr
    return done


def finetune_request(small: Path, pairs: Path, run: Path, **changes: Any) -> FinetuneRequest:
    values: dict[str, Any] = {"lr": 4e-3, "batch_pairs": 7, "steps": 4, "warmup": 2, "precision": "float32"}
    values |= {"accelerator": "cpu", "devices": 1, "nodes": 1, "export": False, "recompute": "none", "workers": 0}
    return FinetuneRequest(small / "model", pairs, run, FinetuneOptions(**{**values, "async_save": False, **changes}))


def finetune_here(request: FinetuneRequest) -> tuple[Outcome, list[Metrics]]:
    steps: list[Metrics] = []
    return finetune(request, begun=lambda notes, total: None, report=steps.append), steps
