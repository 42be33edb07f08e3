"""Show what Trainer does to a T5Gemma 2 when it reads a checkpoint: in numbers, and against an uninterrupted run.

    python examples/compare_resumes.py MODEL [--steps 100] [--pairs 2000] [--lr 1e-3]

MODEL is fine-tuned on the pairs of dates.py with the settings of finetune_with_trainer.py, in float32. From the
checkpoint in the middle, the run is resumed by Trainer alone, and as finetune_with_trainer.py does it. A last run has
`load_best_model_at_end`; its best checkpoint is the one in the middle, because here the highest loss counts as best.

Printed are, after the checkpoint was read, how many trained tensors equal it; the loss of the next step; the held-out
loss at the end; and the largest difference of a weight, by part, from the uninterrupted run (in the last row from the
best checkpoint).
"""

import argparse
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import dates
import finetune_with_trainer as example
import torch
from torch import Tensor
from transformers import AutoTokenizer, PrinterCallback, TrainerCallback
from transformers.utils import logging

HELD_OUT = 200

PARTS = {"embedding": "embed_tokens", "encoder": "encoder.text_model.layers", "decoder": "decoder.layers"}
TEXT = ("encoder.text_model.layers", "encoder.text_model.norm", "decoder.")

Weights = dict[str, Tensor]


class Beginning(TrainerCallback):
    """Keeps the weights with which a training begins, after a checkpoint was read."""

    def __init__(self) -> None:
        self.weights: Weights = {}

    def on_train_begin(self, *_: Any, **given: Any) -> None:
        """Copy the weights."""
        self.weights = weights(given["model"])


class Run(NamedTuple):
    """The weights that a run began and ended with, the loss of each step, and the held-out loss at the end."""

    began: Weights
    ended: Weights
    losses: dict[int, float]
    held_out: float


def main() -> None:
    """Train in every way, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--pairs", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--lr", type=float, default=1e-3)
    chosen = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with TemporaryDirectory() as folder:
        compare(chosen, Path(folder))


def compare(chosen: argparse.Namespace, folder: Path) -> None:
    """Run all four, and print their rows."""
    dates.make(folder, chosen.pairs, HELD_OUT, seed=0)
    start, next_step = chosen.model, chosen.steps // 2 + 1
    middle = str(folder / "uninterrupted" / f"checkpoint-{chosen.steps // 2}")
    row("", "equal", f"step {next_step}", "held-out", *PARTS)

    def show(name: str, run: Run, other: Weights, equal: str) -> None:
        differences = (f"{largest_difference(run.ended, other, part):.1e}" for part in PARTS.values())
        row(name, equal, f"{run.losses[next_step]:.4f}", f"{run.held_out:.4f}", *differences)

    whole = train(chosen, folder, example.load(start, None, None), "uninterrupted")
    show("uninterrupted", whole, whole.ended, "")
    saved = weights(example.load(start, middle, None))
    for name, begins_from in (("resumed by Trainer alone", None), ("resumed as in the example", middle)):
        run = train(chosen, folder, example.load(start, begins_from, None), name, middle)
        show(name, run, whole.ended, equal_tensors(run.began, saved))
    best = {"load_best_model_at_end": True, "greater_is_better": True}
    run = train(chosen, folder, example.load(start, None, None), "best", **best)
    show("load_best_model_at_end", run, saved, equal_tensors(run.ended, saved))
    run = train(chosen, folder, example.load(start, middle, None), "last", middle, max_steps=chosen.steps // 2)
    print(f"held-out loss of the checkpoint in the middle: {run.held_out:.4f}")


def train(
    chosen: argparse.Namespace, folder: Path, model: Any, name: str, last: str | None = None, **changed: Any
) -> Run:
    """Train a model, from a checkpoint if there is one."""
    rest = argparse.Namespace(out=folder / name, every=chosen.steps // 2, accumulate=1, bf16=False)
    arguments = example.settings(argparse.Namespace(**vars(chosen), **vars(rest)))
    for setting, value in ({"logging_steps": 1, "disable_tqdm": True} | changed).items():
        setattr(arguments, setting, value)
    tokenizer = AutoTokenizer.from_pretrained(chosen.model)
    pairs = (example.read(folder / part, tokenizer) for part in (dates.TRAIN, dates.HELD_OUT))
    beginning = Beginning()
    trainer = example.make_trainer(model, tokenizer, *pairs, arguments, [beginning])
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint=last)
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    return Run(beginning.weights, weights(model), losses, trainer.evaluate()["eval_loss"])


def weights(model: Any) -> Weights:
    """Return a copy of the weights that pairs of texts train."""
    return {
        name: parameter.detach().clone()
        for name, parameter in model.named_parameters()
        if name.endswith("embed_tokens.weight") or any(part in name for part in TEXT)
    }


def equal_tensors(found: Weights, expected: Weights) -> str:
    """Return how many tensors are equal, of how many."""
    return f"{sum(torch.equal(found[name], expected[name]) for name in expected)} of {len(expected)}"


def largest_difference(found: Weights, expected: Weights, part: str) -> float:
    """Return the largest absolute difference of a weight of a part."""
    return max(float((found[name] - expected[name]).abs().max()) for name in expected if part in name)


def row(name: str, *cells: str) -> None:
    """Print a row of the table."""
    print(f"{name:26}", *(f"{cell:>11}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()
