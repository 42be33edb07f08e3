"""Small-scale ablations of T5Gemma 2: four variants of one parent and one with random weights, trained alike.

    python examples/tiny_parent/train.py PARENT
    python examples/ablation/run.py PARENT OUT [--steps 200]

PARENT, a small Gemma 3, is converted with the maps in examples/ablation/maps: `untied`, `tied`, `merged`, `full`. A
fifth model, `random`, is `merged` with random weights. All are trained as with `t5g2 adapt`, on the same samples of the
standard library's text, and evaluated on held-out documents. OUT becomes a folder with the runs, results.json, a table
and curves. An interrupted run resumes when it is started again.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any, Final

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from t5g2convert import convert, inspect
from t5g2convert.adaptation.adapt import Request, adapt
from t5g2convert.adaptation.data.documents import read_files
from t5g2convert.adaptation.data.pack import pack
from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.adaptation.options import AdaptOptions
from t5g2convert.adaptation.train.checkpoint_manifest import complete_checkpoints
from t5g2convert.adaptation.train.evaluation_log import Evaluation
from t5g2convert.adaptation.ul2.mixture import read_mixture

sys.path.append(str(Path(__file__).parent.parent))
from ablation.evaluation import evaluate
from ablation.model import load, register
from ablation.report import draw, table
from tiny_parent.corpus import write_corpus

MAPS: Final = Path(__file__).parent / "maps"
VARIANTS: Final = ("untied", "tied", "merged", "full")
RANDOM: Final = "random"
TRAINING, HELD_OUT = "training", "held-out"
FIRST, SECOND = 1, 2
"""Seeds of the random model: for its embedding table and encoder, and for its decoder."""


def main() -> None:
    """Convert, pack, train, evaluate and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", nargs="+", default=[*VARIANTS, RANDOM], choices=[*VARIANTS, RANDOM])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoints", type=int, default=5, help="evaluations of each model during training")
    parser.add_argument("--length", type=int, default=128, help="longest encoder input, and most labels")
    parser.add_argument("--batch", type=int, default=16, help="samples per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=256, help="held-out samples")
    parser.add_argument("--seed", type=int, default=0, help="seed of the order of the data and of the noise")
    parser.add_argument("--documents", type=int, default=None, help="number of documents to read (default: all)")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    register()
    make_models(arguments.parent, output)
    pack_corpus(output, arguments.documents)
    results = {name: train_and_evaluate(output, name, arguments) for name in arguments.models}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (output / "table.md").write_text(table(results))
    draw(results, output / "ablation.svg")
    print((output / "table.md").read_text())


def make_models(parent: Path, output: Path) -> None:
    """Convert the parent to the four variants, and two parents with random weights to a model with different stacks."""
    if (output / RANDOM).exists():  # it is written last
        return
    for name in VARIANTS:
        convert(parent, output / name, mapping=str(MAPS / f"{name}.yaml"), overwrite=True)
    for seed in (FIRST, SECOND):
        torch.manual_seed(seed)
        made = output / f"random-parent-{seed}"
        Gemma3ForCausalLM(Gemma3TextConfig.from_pretrained(parent)).save_pretrained(made)
        for path in parent.glob("tokenizer*"):
            shutil.copy(path, made)
    others = {"decoder_from": output / f"random-parent-{SECOND}", "mapping": str(MAPS / "merged.yaml")}
    convert(output / f"random-parent-{FIRST}", output / RANDOM, overwrite=True, **others)


def pack_corpus(output: Path, documents: int | None) -> None:
    """Pack the corpus once: all models have the same tokens."""
    if not (output / "corpus").exists():
        write_corpus(output / "corpus", documents)
    for part in (TRAINING, HELD_OUT):
        if (output / part).exists():
            continue
        source = output / f"corpus/{part}.jsonl"
        pack(output / "merged", output / part, read_files([source], "text", lambda _: None), sources=[source])


def train_and_evaluate(output: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one model; return its parameters by part, training losses, and held-out losses by step."""
    every = max(1, arguments.steps // arguments.checkpoints)
    options = AdaptOptions(
        mixture=read_mixture(),
        encoder_length=arguments.length,
        decoder_length=arguments.length,
        batch_tokens=arguments.batch * arguments.length,
        steps=arguments.steps,
        lr=arguments.lr,
        warmup=arguments.steps // 10,
        seed=arguments.seed,
        precision="float32",
        micro_batch=arguments.batch,
        save_every=every,
        keep=arguments.checkpoints + 1,
        recompute="none",
        resume=True,
        export=False,
    )
    run = output / f"run-{name}"
    request = Request(output / name, output / TRAINING, run, options)
    done = adapt(request, begun=lambda _: None, report=lambda _: None)
    held_out: dict[int, Evaluation] = {}
    for step, checkpoint in {0: None, **complete_checkpoints(run)}.items():
        found = evaluate(output / name, output / HELD_OUT, options, samples=arguments.samples, checkpoint=checkpoint)
        held_out[step] = found
        line = f"held-out loss {found.loss:.3f}, with the encoder hidden {found.hidden_loss:.3f}"
        print(f"{name}, step {step}: {line}", flush=True)
    return {
        "parameters": dict(inspect(output / name).parameters),
        "difference_from_parent": difference(arguments.parent, output, name) if name != RANDOM else None,
        "tokens_per_second": statistics.median(step.tokens_per_second for step in done.steps),
        "training": [step.loss for step in done.steps],
        "held_out": {str(step): to_json(found) for step, found in held_out.items()},
    }


@torch.no_grad()
def difference(parent: Path, output: Path, name: str) -> float:
    """Return the largest difference from the parent's logits on held-out text with the encoder hidden."""
    ids_BT = torch.from_numpy(Packed.open(output / HELD_OUT).read(0, 4 * 128).astype("int64")).view(4, 128)
    theirs = Gemma3ForCausalLM.from_pretrained(parent, attn_implementation="eager").eval()
    ours = load(output / name, kernel="eager")
    nothing = torch.zeros_like(ids_BT)
    states = ours.model(input_ids=ids_BT, attention_mask=nothing, decoder_input_ids=ids_BT).last_hidden_state
    return float((ours.lm_head(states) - theirs(input_ids=ids_BT).logits).abs().max())


def to_json(found: Evaluation) -> dict[str, Any]:
    """Return the entry of results.json for an evaluation."""
    return {
        "loss": found.loss,
        "hidden_loss": found.hidden_loss,
        "gain": found.gain,
        "tasks": dict(found.tasks),
        "hidden_tasks": dict(found.hidden),
    }


if __name__ == "__main__":
    main()
