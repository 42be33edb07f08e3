"""Folders of training runs as `t5g2 adapt` writes them, made without training from plain dicts."""

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing
from safetensors.torch import load_file
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from t5g2convert.adaptation.data.corpora import Corpora, Corpus
from t5g2convert.adaptation.data.packed import Packed
from t5g2convert.adaptation.train.history import identity
from t5g2convert.adaptation.train.metrics import Metrics
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.mixture import read_mixture
from t5g2convert.checkpoint.file_store import sha256_of

Tensors = Mapping[str, torch.Tensor]

SETTINGS = Settings(mixture=read_mixture(), encoder_length=64, decoder_length=64, steps=200, batch_tokens=512, lr=1e-3)
DATA = "c" * 64
CORPORA = Corpora([Corpus("packed", cast(Packed, SimpleNamespace(sha256=DATA)))])

FACTS: dict[str, Any] = {
    "steps": 100,
    "checkpoints": [100],
    "tokens": 51_200,
    "settings": SETTINGS.to_json(),
    "settings_sha256": SETTINGS.sha256,
    "data_sha256": DATA,
}


SHARD = "shard-00001-model-00001-of-00001.safetensors"
"""The file of a checkpoint that one process wrote."""


def write_checkpoint(folder: Path, tensors: Tensors, step: int, **changes: Any) -> Path:
    """Write a checkpoint as one process does."""
    tree = {"model": {name: tensor.contiguous() for name, tensor in tensors.items()}}
    tree["optimizer"] = {
        name: {
            "exp_avg": torch.zeros_like(tensor),
            "exp_avg_sq": torch.zeros_like(tensor),
            "step": torch.tensor(3.0),
        }
        for name, tensor in [*tree["model"].items()][:2]
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp.save(tree, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True), no_dist=True)
    return write_manifest(folder, step, **changes)


def write_manifest(folder: Path, step: int, **changes: Any) -> Path:
    """Write a checkpoint.json that fits the files of a folder."""
    files = {path.name: sha256_of(path) for path in sorted(folder.iterdir()) if path.name != "checkpoint.json"}
    document = {"format": 2, "step": step, "files": files}
    document |= {"settings_sha256": SETTINGS.sha256, "objective_sha256": SETTINGS.objective_sha256}
    document |= changes
    (folder / "checkpoint.json").write_text(json.dumps(document))
    return folder


def write_by_two(folder: Path, tensors: Tensors, step: int) -> Path:
    """Write a checkpoint as two processes do with FSDP2: each writes the rows that it holds."""
    folder.mkdir(parents=True)
    torch.multiprocessing.spawn(_save, (folder, dict(tensors)), nprocs=2)  # type: ignore[no-untyped-call]
    return write_manifest(folder, step)


def _save(rank: int, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    meeting = folder.with_name(f".{folder.name}.meeting")
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        sharded = {name: distribute_tensor(tensor.contiguous(), mesh, [Shard(0)]) for name, tensor in tensors.items()}
        dcp.save({"model": sharded}, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))
    finally:
        dist.destroy_process_group()


def trained_from(model: Path, which: Callable[[str], bool], *, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return float32 values for some tensors of a model, all different from the model's."""
    generator = torch.Generator().manual_seed(seed)
    stored: dict[str, torch.Tensor] = {}
    for file in sorted(model.glob("*.safetensors")):
        stored |= load_file(file)
    return {
        name: tensor.float() + 0.05 * torch.randn(tensor.shape, generator=generator)
        for name, tensor in sorted(stored.items())
        if which(name)
    }


def text_only(name: str) -> bool:
    """Return whether a run without images trains a tensor."""
    return "vision_tower" not in name and "multi_modal_projector" not in name


def write_run(folder: Path, model: Path, steps: int) -> None:
    """Write the run.json and metrics.jsonl of a run with 512 tokens a step."""
    document = {
        "format": 3,
        "settings": SETTINGS.to_json(),
        "settings_sha256": SETTINGS.sha256,
        "objective_sha256": SETTINGS.objective_sha256,
        "model": identity(model),
        "model_folder": str(model),
        "data": DATA,
        "corpora": CORPORA.to_json(),
        "versions": {},
    }
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps(document))
    lines = (
        json.dumps(asdict(Metrics(step, "text", 1.5, {"r": 1.5}, {"r": 100}, 1.0, 1e-3, 512, 1e4)))
        for step in range(1, steps + 1)
    )
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
