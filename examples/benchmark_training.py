"""Compare the speed of `t5g2 adapt` with transformers' Trainer and a plain loop, on one core, with the same batches.

    python examples/benchmark_training.py [270m] [--layers 4] [--length 512] [--steps 4] [--rounds 3]

The model has the shapes of the real one with fewer layers and seeded random weights; the text is source code. The order
of the batches is the one of `t5g2 adapt`, and all three make the same updates with AdamW, in float32 and without
recomputation. They take turns, each in a process of its own. A step's speed is encoder tokens and labels, without
padding, per second of processor time; the first step of each process is not counted. Printed are the median of each,
and the median over the rounds of the ratio to the fastest other. Trainer needs the package `accelerate`.
"""

import argparse
import inspect
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmark_sources import CONFIGS

LR = 1e-4


def main() -> None:
    """Measure, or with --role take one measurement."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", nargs="?", default="270m", choices=["tiny", "270m", "1b"])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--length", type=int, default=512, help="encoder tokens, and labels, of a sample at most")
    parser.add_argument("--steps", type=int, default=4, help="steps of a round; the first is not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--role", choices=list(ROLES), help=argparse.SUPPRESS)
    parser.add_argument(
        "--folder", type=Path, help="where the model is written, and left (default: a temporary folder)"
    )
    arguments = parser.parse_args()
    if arguments.role is not None:
        print(json.dumps(ROLES[arguments.role](arguments.folder, arguments.length, arguments.steps)))
        return
    with TemporaryDirectory() as temporary:
        compare(arguments, arguments.folder or Path(temporary))


def compare(arguments: argparse.Namespace, folder: Path) -> None:
    """Print the medians."""
    write_model(folder, arguments.size, arguments.layers)
    rounds = []
    for number in range(arguments.rounds):
        rounds.append({role: measure(role, folder, arguments) for role in ROLES})
        shown = ", ".join(f"{role} {speed:.1f}" for role, speed in rounds[-1].items())
        print(f"round {number + 1}: {shown} tokens a second", flush=True)
    for role in ROLES:
        ratios = [one[role] / max(speed for other, speed in one.items() if other != role) for one in rounds]
        median = statistics.median(one[role] for one in rounds)
        print(f"{role:>8} {median:8.1f} tokens a second, {statistics.median(ratios):.2f} of the fastest other")


def measure(role: str, folder: Path, arguments: argparse.Namespace) -> float:
    """Return a role's median speed, measured in a process of its own on one core."""
    command = [sys.executable, __file__, "--role", role, "--folder", str(folder)]
    command += ["--length", str(arguments.length), "--steps", str(arguments.steps)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return statistics.median(json.loads(done.stdout.splitlines()[-1])[1:])


def write_model(folder: Path, size: str, layers: int) -> None:
    """Write a converted model and packed text."""
    from t5g2convert import convert
    from t5g2convert.adaptation.data.documents import read_files
    from t5g2convert.adaptation.data.pack import pack
    from t5g2convert.cli.demo import build_demo_source
    from t5g2convert.mapping.library import find_map
    from t5g2convert.mapping.synthetic import write_synthetic_source

    demo, source = folder / "demo", folder / "source"
    build_demo_source(demo)
    source.mkdir()
    config = {**CONFIGS[size], "num_hidden_layers": layers, "sliding_window_pattern": 2}
    write_synthetic_source(source, find_map("gemma3").map, config, seed=0)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).write_bytes((demo / name).read_bytes())
    convert(source, folder / "model")
    for module in (argparse, inspect, subprocess):
        (folder / f"{module.__name__}.txt").write_text(inspect.getsource(module))
    pack(folder / "model", folder / "data", read_files(sorted(folder.glob("*.txt")), "text", lambda _: None))


def options(length: int, steps: int) -> dict[str, Any]:
    """Return the settings of the run: eight samples a step, one of each task and four of prefixes."""
    return {
        "encoder_length": length,
        "decoder_length": length,
        "batch_tokens": 8 * length,
        "steps": steps,
        "lr": LR,
        "warmup": 0,
        "precision": "float32",
    }


