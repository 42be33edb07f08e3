"""The external judge of extracted parts: transformers loads the T5Gemma 2, its parts and the source.

It knows nothing of t5g2convert, and runs as a script too, so that other versions of transformers can judge:

    python tests/interop/judge_extracts.py WHOLE ENCODER DECODER SOURCE DTYPE
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModel, Gemma3ForCausalLM, Gemma3ForConditionalGeneration, T5Gemma2ForConditionalGeneration
from transformers.models.t5gemma2.modeling_t5gemma2 import T5Gemma2Encoder

LENGTH = 30
"""Tokens of an input, more than every twin's sliding window."""


@dataclass(frozen=True)
class ExtractJudgement:
    """Largest absolute differences (None without images), and the complaints of loading.

    The encoder and its image features are compared with the whole model's, the decoder with the Gemma 3 that the whole
    was made of.
    """

    complaints: list[str]
    encoder: float
    encoder_vision: float | None
    decoder: float
    decoder_vision: float | None
    generated: list[int]
    finite: bool


@torch.no_grad()
def judge_extracts(whole: Path, encoder: Path, decoder: Path, source: Path, dtype: torch.dtype) -> ExtractJudgement:
    """Compare an encoder with the whole model's, and a decoder with the source, in `dtype` with eager attention."""
    config = json.loads((encoder / "config.json").read_text())
    load: dict[str, Any] = {"dtype": dtype, "attn_implementation": "eager", "output_loading_info": True}
    full, _ = T5Gemma2ForConditionalGeneration.from_pretrained(whole, **load)
    try:
        alone, info = AutoModel.from_pretrained(encoder, **load)
        assert isinstance(alone, T5Gemma2Encoder)
    except (ValueError, KeyError):
        # transformers 5.0 has the class, but no AutoModel entry.
        alone, info = T5Gemma2Encoder.from_pretrained(encoder, **load)
    images = config["vision_config"]["num_hidden_layers"] > 0
    gemma3 = Gemma3ForConditionalGeneration if images else Gemma3ForCausalLM
    (back, said_too), (parent, _) = (gemma3.from_pretrained(folder, **load) for folder in (decoder, source))
    generator = torch.Generator().manual_seed(11)
    last = min(280, config["text_config"]["vocab_size"])
    ids = torch.randint(3, last, (2, LENGTH), generator=generator)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    # The class of an encoder alone takes 256000 for the end of an image, whatever its config says. Of the twins, which
    # have another, it scales the row of the table: the same in the dtype that the other row was scaled in.
    exact = config["dtype"] == str(dtype).removeprefix("torch.")
    if exact and config["eoi_token_index"] < config["text_config"]["vocab_size"]:
        ids[:, 9] = config["eoi_token_index"]
    kept = mask.bool()
    states = [model(input_ids=ids, attention_mask=mask).last_hidden_state for model in (full.model.encoder, alone)]
    logits = [model(input_ids=ids, attention_mask=mask).logits for model in (parent, back)]
    generated = back.generate(input_ids=ids[:1, :7], max_new_tokens=12, do_sample=False)
    vision: list[float | None] = [None, None]
    if images:
        side = config["vision_config"]["image_size"]
        pixels = torch.randn(2, 3, side, side, generator=generator).to(dtype)
        features = [_features(model, pixels) for model in (full.model.encoder, alone, parent.model, back.model)]
        vision = [_difference(*features[:2]), _difference(*features[2:])]
    return ExtractJudgement(
        complaints=[*_complaints(info), *_complaints(said_too)],
        encoder=_difference(states[0][kept], states[1][kept]),
        encoder_vision=vision[0],
        decoder=_difference(logits[0][..., : logits[1].shape[-1]][kept], logits[1][kept]),
        decoder_vision=vision[1],
        generated=generated[0].tolist(),
        finite=all(bool(torch.isfinite(x[kept]).all()) for x in (*states, *logits)),
    )


def _complaints(loading: dict[str, Any]) -> list[str]:
    kinds = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")
    return [f"{kind}: {item}" for kind in kinds for item in loading.get(kind, ())]


def _features(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    features = model.get_image_features(pixels)
    return getattr(features, "pooler_output", features)


def _difference(one: torch.Tensor, other: torch.Tensor) -> float:
    assert one.shape == other.shape, f"{one.shape} against {other.shape}"
    assert one.abs().max() > 0, "nothing was compared"
    return (one.float() - other.float()).abs().max().item()


if __name__ == "__main__":
    print(json.dumps(asdict(judge_extracts(*map(Path, sys.argv[1:5]), getattr(torch, sys.argv[5])))))
