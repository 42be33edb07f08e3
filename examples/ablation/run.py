"""Ablations of T5Gemma 2 in the small: models that start or learn differently, from one parent, on the same samples.

    python examples/tiny_parent/train.py PARENT
    python examples/ablation/run.py PARENT OUT [--study layout] [--seeds 0 1 2] [--steps 200]

Three studies can be made of PARENT, a text-only Gemma 3 of any size. `layout` converts it with the maps in
examples/ablation/maps, `untied`, `tied`, `merged` and `full`, and `random` is `merged` with random weights; `objective`
trains one conversion with UL2, UL2 with distillation, and a prefix language model with distillation, PARENT being the
teacher; `start` changes what a conversion starts with, or trains first. All are trained as with `t5g2 adapt` on the
text of the standard library, and evaluated on held-out documents as they learn. OUT becomes a folder with the runs,
results.json, a table and curves. An interrupted study resumes when it is started again, also with more seeds.
"""

import argparse
import json
import shutil
import statistics
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig
from transformers import T5Gemma2ForConditionalGeneration as T5Gemma2

from t5g2convert import convert, inspect
from t5g2convert.adaptation.adapt import Request, adapt
from t5g2convert.adaptation.data.documents import read_files
from t5g2convert.adaptation.data.pack import pack
from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.adaptation.options import AdaptOptions
from t5g2convert.adaptation.train.evaluation_log import read_evaluations
from t5g2convert.adaptation.train.run_folder import EVALUATION_FILE
from t5g2convert.adaptation.ul2.mixture import read_mixture

sys.path.append(str(Path(__file__).parent.parent))
from ablation.config import MODEL_TYPE
from ablation.model import load, register
from ablation.report import draw, table
from tiny_parent.corpus import write_corpus

MAPS: Final = Path(__file__).parent / "maps"
RANDOM: Final = "random"
TRAINING, HELD_OUT = "training", "held-out"
FIRST, SECOND = 1, 2
"""Seeds of the random model: for its embedding table and encoder, and for its decoder."""


STUDIES: Final = ("layout", "objective", "start")


