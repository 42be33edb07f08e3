"""Twins: small seeded Gemma checkpoints of awkward shapes, written by transformers or in other tools' spellings.

Awkward: a depth that is not a multiple of the 5:1 pattern, an odd window, head_dim * heads other than the hidden size,
one and two key-value heads, a vocabulary with and without the rows of random fill.
"""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
)

SIGLIP: dict[str, Any] = {
    "model_type": "siglip_vision_model",
    "hidden_size": 20,
    "intermediate_size": 28,
    "num_hidden_layers": 3,
    "num_attention_heads": 5,
    "image_size": 56,
    "patch_size": 14,
    "vision_use_head": False,
}


@dataclass(frozen=True)
class Twin:
    """A source to write: text settings, vision settings if any, dtype and shard size."""

    name: str
    text: Mapping[str, Any]
    vision: Mapping[str, Any] | None = None
    tokens: Mapping[str, int] = field(default_factory=dict)
    dtype: torch.dtype = torch.bfloat16
    max_shard_size: str = "5GB"
    family: str = "gemma3"

    @property
    def vocab(self) -> int:
        """Return the number of rows of the source's table."""
        return int(self.text["vocab_size"])

    @property
    def has_eoi(self) -> bool:
        """Return whether the table has an end-of-image row."""
        return self.eoi < self.vocab

    @property
    def eoi(self) -> int:
        """Return the end-of-image token."""
        return self.tokens.get("eoi_token_index", 256_000)


def _text(**changes: Any) -> dict[str, Any]:
    return {
        "vocab_size": 300,
        "hidden_size": 24,
        "intermediate_size": 40,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 10,
        "query_pre_attn_scalar": 12,
        "sliding_window": 7,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,
        **changes,
    }


IN_VOCABULARY = {"boi_token_index": 290, "eoi_token_index": 291, "image_token_index": 292, "mm_tokens_per_image": 4}

LINEAR_8 = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}

TWINS = [
    Twin("text-8", _text()),
    Twin("text-13", _text(num_hidden_layers=13, num_key_value_heads=2, sliding_window=6, rope_parameters=LINEAR_8)),
    Twin("text-float32", _text(num_hidden_layers=7), dtype=torch.float32),
    Twin("text-float16", _text(num_hidden_layers=6), dtype=torch.float16),
    Twin("text-sharded", _text(), max_shard_size="20KB"),
    Twin("text-real-vocabulary", _text(vocab_size=262_144, hidden_size=8, num_hidden_layers=6)),
    Twin("text-with-fill", _text(vocab_size=262_208, hidden_size=8, num_hidden_layers=6)),
    Twin("images-8", _text(sliding_window=5), SIGLIP, IN_VOCABULARY),
    Twin(
        "images-13", _text(num_hidden_layers=13, num_key_value_heads=2, rope_parameters=LINEAR_8), SIGLIP, IN_VOCABULARY
    ),
    Twin("images-float32", _text(), SIGLIP, IN_VOCABULARY, dtype=torch.float32),
    Twin("images-sharded", _text(), SIGLIP, IN_VOCABULARY, max_shard_size="20KB"),
    Twin("images-with-head", _text(), {**SIGLIP, "vision_use_head": True}, IN_VOCABULARY),
    Twin(
        "images-with-fill",
        _text(vocab_size=262_208, hidden_size=8, num_hidden_layers=6),
        SIGLIP,
        {"mm_tokens_per_image": 4},
    ),
]

DONORS = [Twin("donor-wide", _text(hidden_size=32, num_hidden_layers=6), SIGLIP, IN_VOCABULARY)]
"""Models of another width than the text-only twins, to which they can give a vision tower."""


PARENTS = [
    # Same width and vocabulary as the others, everything else differs.
    Twin(
        "text-unlike-7",
        _text(
            num_hidden_layers=7,
            num_attention_heads=3,
            num_key_value_heads=3,
            head_dim=12,
            intermediate_size=56,
            query_pre_attn_scalar=20,
            sliding_window=9,
            max_position_embeddings=256,
            rms_norm_eps=1e-6,
            rope_parameters=LINEAR_8,
            final_logit_softcapping=3.0,
            eos_token_id=[1, 106],
        ),
    )
]
"""Models that can be the decoder's parent with another source."""


def write_aligned_source(source: Path, donor: Path, folder: Path) -> torch.Tensor:
    """Copy a text-only twin; its table is exactly the donor's times a matrix [donor width, width].

    Each column of the source's is one of the donor's times a power of two, so that nothing is rounded.
    """
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    table = load_file(donor / "model.safetensors")["language_model.model.embed_tokens.weight"]
    width = tensors["model.embed_tokens.weight"].shape[1]
    generator = torch.Generator().manual_seed(5)
    columns = torch.randperm(table.shape[1], generator=generator)[:width]
    matrix = torch.zeros(table.shape[1], width, dtype=torch.float64)
    matrix[columns, torch.arange(width)] = 2.0 ** torch.randint(-2, 3, (width,), generator=generator).double()
    tensors["model.embed_tokens.weight"] = (table.double() @ matrix).to(table.dtype)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return matrix


def _gemma2(name: str, *, dtype: torch.dtype = torch.bfloat16, max_shard_size: str = "5GB", **changes: Any) -> Twin:
    """Effective softcaps, odd depths, and windows shorter than all inputs."""
    text = _text(num_hidden_layers=5, sliding_window=5, attn_logit_softcapping=2.0, final_logit_softcapping=3.0)
    return Twin(name, {**text, **changes}, dtype=dtype, max_shard_size=max_shard_size, family="gemma2")


LINEAR_3 = {"rope_type": "linear", "rope_theta": 2e4, "factor": 3.0}

