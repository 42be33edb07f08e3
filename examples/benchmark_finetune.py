"""Compare the speed of `t5g2 finetune` with transformers' Seq2SeqTrainer, on one core, with the same batches.

    python examples/benchmark_finetune.py [270m] [--layers 4] [--length 256] [--pairs 8] [--steps 4] [--rounds 3]

The model has the shapes of the real one with fewer layers and seeded random weights; the pairs are pieces of source
code, of a quarter to the whole of `--length` tokens. The batches are those of `t5g2 finetune`; both make the same
updates with AdamW, with float32 weights and without recomputation, and compute in float32, or with
`--precision bfloat16` in bfloat16 (Trainer by autocast). They take turns, each in a process of its own. A step's speed
is encoder tokens and labels, without padding, per second of processor time; the first step of each process is not
counted. Printed are the median of each, and the median over the rounds of the ratio of the two.
"""

import argparse
import inspect
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import benchmark_training as training

ROUGHLY = 3
"""Characters of source code per token."""


def main() -> None:
    """Measure, or with --role take one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", default="270m", choices=["tiny", "270m", "1b"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=256, help="tokens of an input and of a target, roughly, at most")
    parser.add_argument("--pairs", type=int, default=8, help="pairs of a step")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", default="float32", choices=["float32", "bfloat16"])
    parser.add_argument("--role", choices=list(ROLES), help=argparse.SUPPRESS)
    parser.add_argument(
        "--folder", type=Path, help="where the model is written, and left (default: a temporary folder)"
    )
    arguments = parser.parse_args()
    if arguments.role is not None:
        print(json.dumps(ROLES[arguments.role](arguments)))
        return
    with TemporaryDirectory() as temporary:
        arguments.folder = arguments.folder or Path(temporary)
        compare(arguments)


def compare(arguments: argparse.Namespace) -> None:
    """Print the medians."""
    training.write_model(arguments.folder, arguments.size, arguments.layers)
    write_pairs(arguments)
    rounds = []
    for number in range(arguments.rounds):
        rounds.append({role: measure(role, arguments) for role in ROLES})
        shown = ", ".join(f"{role} {speed:.1f}" for role, speed in rounds[-1].items())
        print(f"round {number + 1}: {shown} tokens a second", flush=True)
    for role in ROLES:
        print(f"{role:>8} {statistics.median(one[role] for one in rounds):8.1f} tokens a second")
    ratio = statistics.median(one["finetune"] / one["trainer"] for one in rounds)
    print(f"finetune is {ratio:.2f} times as fast ({arguments.precision})")


def measure(role: str, arguments: argparse.Namespace) -> float:
    """Return a role's median speed, measured in a process of its own on one core."""
    command = [sys.executable, __file__, "--role", role]
    for name in ("folder", "pairs", "steps", "precision"):
        command += [f"--{name}", str(getattr(arguments, name))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return statistics.median(json.loads(done.stdout.splitlines()[-1])[1:])


def write_pairs(arguments: argparse.Namespace) -> None:
    """Pack pairs of pieces of source code."""
    text = "".join(inspect.getsource(module) for module in (argparse, inspect, subprocess))
    chosen = random.Random(0)

    def piece() -> str:
        at = chosen.randrange(len(text) - ROUGHLY * arguments.length)
        return text[at : at + chosen.randint(ROUGHLY * arguments.length // 4, ROUGHLY * arguments.length)]

    rows = [{"input": piece(), "target": piece()} for _ in range(arguments.pairs * arguments.steps)]
    folder: Path = arguments.folder
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = [sys.executable, "-m", "t5g2convert", "pack", folder / "model", folder / "pairs", folder / "pairs.jsonl"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def options(arguments: argparse.Namespace) -> Any:
    """Return the options of the run: one pass a step, so that Trainer can make the same."""
    from t5g2convert.adaptation.finetune_options import FinetuneOptions

    return FinetuneOptions(
        batch_pairs=arguments.pairs, steps=arguments.steps, lr=training.LR, lr_floor=1.0, warmup=0,
        precision=arguments.precision, micro_tokens=1 << 20, micro_batch=arguments.pairs, export=False,
        recompute="none", accelerator="cpu", save_minutes=1e6,
    )  # fmt: skip


def finetune(arguments: argparse.Namespace) -> list[float]:
    """Train with `t5g2 finetune`, and return the tokens a second of each step."""
    from t5g2convert.adaptation.finetune import FinetuneRequest
    from t5g2convert.adaptation.finetune import finetune as run

    ends = [(0, time.process_time())]
    with TemporaryDirectory() as out:
        folder: Path = arguments.folder
        request = FinetuneRequest(folder / "model", folder / "pairs", Path(out) / "run", options(arguments))
        run(request, begun=lambda *_: None, report=lambda metrics: ends.append((metrics.tokens, time.process_time())))
    return [tokens / (end - start) for (_, start), (tokens, end) in pairwise(ends)]


def trainer(arguments: argparse.Namespace) -> list[float]:
    """Train with Seq2SeqTrainer, and return the tokens a second of each step."""
    from t5g2convert.adaptation.pairs.preflight import prepare_pairs

    how = options(arguments)
    samples = prepare_pairs(arguments.folder / "model", arguments.folder / "pairs", how, epochs=None).samples
    passes = [(samples[place], place.is_last) for place in samples.order(how, rank=0, world=1)]
    batches = [({name: batch[name] for name in batch if name != "tasks"}, is_last) for batch, is_last in passes]
    model, bf16 = training.load(arguments.folder), arguments.precision == "bfloat16"
    return training.run_trainer(model, batches, arguments.steps, bf16=bf16)


ROLES: dict[str, Callable[[argparse.Namespace], list[float]]] = {"finetune": finetune, "trainer": trainer}


if __name__ == "__main__":
    main()
