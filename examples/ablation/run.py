"""The paper's ablations in the small: four forms of one parent, and one of random weights, trained alike.

    python examples/tiny_parent/train.py PARENT
    python examples/ablation/run.py PARENT OUT [--steps 200]

PARENT, a small Gemma 3, is converted by the four maps of mappings/ablation: `untied`, `tied`, `merged`, `full`. A fifth
model, `random`, has the form of `merged` and nobody's weights. All are trained by `t5g2 adapt` on the same samples
of the standard library's text, and judged on documents that none has seen. OUT becomes a folder with the runs,
results.json, a table and curves. Stopped and started again, it goes on.
"""

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any, Final

import torch
from report import draw, table
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from t5g2convert import convert, inspect
from t5g2convert.adaptation.adapt import Request, adapt
from t5g2convert.adaptation.data.documents import read_files
from t5g2convert.adaptation.data.pack import pack
from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.adaptation.research import load
from t5g2convert.adaptation.train.checkpoints import complete
from t5g2convert.adaptation.train.evaluation import Evaluation, evaluate
from t5g2convert.adaptation.train.loop import Pace
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.mixture import read_mixture

sys.path.append(str(Path(__file__).parent.parent / "tiny_parent"))
from corpus import write_corpus

FORMS: Final = ("untied", "tied", "merged", "full")
RANDOM: Final = "random"
TRAINING, HELD_OUT = "training", "held-out"
FIRST, SECOND = 1, 2
"""Seeds of the random model: of its embedding table and encoder, and of its decoder."""


def main() -> None:
    """Convert, pack, train, judge, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--models", nargs="+", default=[*FORMS, RANDOM], choices=[*FORMS, RANDOM])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--checkpoints", type=int, default=5, help="how often each model is judged while it is trained")
    parser.add_argument("--length", type=int, default=128, help="tokens of the encoder's input, and labels, at most")
    parser.add_argument("--batch", type=int, default=16, help="samples of a step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--samples", type=int, default=256, help="held-out samples")
    parser.add_argument("--seed", type=int, default=0, help="of the order of the data and of the noise")
    parser.add_argument("--documents", type=int, default=None, help="read the first so many documents (default: all)")
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    make_models(arguments.parent, output)
    pack_corpus(output, arguments.documents)
    results = {name: train_and_judge(output, name, arguments) for name in arguments.models}
    (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (output / "table.md").write_text(table(results))
    draw(results, output / "ablation.svg")
    print((output / "table.md").read_text())


def make_models(parent: Path, output: Path) -> None:
    """The four forms of the parent, and the one of random weights, whose stacks are not alike; the last to be made."""
    if (output / RANDOM).exists():
        return
    for name in FORMS:
        convert(parent, output / name, mapping=f"ablation-{name}", overwrite=True)
    for seed in (FIRST, SECOND):
        torch.manual_seed(seed)
        made = output / f"random-parent-{seed}"
        Gemma3ForCausalLM(Gemma3TextConfig.from_pretrained(parent)).save_pretrained(made)
        for path in parent.glob("tokenizer*"):
            shutil.copy(path, made)
    others = {"decoder_from": output / f"random-parent-{SECOND}", "mapping": "ablation-merged"}
    convert(output / f"random-parent-{FIRST}", output / RANDOM, overwrite=True, **others)


def pack_corpus(output: Path, documents: int | None) -> None:
    """The corpus as tokens, of which all models have the same."""
    if not (output / "corpus").exists():
        write_corpus(output / "corpus", documents)
    for part in (TRAINING, HELD_OUT):
        if (output / part).exists():
            continue
        source = output / f"corpus/{part}.jsonl"
        pack(output / "merged", output / part, read_files([source], "text", lambda _: None), sources=[source])


def train_and_judge(output: Path, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """One model: parameters by part, the losses of its training, and the held-out losses from start to end."""
    settings = Settings(
        mixture=read_mixture(),
        encoder_length=arguments.length,
        decoder_length=arguments.length,
        batch_tokens=arguments.batch * arguments.length,
        steps=arguments.steps,
        lr=arguments.lr,
        warmup=arguments.steps // 10,
        seed=arguments.seed,
        precision="float32",
    )
    every = max(1, arguments.steps // arguments.checkpoints)
    pace = Pace(micro=arguments.batch, save_every=every, keep=arguments.checkpoints + 1)
    run = output / f"run-{name}"
    # What `t5g2 adapt` does.
    request = Request(output / name, output / TRAINING, run, settings, pace=pace, resume=True)
    done = adapt(request, begun=lambda _: None, report=lambda _: None)
    held_out: dict[int, Evaluation] = {}
    for step, checkpoint in {0: None, **complete(run)}.items():
        found = evaluate(output / name, output / HELD_OUT, settings, samples=arguments.samples, checkpoint=checkpoint)
        held_out[step] = found
        told = f"held-out loss {found.loss:.3f}, with the encoder hidden {found.hidden_loss:.3f}"
        print(f"{name}, step {step}: {told}", flush=True)
    return {
        "parameters": dict(inspect(output / name).parameters),
        "difference_from_parent": difference(arguments.parent, output, name) if name != RANDOM else None,
        "tokens_per_second": statistics.median(step.tokens_per_second for step in done.steps),
        "training": [step.loss for step in done.steps],
        "held_out": {str(step): to_json(found) for step, found in held_out.items()},
    }


@torch.no_grad()
def difference(parent: Path, output: Path, name: str) -> float:
    """The largest difference of a model's logits, its encoder hidden, from the parent's, on held-out text."""
    ids_BT = torch.from_numpy(Packed.open(output / HELD_OUT).read(0, 4 * 128).astype("int64")).view(4, 128)
    theirs = Gemma3ForCausalLM.from_pretrained(parent, attn_implementation="eager").eval()
    ours = load(output / name, kernel="eager")
    nothing = torch.zeros_like(ids_BT)
    states = ours.model(input_ids=ids_BT, attention_mask=nothing, decoder_input_ids=ids_BT).last_hidden_state
    return float((ours.lm_head(states) - theirs(input_ids=ids_BT).logits).abs().max())


def to_json(found: Evaluation) -> dict[str, Any]:
    """What results.json keeps of an evaluation."""
    return {
        "loss": found.loss,
        "hidden_loss": found.hidden_loss,
        "gain": found.gain,
        "tasks": dict(found.tasks),
        "hidden_tasks": dict(found.hidden),
    }


if __name__ == "__main__":
    main()
