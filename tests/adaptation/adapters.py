"""Adapters of small models, made and saved by peft."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

from t5g2convert.adaptation.train.model import quiet_transformers


def load(model: Path, dtype: torch.dtype = torch.float32) -> Any:
    """Return a model as transformers' class."""
    return quiet_transformers().T5Gemma2ForConditionalGeneration.from_pretrained(model, dtype=dtype).eval()


def wrapped(
    model: Path, *, seed: int = 0, size: float = 0.05, dtype: torch.dtype = torch.float32, **config: Any
) -> Any:
    """Return a peft model with random matrices."""
    from peft import LoraConfig, get_peft_model

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = get_peft_model(load(model, dtype), LoraConfig(**{"r": 4, "lora_alpha": 8, **config}))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in peft.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=size, generator=generator)
    return peft


def write_adapter(model: Path, folder: Path, **config: Any) -> Path:
    """Save an adapter with random matrices."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped(model, **config).save_pretrained(folder)
    return folder
