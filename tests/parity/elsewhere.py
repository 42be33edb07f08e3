"""A T5Gemma 2 trained and saved with plain transformers."""

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    T5Gemma2ForConditionalGeneration,
    T5Gemma2ForSequenceClassification,
    T5Gemma2Model,
)

from t5g2convert import convert
from t5g2convert.cli.demo import build_demo_source

ENCODER = "model.encoder."
DECODER = "model.decoder."
TOWER = "model.encoder.vision_tower.vision_model."
TABLE = "model.encoder.embed_tokens.weight"

CLASSES: Mapping[str, Any] = {
    "whole": T5Gemma2ForConditionalGeneration,
    "inner": T5Gemma2Model,
    "classifier": T5Gemma2ForSequenceClassification,
}

Tensors = dict[str, torch.Tensor]


def write_start(root: Path) -> Path:
    """Write the demo source and its conversion, the start of the training."""
    build_demo_source(root / "parent")
    convert(root / "parent", root / "start", flush=False)
    return root / "start"


def train(start: Path, folder: Path, *, kind: str = "whole", dtype: torch.dtype = torch.float32, **saving: Any) -> Path:
    """Train all parts but the vision tower for one step, and save the model with its tokenizer."""
    model = CLASSES[kind].from_pretrained(start, dtype=dtype)
    step(model)
    model.save_pretrained(folder, **saving)
    AutoTokenizer.from_pretrained(start).save_pretrained(folder)
    return folder


def step(model: Any) -> None:
    """Take one gradient step; a class without a loss minimizes its output."""
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_("vision_tower" not in name)
    ids = torch.randint(5, 200, (2, 9))
    made = model(input_ids=ids, attention_mask=torch.ones_like(ids), decoder_input_ids=ids.flip(1))
    state = made.last_hidden_state if "last_hidden_state" in made else made.logits
    state.float().square().mean().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None and parameter.grad.abs().max() > 0:
                # Scale each update to a hundredth of the parameter's norm.
                length = parameter.float().norm() / parameter.grad.float().norm()
                parameter -= (0.01 * length * parameter.grad.float()).to(parameter.dtype)


def change(folder: Path, edit: Callable[[Tensors], None]) -> None:
    """Change the tensors of an unsharded folder."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(
        {name: each.contiguous() for name, each in tensors.items()}, folder / "model.safetensors", {"format": "pt"}
    )


def rewrite(path: Path, edit: Callable[[Any], Any]) -> None:
    """Change a JSON file: ``edit` changes the document in place or returns a new one."""
    document = json.loads(path.read_text())
    path.write_text(json.dumps(edit(document) or document))


def copied(folder: Path, target: Path) -> Path:
    """Return a copy that the test may damage."""
    shutil.copytree(folder, target)
    return target


def names(tensors: Mapping[str, Any], prefix: str, *, without: str = "vision_tower") -> Iterator[str]:
    """Return the names with this prefix, without the tower's."""
    yield from (name for name in tensors if name.startswith(prefix) and without not in name)
