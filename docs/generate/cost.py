"""The cost and speed of training at the three released sizes, for docs/adaptation.md: estimates from shapes alone."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

from docs.generate.tables import table
from examples.benchmark_sources import CONFIGS, samples_of
from t5g2convert import plan
from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.train.assumed_machine import H100, Machine, assumptions
from t5g2convert.adaptation.train.cost import memory, operations
from t5g2convert.adaptation.train.forecast import Throughput, simulate, throughput
from t5g2convert.adaptation.train.throughput import Pace
from t5g2convert.adaptation.ul2.corruption import Frame, lengths, longest
from t5g2convert.adaptation.ul2.dataset import UL2Dataset
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
FLEETS: Final = (1, 8, 16, 64)
BATCH_TOKENS: Final = 256 * 16_384
"""Encoder tokens of a step: the paper's, and the default."""

CORPUS: Final = 10**9
STEPS: Final = 4
"""Steps that are simulated; all have the same tasks."""

SAVE_EVERY: Final = 10_000


@cache
def cost_table() -> str:
    """Return the tables of memory and operations, and of the expected speed, and what the latter assumes."""
    memory_head = (
        "size", "tokens in and out", "weights, gradients, moments", "held by one device", f"by each of {DEVICES}",
        "operations for 1B tokens",
    )  # fmt: skip
    speed_head = (
        "size", "tokens in and out", *(f"tokens/s on {count} {H100.name}" for count in FLEETS),
        f"share of the peak of {DEVICES}", "where their time goes", "device hours for 1B tokens",
    )  # fmt: skip
    return (
        f"{table(memory_head, _rows())}\n{table(speed_head, _speeds())}\n"
        f"Assumed {assumptions(H100)}.\n\n{_sensitivity()}\n"
    )


def _speeds() -> Iterator[tuple[str, ...]]:
    for size, made in _plans():
        for budget in BUDGETS:
            found = {count: expected(made, budget, count) for count in FLEETS}
            eight = found[DEVICES]
            shares = {name: getattr(eight.seconds, name) / eight.step for name in ("products", "scores", "elements")}
            shares["rest"] = 1 - sum(shares.values())
            hours = DEVICES * eight.step / 3600 * 1e9 / _read(made, budget)
            yield (
                f"{size}-{size}", f"{budget:,}",
                *(_rounded(each.tokens_per_second) if each.fits else "too large" for each in found.values()),
                f"{eight.peak_share:.0%}", ", ".join(f"{title} {share:.0%}" for title, share in shares.items()),
                f"{hours:,.0f}",
            )  # fmt: skip


def expected(made: Plan, budget: int, devices: int, *, machine: Machine = H100) -> Throughput:
    """Return the expected speed of a size, with the paper's batch."""
    samples = _samples(made, budget)
    model = samples.shapes
    schedule = simulate(samples, devices=devices, loop=LoopConfig())
    held = memory(
        model, made.parameters, devices=devices, encoder=schedule.encoder, decoder=schedule.labels, chunk=CHUNK
    )
    pace = Pace(model, made.parameters, devices, machine)
    return throughput(schedule, pace, held, save_every=SAVE_EVERY)


def _samples(made: Plan, budget: int) -> UL2Dataset:
    model = read_t5gemma2(made.config, Path("config.json"))
    return samples_of(model, CORPUS, budget, BATCH_TOKENS, STEPS)


def _rounded(count: float) -> str:
    """Return a number with two digits: the estimate has no more."""
    return f"{float(f'{count:.2g}'):,.0f}"


def _read(made: Plan, budget: int) -> float:
    """Return the encoder tokens of a step, on average."""
    samples = _samples(made, budget)
    mixture = samples.settings.mixture
    block = sum(size.encoder * task.weight for size, task in zip(samples.text_sizes, mixture.tasks, strict=True))
    return samples.settings.samples * block / mixture.block


def _sensitivity() -> str:
    """Return how far the guesses move one of the figures."""
    made = dict(_plans())["1b"]
    base = expected(made, 4096, DEVICES).tokens_per_second
    changes = {
        "matrix products at 50% of the peak": replace(H100, product_share=0.5),
        "attention at 10%": replace(H100, score_share=0.1),
        "attention at 50%": replace(H100, score_share=0.5),
        "memory at 60%": replace(H100, memory_share=0.6),
        "links at 40%": replace(H100, link_share=0.4),
        "15 us to launch a kernel": replace(H100, launch=15e-6),
    }
    moved = (
        f"{name} {expected(made, 4096, DEVICES, machine=machine).tokens_per_second / base - 1:+.0%}"
        for name, machine in changes.items()
    )
    return f"With other guesses, the figure of 1b-1b at 4,096 on {DEVICES} devices changes: {', '.join(moved)}."


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
                f"{work * 1e9:.1e}",
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