def adapt(folder: Path, length: int, steps: int) -> list[float]:
    """Train with `t5g2 adapt`, and return the tokens a second of each step."""
    from t5g2convert.adaptation.adapt import Request
    from t5g2convert.adaptation.adapt import adapt as run
    from t5g2convert.adaptation.options import AdaptOptions

    how = AdaptOptions(**options(length, steps), export=False, recompute="none", accelerator="cpu", save_minutes=1e6)
    ends = [(0, time.process_time())]
    with TemporaryDirectory() as out:
        request = Request(folder / "model", folder / "data", Path(out) / "run", how)
        run(request, begun=lambda _: None, report=lambda metrics: ends.append((metrics.tokens, time.process_time())))
    return [tokens / (end - start) for (_, start), (tokens, end) in pairwise(ends)]


def passes(folder: Path, length: int, steps: int) -> Iterator[tuple[dict[str, Any], bool]]:
    """Yield the batches of each pass as the class takes them, and whether a step ends with it."""
    from t5g2convert.adaptation.options import LoopConfig
    from t5g2convert.adaptation.train.preflight import prepare
    from t5g2convert.adaptation.train.settings import Settings

    samples = prepare(folder / "model", folder / "data", Settings(**options(length, steps))).samples
    for place in samples.order(LoopConfig(), rank=0, world=1):
        batch = samples[place]
        yield {name: tensor for name, tensor in batch.items() if name != "tasks"}, place.is_last


def tokens_of(batch: dict[str, Any]) -> int:
    """Return the encoder tokens and labels of a batch, without padding."""
    return int(batch["attention_mask"].sum() + (batch["labels"] >= 0).sum())


def load(folder: Path) -> Any:
    """Load the model as transformers does."""
    import torch
    from transformers import T5Gemma2ForConditionalGeneration

    return T5Gemma2ForConditionalGeneration.from_pretrained(folder / "model", dtype=torch.float32).train()


def plain(folder: Path, length: int, steps: int) -> list[float]:
    """Train with a loop as one writes it in torch, and return the tokens a second of each step."""
    import torch

    model = load(folder)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
    speeds, tokens, labels, began = [], 0, 0, time.process_time()
    for batch, is_last in passes(folder, length, steps):
        counted = int((batch["labels"] >= 0).sum())
        (model(**batch).loss * counted).backward()
        tokens, labels = tokens + tokens_of(batch), labels + counted
        if is_last:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.div_(labels)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            speeds.append(tokens / (time.process_time() - began))
            tokens, labels, began = 0, 0, time.process_time()
    return speeds


def trainer(folder: Path, length: int, steps: int) -> list[float]:
    """Train with transformers' Trainer, and return the tokens a second of each step."""
    return run_trainer(load(folder), list(passes(folder, length, steps)), steps)


def run_trainer(
    model: Any,
    batches: list[tuple[dict[str, Any], bool]],
    steps: int,
    *,
    bf16: bool = False,
) -> list[float]:
    """Train with Seq2SeqTrainer, which for a loss is Trainer, on given batches; return the speed of each step."""
    from torch.utils.data import IterableDataset
    from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, TrainerCallback

    a_step = [is_last for _, is_last in batches].index(True) + 1
    tokens = [sum(tokens_of(batch) for batch, _ in batches[at : at + a_step]) for at in range(0, len(batches), a_step)]
    ends = [time.process_time()]

    class InOrder(IterableDataset[dict[str, Any]]):
        def __iter__(self) -> Iterator[dict[str, Any]]:
            return (batch for batch, _ in batches)

    class Clock(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            ends[0] = time.process_time()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            ends.append(time.process_time())

    with TemporaryDirectory() as out:
        arguments = Seq2SeqTrainingArguments(
            out, max_steps=steps, per_device_train_batch_size=1, gradient_accumulation_steps=a_step, learning_rate=LR,
            adam_beta2=0.95, lr_scheduler_type="constant", optim="adamw_torch_fused", use_cpu=True, bf16=bf16,
            report_to=[], save_strategy="no", logging_strategy="no", disable_tqdm=True, remove_unused_columns=False,
        )  # fmt: skip
        Seq2SeqTrainer(
            model,
            arguments,
            train_dataset=InOrder(),
            data_collator=lambda rows: rows[0],
            callbacks=[Clock()],
        ).train()
    return [count / (end - start) for count, start, end in zip(tokens, ends, ends[1:], strict=False)]


ROLES: dict[str, Callable[[Path, int, int], list[float]]] = {"adapt": adapt, "trainer": trainer, "plain": plain}


if __name__ == "__main__":
    main()
