"""The cost of training at the three released sizes, for docs/adaptation.md: estimates from shapes alone."""

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from docs.generate.tables import table
from examples.benchmark_sources import CONFIGS
from t5g2convert import plan
from t5g2convert.adaptation.train.cost import memory, operations
from t5g2convert.adaptation.ul2.corruption import Frame, lengths, longest
from t5g2convert.adaptation.ul2.mixture import read_mixture
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2, read_t5gemma2
from t5g2convert.conversion.plan.types import Plan
from t5g2convert.mapping.library import find_map
from t5g2convert.mapping.synthetic import write_synthetic_source

BUDGETS: Final = (4096, 16_384)
"""The maximum number of encoder tokens, and of labels."""

DEVICES: Final = 8
CHUNK: Final = 1024
"""Labels whose logits exist at the same time: the default of `--loss-chunk`."""

GIGABYTE: Final = 1e9
PEAK: Final = 989e12
"""bfloat16 operations per second of an H100 SXM without sparsity, from its data sheet."""

SHARE: Final = 0.3
"""The share of the peak that training is assumed to reach."""


@cache
def cost_table() -> str:
    """Return one row for each size and budget."""
    head = (
        "size", "tokens in and out", "weights, gradients, moments", "held by one device", f"by each of {DEVICES}",
        "operations for 1B tokens", "device hours",
    )  # fmt: skip
    return table(head, _rows())


def _rows() -> Iterator[tuple[str, ...]]:
    frame = Frame(encoder_bos=2, encoder_eos=None, eos=1)
    tasks = read_mixture().tasks
    for size, made in _plans():
        model = read_t5gemma2(made.config, Path("config.json"))
        for budget in BUDGETS:
            samples = [
                (lengths(longest(task, frame, encoder=budget, decoder=budget), task, frame), task.weight)
                for task in tasks
            ]
            read = sum(weight * encoder for (encoder, _), weight in samples)
            work = sum(weight * _training(model, *sample) for sample, weight in samples) / read
            shared, alone = (_memory(made, model, devices, budget) for devices in (DEVICES, 1))
            yield (
                f"{size}-{size}", f"{budget:,}", _gigabytes(alone[0]), _gigabytes(alone[1]), _gigabytes(shared[1]),
                f"{work * 1e9:.1e}", f"{work * 1e9 / (PEAK * SHARE) / 3600:,.0f}",
            )  # fmt: skip


def _training(model: T5Gemma2, encoder: int, decoder: int) -> int:
    return operations(model, encoder=encoder, decoder=decoder).training


def _memory(made: Plan, model: T5Gemma2, devices: int, budget: int) -> tuple[int, int]:
    held = memory(model, made.parameters, devices=devices, encoder=budget, decoder=budget, chunk=CHUNK)
    return held.states, held.total


def _gigabytes(count: int) -> str:
    return f"{count / GIGABYTE:.1f} GB"


def _plans() -> Iterator[tuple[str, Plan]]:
    """Yield a plan for each size, from headers; the smaller ones get the tower of the largest, as in the releases."""
    with TemporaryDirectory() as name:
        folders = {size: Path(name) / size for size in ("4b", "270m", "1b")}
        for size, folder in folders.items():
            folder.mkdir()
            write_synthetic_source(folder, find_map("gemma3").map, CONFIGS[size], seed=None)
        for size in ("270m", "1b", "4b"):
            if size == "4b":
                yield size, plan(folders[size])
            else:
                yield size, plan(folders[size], vision_from=folders["4b"], rope_scaling="linear:8")
