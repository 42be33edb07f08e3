"""Models written and loaded by transformers, and the inputs to compare them with the reference."""

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    PreTrainedModel,
    T5Gemma2Config,
    T5Gemma2ForConditionalGeneration,
)
from transformers.masking_utils import eager_mask
from transformers.models.gemma3.modeling_gemma3 import eager_attention_forward

from t5g2convert.reference.encoder_decoder import EncoderDecoder
from t5g2convert.reference.generation.engines import ReferenceEngine
from tests.models.twins import BY_NAME

SOFTCAPPED = "eager-softcapped"
"""transformers' eager attention, given the softcap that its modules read from their config but do not pass on."""


def _softcapped(module: torch.nn.Module, *tensors: Tensor | None, **options: Any) -> tuple[Tensor, Tensor]:
    return eager_attention_forward(module, *tensors, **options, softcap=module.attn_logit_softcapping)


AttentionInterface.register(SOFTCAPPED, _softcapped)
AttentionMaskInterface.register(SOFTCAPPED, eager_mask)

IMAGE, EOI = 292, 291
"""The image token and the end-of-image token of the models written here."""

TEXT: Mapping[str, Any] = BY_NAME["text-8"].text
"""Text settings that the models written here start from."""

NO_TOWER = {"model_type": "siglip_vision_model", "num_hidden_layers": 0, "hidden_size": 4, "vision_use_head": False}


@dataclass(frozen=True)
class Batch:
    """Return token ids, and 0 at padding."""

    ids: Tensor
    mask: Tensor

    @property
    def kept(self) -> Tensor:
        """Return a mask that is False at padding."""
        return self.mask.bool()


def padded_batch(length: int, *, seed: int, left: int = 4, right: int = 5, eoi: int | None = EOI) -> Batch:
    """Return three rows of seeded ids: without padding, with padding on the left, and on the right."""
    ids = torch.randint(3, 280, (3, length), generator=torch.Generator().manual_seed(seed))
    if eoi is not None:
        ids[:, left + 1] = eoi
        ids[0, -1] = eoi
    mask = torch.ones_like(ids)
    mask[1, :left] = 0
    mask[2, length - right :] = 0
    return Batch(ids, mask)


def with_images(batch: Batch, token: int, tokens: int = 4) -> tuple[Batch, int]:
    """Return the same with image tokens (at the start, after padding, two in a row) and the number of images."""
    ids, starts = batch.ids.clone(), [(0, 0), (0, tokens + 4), (1, 6), (2, 3), (2, 3 + tokens)]
    for row, start in starts:
        ids[row, start : start + tokens] = token
    return Batch(ids, batch.mask), len(starts)


def pixels(images: int, dtype: torch.dtype, side: int = 56, channels: int = 3) -> Tensor:
    """Return seeded images."""
    return torch.randn(images, channels, side, side, generator=torch.Generator().manual_seed(images)).to(dtype)


def difference(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference of two tensors, which must not be nearly constant."""
    assert one.shape == other.shape, f"{one.shape} against {other.shape}"
    assert one.dtype == other.dtype, f"{one.dtype} against {other.dtype}"
    assert one.float().std() > 0.1, "nothing was compared"
    return float((one.double() - other.double()).abs().max())


def write_t5gemma2(
    folder: Path,
    encoder: Mapping[str, Any],
    decoder: Mapping[str, Any],
    *,
    tower: Mapping[str, Any] = NO_TOWER,
    table: float = 0.25,
) -> None:
    """Write a T5Gemma 2 with transformers, in float32, with all parameters random.

    Args:
        folder: The new folder.
        encoder: Changes to the encoder's text settings.
        decoder: Changes to the decoder's.
        tower: The vision tower's settings.
        table: Standard deviation of the embedding; a small one makes greedy output lively.
    """
    multimodal = {
        "text_config": deepcopy({**TEXT, **encoder}),
        "vision_config": dict(tower),
        "mm_tokens_per_image": 4,
        "eoi_token_index": EOI,
    }
    config = T5Gemma2Config(encoder=multimodal, decoder=deepcopy({**TEXT, **decoder}), image_token_index=IMAGE)
    model = T5Gemma2ForConditionalGeneration(config)
    generator = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = table if name.endswith("embed_tokens.weight") else 0.25
            parameter.normal_(0.0, spread, generator=generator)
    model.save_pretrained(folder)


def loaded(kind: type[PreTrainedModel], folder: Path, attention: str = "eager") -> Any:
    """Load a model with transformers in float32, with no tensor missing."""
    model, loading = kind.from_pretrained(
        folder, dtype=torch.float32, attn_implementation=attention, output_loading_info=True
    )
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    return model.eval()


def greedy_tokens(
    model: EncoderDecoder,
    inputs: Batch,
    count: int,
    *,
    start: int = 2,
    images: Tensor | None = None,
    cached: bool = True,
) -> Tensor:
    """Return the most probable tokens of every row, [B, count]; without caches, each step recomputes all tokens."""
    tokens = torch.full((len(inputs.ids), 1), start)
    step = ReferenceEngine(model).start(inputs.ids, inputs.kept, images)
    memory = None if cached else model.encode(inputs.ids, inputs.kept)
    for _ in range(count):
        if memory is None:
            logits = step(tokens[:, -1:])
        else:
            states = model.decode(tokens, torch.ones_like(tokens, dtype=torch.bool), memory, inputs.kept)
            logits = model.decoder.logits(states[:, -1])
        tokens = torch.cat((tokens, logits.argmax(-1)[:, None]), dim=1)
    return tokens[:, 1:]
