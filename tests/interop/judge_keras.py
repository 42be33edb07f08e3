"""A second external judge: keras-hub and transformers load a conversion, and both must compute the same.

It knows nothing of t5g2convert, and is a script for a Python that has keras-hub. Keras must be set to run on torch, on
the processor:

    KERAS_BACKEND=torch KERAS_TORCH_DEVICE=cpu python tests/interop/judge_keras.py OUTPUT [OTHER]

keras-hub loads OTHER where it is given, transformers always OUTPUT: so a test can damage what keras-hub reads.
Everything is float32, and transformers' attention is eager.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import keras
import keras_hub
import torch
from transformers import T5Gemma2ForConditionalGeneration

MEMORY, LENGTH = 26, 24
"""Tokens of the encoder's and of the decoder's input: more than every twin's sliding window."""

IMAGE_AT = 6
"""Where the image tokens begin in the encoder's input."""

WRITTEN = 12
"""Tokens that are written greedily, after the first."""


@dataclass(frozen=True)
class Inputs:
    """The input of both models: ids and masks [B, T]; pixels [B, 3, size, size], or None without an image."""

    ids: torch.Tensor
    mask: torch.Tensor
    decoder_ids: torch.Tensor
    decoder_mask: torch.Tensor
    pixels: torch.Tensor | None


@dataclass(frozen=True)
class Judgement:
    """Largest absolute differences outside padding, each with the largest value; generated tokens."""

    logits: float
    largest_logit: float
    states: float
    largest_state: float
    written: list[int]
    expected: list[int]


def judge(output: Path, other: Path) -> dict[str, Judgement]:
    """Compare keras-hub on `other` with transformers on `output`: text, and with an image."""
    config = json.loads((output / "config.json").read_text())
    expected = T5Gemma2ForConditionalGeneration.from_pretrained(
        output, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    found = keras_hub.models.Seq2SeqLM.from_preset(str(other), preprocessor=None, dtype="float32")
    found.compile(sampler="greedy")
    assert type(found).__name__ == "T5Gemma2Seq2SeqLM"
    judgements = {"text": _compare(expected, found, _inputs(config, with_image=False), config)}
    if config["encoder"]["vision_config"]["num_hidden_layers"]:
        judgements["image"] = _compare(expected, found, _inputs(config, with_image=True), config)
    return judgements


def _compare(expected: Any, found: Any, inputs: Inputs, config: dict[str, Any]) -> Judgement:
    pixels = {} if inputs.pixels is None else {"pixel_values": inputs.pixels}
    with torch.no_grad():
        one = expected(
            input_ids=inputs.ids,
            attention_mask=inputs.mask,
            decoder_input_ids=inputs.decoder_ids,
            decoder_attention_mask=inputs.decoder_mask,
            **pixels,
        )
        for_keras = _for_keras(inputs, config)
        logits = found(for_keras)
        states = found.backbone(for_keras)["encoder_sequence_output"]
        # The first row has no padding.
        written = expected.generate(
            input_ids=inputs.ids[:1],
            attention_mask=inputs.mask[:1],
            max_new_tokens=WRITTEN,
            do_sample=False,
            eos_token_id=None,
            **{name: tensor[:1] for name, tensor in pixels.items()},
        )
        rewritten = found.generate(_to_be_continued(for_keras), stop_token_ids=None)["decoder_token_ids"]
    kept, seen = inputs.decoder_mask.bool(), inputs.mask.bool()
    return Judgement(
        *_difference(one.logits[kept], logits[kept]),
        *_difference(one.encoder_last_hidden_state[seen], states[seen]),
        written=[int(token) for token in rewritten[0]],
        expected=written[0].tolist(),
    )


def _inputs(config: dict[str, Any], *, with_image: bool) -> Inputs:
    """Return two seeded rows, the second right-padded; both inputs have the end-of-image token."""
    generator = torch.Generator().manual_seed(7)
    eoi, image = config["eoi_token_index"], config["image_token_index"]
    words = min(config["vocab_size"], eoi, image, 280)
    ids = torch.randint(3, words, (2, MEMORY), generator=generator)
    decoder_ids = torch.randint(3, words, (2, LENGTH), generator=generator)
    decoder_ids[:, 0] = config["decoder"]["bos_token_id"]
    if eoi < config["vocab_size"]:
        ids[:, 2] = decoder_ids[:, 4] = eoi
    mask, decoder_mask = torch.ones_like(ids), torch.ones_like(decoder_ids)
    mask[1, -5:] = 0
    decoder_mask[1, -6:] = 0
    pixels = None
    if with_image:
        tokens, size = config["encoder"]["mm_tokens_per_image"], config["encoder"]["vision_config"]["image_size"]
        ids[:, IMAGE_AT : IMAGE_AT + tokens] = image
        ids[:, IMAGE_AT + tokens] = eoi
        pixels = torch.randn(2, 3, size, size, generator=generator)
    return Inputs(ids, mask, decoder_ids, decoder_mask, pixels)


def _for_keras(inputs: Inputs, config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return the same with keras-hub's names: images [B, 1, size, size, 3], and their token positions [B, tokens].

    A model with a vision tower needs both. Place 0 says that there is no image, as in keras-hub's own preprocessor.
    """
    size, tokens = config["encoder"]["vision_config"]["image_size"], config["encoder"]["mm_tokens_per_image"]
    rows = inputs.ids.shape[0]
    places = torch.zeros(rows, tokens, dtype=torch.int32)
    images = torch.zeros(rows, 1, size, size, 3)
    if inputs.pixels is not None:
        places += torch.arange(IMAGE_AT, IMAGE_AT + tokens)
        images = inputs.pixels.permute(0, 2, 3, 1)[:, None].contiguous()
    return {
        "encoder_token_ids": inputs.ids.int(),
        "encoder_padding_mask": inputs.mask.int(),
        "decoder_token_ids": inputs.decoder_ids.int(),
        "decoder_padding_mask": inputs.decoder_mask.int(),
        "images": images,
        "vision_indices": places,
    }


def _to_be_continued(inputs: dict[str, torch.Tensor]) -> dict[str, Any]:
    """Return the first row, with one decoder token and room for the generated ones."""
    row = {name: tensor[:1].clone() for name, tensor in inputs.items()}
    row["decoder_token_ids"] = torch.zeros(1, 1 + WRITTEN, dtype=torch.int32)
    row["decoder_token_ids"][:, 0] = inputs["decoder_token_ids"][0, 0]
    row["decoder_padding_mask"] = torch.arange(1 + WRITTEN)[None] == 0
    return {name: tensor.numpy() for name, tensor in row.items()}


def _difference(one: torch.Tensor, other: torch.Tensor) -> tuple[float, float]:
    """Return the largest difference and the largest value."""
    assert one.shape == other.shape, f"{one.shape} against {other.shape}"
    assert torch.isfinite(other).all(), "not finite"
    return (one - other).abs().max().item(), one.abs().max().item()


if __name__ == "__main__":
    assert keras.backend.backend() == "torch", f"KERAS_BACKEND is to be torch, and is {keras.backend.backend()}"
    found = judge(Path(sys.argv[1]), Path(sys.argv[-1]))
    print(json.dumps({name: asdict(judgement) for name, judgement in found.items()}))