GEMMA2_TWINS = [
    _gemma2("gemma2-5"),
    _gemma2("gemma2-7-untied", num_hidden_layers=7, num_key_value_heads=2, sliding_window=6, tie_word_embeddings=False),
    _gemma2("gemma2-float32", dtype=torch.float32, num_key_value_heads=2, sliding_window=7, rope_parameters=LINEAR_3),
    _gemma2("gemma2-untied-float32", dtype=torch.float32, num_hidden_layers=3, tie_word_embeddings=False),
    _gemma2("gemma2-sharded", max_shard_size="20KB", final_logit_softcapping=None, attn_logit_softcapping=None),
]

BY_NAME: Mapping[str, Twin] = {twin.name: twin for twin in (*TWINS, *DONORS, *PARENTS, *GEMMA2_TWINS)}


def write_twin(twin: Twin, folder: Path) -> None:
    """Write a twin as transformers saves it; every parameter is random, norms included."""
    if twin.family == "gemma2":
        model = Gemma2ForCausalLM(Gemma2Config(**twin.text))
    elif twin.vision is None:
        model = Gemma3ForCausalLM(Gemma3TextConfig(**twin.text))
    else:
        model = Gemma3ForConditionalGeneration(
            Gemma3Config(text_config=dict(twin.text), vision_config=dict(twin.vision), **twin.tokens)
        )
    generator = torch.Generator().manual_seed(len(twin.name))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.25, generator=generator)
    model.to(twin.dtype).save_pretrained(folder, max_shard_size=twin.max_shard_size)


Tensors = dict[str, torch.Tensor]


def _renamed(old: str, new: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor for name, tensor in tensors.items()
    }


def _then(*steps: Callable[[Tensors], Tensors]) -> Callable[[Tensors], Tensors]:
    def run(tensors: Tensors) -> Tensors:
        for step in steps:
            tensors = step(tensors)
        return tensors

    return run


def _with_head(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {**tensors, name: tensors["language_model.model.embed_tokens.weight"].clone()}


_hub = _renamed("vision_tower.", "vision_tower.vision_model.")
_inside_model = _then(
    _renamed("multi_modal_projector.", "model.multi_modal_projector."), _renamed("vision_tower.", "model.vision_tower.")
)

IMAGE_SPELLINGS: dict[str, Callable[[Tensors], Tensors]] = {
    "hub": _hub,
    "transformers-5.6": lambda tensors: tensors,
    "transformers-5.4": _then(_hub, _inside_model, _renamed("language_model.", "model.language_model.")),
    "raw-state-dict": _then(
        _with_head("lm_head.weight"), _hub, _inside_model, _renamed("language_model.model.", "model.language_model.")
    ),
    "raw-state-dict-5": _then(
        _with_head("lm_head.weight"), _inside_model, _renamed("language_model.model.", "model.language_model.")
    ),
    "raw-state-dict-4.50": _then(_with_head("language_model.lm_head.weight"), _hub),
    "base-model": _renamed("language_model.model.", "language_model."),
}
"""How the tensors of a multimodal model are named in the wild (from the names that transformers 5.23 saves)."""

TEXT_SPELLINGS: dict[str, Callable[[Tensors], Tensors]] = {
    "published": lambda tensors: tensors,
    "bare": _renamed("model.", ""),
    "with-head": lambda tensors: {**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"].clone()},
}


def respell(source: Path, target: Path, spelling: Callable[[Tensors], Tensors]) -> None:
    """Copy a single-file checkpoint with its tensors renamed."""
    shutil.copytree(source, target)
    save_file(spelling(load_file(source / "model.safetensors")), target / "model.safetensors", {"format": "pt"})


def split_off(source: Path, target: Path, part: str) -> tuple[str, str]:
    """Copy a single-file checkpoint; move tensors with `part` in their name to a second file; return both names."""
    shutil.copytree(source, target)
    tensors = load_file(target / "model.safetensors")
    (target / "model.safetensors").unlink()
    names = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    index = {name: names[part in name] for name in tensors}
    for file in names:
        save_file({name: tensors[name] for name in tensors if index[name] == file}, target / file, {"format": "pt"})
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return names


def _old_rope(text: dict[str, Any]) -> None:
    full = text["rope_parameters"]["full_attention"]
    text["rope_theta"] = full["rope_theta"]
    text["rope_local_base_freq"] = text["rope_parameters"]["sliding_attention"]["rope_theta"]
    text["rope_scaling"] = {"factor": full["factor"], "rope_type": "linear"} if full["rope_type"] == "linear" else None


def _dialect_4_50(text: dict[str, Any]) -> None:
    _old_rope(text)
    text["sliding_window_pattern"] = 6
    for key in ("rope_parameters", "layer_types", "_sliding_window_pattern", "use_bidirectional_attention"):
        text.pop(key, None)


def _dialect_4_57(text: dict[str, Any]) -> None:
    _old_rope(text)
    text["_sliding_window_pattern"] = 6
    text.pop("rope_parameters")


DIALECTS: dict[str, Callable[[dict[str, Any]], None]] = {
    "4.50": _dialect_4_50,
    "4.57": _dialect_4_57,
    "both": _old_rope,
}
"""How older transformers write the text settings that 5.x writes."""


def rewrite_config(source: Path, target: Path, dialect: Callable[[dict[str, Any]], None]) -> None:
    """Copy a checkpoint with its config in another dialect."""
    shutil.copytree(source, target)
    config = json.loads((source / "config.json").read_text())
    dialect(config.get("text_config", config))
    config["torch_dtype"] = config.pop("dtype")
    (target / "config.json").write_text(json.dumps(config))