@dataclass(frozen=True, slots=True)
class Variant:
    """A model of a study: the options of its conversion, and what its training has in other settings."""

    conversion: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def variants(study: str, parent: Path, steps: int) -> dict[str, Variant]:
    """Return the models of a study by name."""
    if study == "layout":
        maps = {name: Variant({"mapping": str(MAPS / f"{name}.yaml")}) for name in ("untied", "tied", "merged", "full")}
        return {**maps, RANDOM: Variant()}
    if study == "objective":
        mixture = read_mixture()
        prefix = mixture.model_copy(update={"tasks": tuple(task for task in mixture.tasks if task.kind == "prefix")})
        return {
            "ul2": Variant(),
            "ul2-kd": Variant(settings={"kd": parent}),
            "prefix-kd": Variant(settings={"kd": parent, "mixture": prefix}),
        }
    layers = Gemma3TextConfig.from_pretrained(parent).num_hidden_layers
    half = layers // 2
    return {
        "keep": Variant(),
        "norm-unit": Variant({"encoder_norm": "unit"}),
        "norm-0.1": Variant({"encoder_norm": "0.1"}),
        "frozen-decoder": Variant(settings={"freeze_until": max(1, steps // 3), "trainable": ("model.encoder.*",)}),
        # Full attention is in layers 5, 11, 17, ...: of every other layer, those from 1 keep them.
        "every-other-layer": Variant({"decoder_layers": f"1:{layers}:2"}),
        "first-half": Variant({"decoder_layers": f"first:{half}"}),
        "last-half": Variant({"decoder_layers": f"{layers - half}:{layers}"}),
    }


def main() -> None:
    """Convert, pack, train, evaluate and report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parent", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--study", default="layout", choices=STUDIES)
    parser.add_argument("--models", nargs="+", help="models of the study (default: all)")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0], help="seeds of the order and the noise")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--evaluations", type=int, default=5, help="evaluations of each model during training")
    parser.add_argument("--length", type=int, default=128, help="longest encoder input, and most labels")
    parser.add_argument("--batch", type=int, default=16, help="samples per step")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--precision", default="float32", choices=["bfloat16", "float32"])
    parser.add_argument("--samples", type=int, default=256, help="held-out samples")
    parser.add_argument("--documents", type=int, default=None, help="number of documents to read (default: all)")
    chosen = parser.parse_args()
    output: Path = chosen.output
    study = variants(chosen.study, chosen.parent, chosen.steps)
    if unknown := set(chosen.models or ()) - set(study):
        parser.error(f"--study {chosen.study} has no {', '.join(sorted(unknown))}, only {', '.join(study)}")
    output.mkdir(parents=True, exist_ok=True)
    register()
    for name in chosen.models or study:
        make_model(chosen.parent, output, name, study[name])
        pack_corpus(output, name, chosen.documents)
    results: dict[str, Any] = {}
    for seed in chosen.seeds:
        for name in chosen.models or study:
            results.setdefault(name, described(chosen.parent, output, name))["runs"][str(seed)] = train(
                output, name, study[name], chosen, seed
            )
            # After each run, so that an interrupted study can be read.
            (output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (output / "table.md").write_text(table(results))
    draw(results, output / "ablation.svg")
    print((output / "table.md").read_text())


def make_model(parent: Path, output: Path, name: str, variant: Variant) -> None:
    """Convert the parent, or two parents with random weights to a model with different stacks, unless that was done."""
    if (output / name).exists():
        return
    if name != RANDOM:
        convert(parent, output / name, **variant.conversion)
        return
    for seed in (FIRST, SECOND):
        torch.manual_seed(seed)
        made = output / f"random-parent-{seed}"
        Gemma3ForCausalLM(Gemma3TextConfig.from_pretrained(parent)).save_pretrained(made)
        for path in parent.glob("tokenizer*"):
            shutil.copy(path, made)
    others = {"decoder_from": output / f"random-parent-{SECOND}", "mapping": str(MAPS / "merged.yaml")}
    convert(output / f"random-parent-{FIRST}", output / name, **others)


def pack_corpus(output: Path, name: str, documents: int | None) -> None:
    """Pack the corpus once, with the tokenizer of a model: all models have the same tokens."""
    if not (output / "corpus").exists():
        write_corpus(output / "corpus", documents)
    for part in (TRAINING, HELD_OUT):
        if not (output / part).exists():
            source = output / f"corpus/{part}.jsonl"
            pack(output / name, output / part, read_files([source], "text", lambda _: None), sources=[source])


def described(parent: Path, output: Path, name: str) -> dict[str, Any]:
    """Return what results.json says of a model before its runs."""
    return {
        "parameters": dict(inspect(output / name).parameters),
        "difference_from_parent": difference(parent, output, name) if name != RANDOM else None,
        "runs": {},
    }


def train(output: Path, name: str, variant: Variant, chosen: argparse.Namespace, seed: int) -> dict[str, Any]:
    """Train a model; return its training losses, and its held-out losses by step."""
    settings = {
        "mixture": read_mixture(),
        "encoder_length": chosen.length,
        "decoder_length": chosen.length,
        "batch_tokens": chosen.batch * chosen.length,
        "steps": chosen.steps,
        "lr": chosen.lr,
        "warmup": chosen.steps // 10,
        "seed": seed,
        "precision": chosen.precision,
        "micro_batch": chosen.batch,
        "eval": output / HELD_OUT,
        "eval_every": max(1, chosen.steps // chosen.evaluations),
        "eval_samples": chosen.samples,
        "save_every": chosen.steps,
        "save_minutes": 10.0,
        "keep": 1,
        "recompute": "none",
        "resume": True,
        "export": False,
    }
    options = AdaptOptions(**{**settings, **variant.settings})
    run = output / f"run-{name}-{seed}"
    request = Request(output / name, output / TRAINING, run, options)
    done = adapt(request, begun=lambda _: None, report=lambda _: None)
    held_out = read_evaluations(run / EVALUATION_FILE)
    print(f"{name}, seed {seed}: {held_out[-1].line}", flush=True)
    return {
        "tokens_per_second": statistics.median(step.tokens_per_second for step in done.steps),
        "training": [step.loss for step in done.steps],
        "held_out": {
            str(found.step): {
                "loss": found.loss,
                "hidden_loss": found.hidden_loss,
                "gain": found.gain,
                "tasks": dict(found.tasks),
                "hidden_tasks": dict(found.hidden),
            }
            for found in held_out
        },
    }


@torch.no_grad()
def difference(parent: Path, output: Path, name: str) -> float:
    """Return the largest difference from the parent's logits on held-out text with the encoder hidden."""
    ids_BT = torch.from_numpy(Packed.open(output / HELD_OUT).read(0, 4 * 128).astype("int64")).view(4, 128)
    alike = {"dtype": torch.float32, "attn_implementation": "eager"}
    theirs = Gemma3ForCausalLM.from_pretrained(parent, **alike).eval()
    of_research = json.loads((output / name / "config.json").read_text())["model_type"] == MODEL_TYPE
    ours = load(output / name, kernel="eager") if of_research else T5Gemma2.from_pretrained(output / name, **alike)
    nothing = torch.zeros_like(ids_BT)
    states = ours.model(input_ids=ids_BT, attention_mask=nothing, decoder_input_ids=ids_BT).last_hidden_state
    return float((ours.lm_head(states) - theirs(input_ids=ids_BT).logits).abs().max())


if __name__ == "__main__":
    main()
