"""The sources of the benchmarks: checkpoints of the real shapes with seeded random weights."""

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from t5g2convert.adaptation.ul2.dataset import UL2Dataset
    from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2

TEXT: dict[str, dict[str, Any]] = {
    "270m": {"hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "num_attention_heads": 4,
             "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "vocab_size": 262_144},
    "1b": {"hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26, "num_attention_heads": 4,
           "num_key_value_heads": 1, "head_dim": 256, "sliding_window": 512, "vocab_size": 262_144},
    "4b": {"hidden_size": 2560, "intermediate_size": 10_240, "num_hidden_layers": 34, "num_attention_heads": 8,
           "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 1024, "vocab_size": 262_208,
           "rope_scaling": {"factor": 8.0, "rope_type": "linear"}},
}  # fmt: skip
TEXT["27b"] = {**TEXT["4b"], "hidden_size": 5376, "intermediate_size": 21_504, "num_hidden_layers": 62,
               "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
    "image_size": 896, "patch_size": 14, "vision_use_head": False,
}  # fmt: skip
TINY: dict[str, Any] = {**TEXT["270m"], "hidden_size": 64, "intermediate_size": 128, "head_dim": 16, "vocab_size": 512}
CONFIGS: dict[str, dict[str, Any]] = {
    "tiny": {"model_type": "gemma3_text", **TINY},
    "270m": {"model_type": "gemma3_text", **TEXT["270m"]},
    "1b": {"model_type": "gemma3_text", **TEXT["1b"]},
    "4b": {"model_type": "gemma3", "text_config": TEXT["4b"], "vision_config": VISION},
    "27b": {"model_type": "gemma3", "text_config": TEXT["27b"], "vision_config": VISION},
    "tiny-vision": {
        "model_type": "gemma3",
        "text_config": {**TINY, "hidden_size": 96},
        "boi_token_index": 509,
        "eoi_token_index": 510,
        "image_token_index": 511,
        "mm_tokens_per_image": 4,
        "vision_config": {
            **VISION,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "image_size": 56,
        },
    },
}
DISK = {"tiny": 1e8, "tiny-vision": 1e8, "270m": 3e9, "1b": 12e9, "4b": 42e9, "27b": 1e6}
"""Bytes needed for a size: source, reference, and one output at a time."""


def run_apart(function: str, *arguments: str) -> None:
    """Run a function of this file in a separate process: a child's peak memory starts at its parent's."""
    command = f"import sys; from benchmark_sources import {function}; {function}(*sys.argv[1:])"
    subprocess.run([sys.executable, "-c", command, *arguments], check=True, cwd=Path(__file__).parent)


def make_source(size: str, folder: str, headers_only: str = "") -> None:
    """Write the source, with seeded random weights or without weights."""
    from t5g2convert.mapping.library import find_map
    from t5g2convert.mapping.synthetic import write_synthetic_source

    write_synthetic_source(Path(folder), find_map("gemma3").map, CONFIGS[size], seed=None if headers_only else 0)


def samples_of(shapes: "T5Gemma2", tokens: int, length: int, batch_tokens: int, steps: int) -> "UL2Dataset":
    """Return the samples of a corpus of which only the size is known."""
    from t5g2convert.adaptation.data.tokens import ModelTokens
    from t5g2convert.adaptation.train.settings import Settings
    from t5g2convert.adaptation.ul2.corruption import longest
    from t5g2convert.adaptation.ul2.dataset import UL2Dataset, frame_of
    from t5g2convert.adaptation.ul2.sampler import Sampler
    from t5g2convert.adaptation.ul2.texts import Chunks

    settings = Settings(encoder_length=length, decoder_length=length, batch_tokens=batch_tokens, steps=steps, lr=1e-4)
    ids = ModelTokens(
        262_144, bos=2, eos=1, pad=0, boi=255_999, eoi=256_000, image=256_001, per_image=256, pictures=True
    )
    frame = frame_of(settings, ids)
    raw = [longest(task, frame, encoder=length, decoder=length) for task in settings.mixture.tasks]
    nothing: Any = SimpleNamespace()
    sampler = Sampler(settings.mixture, raw, [Chunks(settings.mixture, raw, tokens, 0)], seed=0)
    return UL2Dataset(nothing, settings, ids, nothing, sampler, None, Path(), shapes)
