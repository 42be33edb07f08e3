"""Greedy generation with the reference encoder-decoder."""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from t5g2convert.checkpoint.dtypes import CONFIG_NAMES
from t5g2convert.checkpoint.families import t5gemma
from t5g2convert.checkpoint.folder import open_checkpoint, read_json_object
from t5g2convert.errors import UsageError
from t5g2convert.reference.cache import LayerCache
from t5g2convert.reference.encoder_decoder import EncoderDecoder
from t5g2convert.reference.overflow import not_finite
from t5g2convert.reference.prompts import TextCodec, picture
from t5g2convert.reference.t5gemma import T5GemmaReference
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.weights import check_place


@torch.inference_mode()
def write(
    folder: Path,
    prompt: str,
    *,
    image: Path | None = None,
    max_new_tokens: int = 64,
    dtype: str | None = None,
    device: str = "cpu",
) -> Iterator[str]:
    """What the model of a folder writes to a prompt that its encoder reads, a piece of text at a time.

    Args:
        folder: A T5Gemma or T5Gemma 2 folder with a tokenizer.
        prompt: What the encoder reads.
        image: A picture that stands before it.
        max_new_tokens: Tokens at most.
        dtype: Dtype to compute in (default: that of most parameters).
        device: Device to compute on.

    Raises:
        CheckpointError: The folder is not sound, has no tokenizer, or computes logits that are not finite.
        UsageError: The model has no images, or nothing to start with, or float16 overflows.
    """
    check_place(dtype, device)
    checkpoint = open_checkpoint(folder)
    computed = getattr(torch, dtype or CONFIG_NAMES.get(checkpoint.dtype, "float32"))
    first = checkpoint.config.get("model_type") == t5gemma.MODEL_TYPE
    reference = T5GemmaReference if first else T5Gemma2Reference
    model: T5GemmaReference | T5Gemma2Reference = reference(
        checkpoint, dtype=computed, device=device, resident=True, kernel="sdpa"
    )
    codec, features = TextCodec(folder, model.encoder.settings.vocab_size), None
    if image is None:
        tokens = codec.encode(prompt)
    elif not isinstance(model, T5Gemma2Reference) or model.vision is None:
        raise UsageError(f"{folder} cannot see {image}: it has no vision tower")
    else:
        place = model.model.tokens
        if place.image_token_index in codec.encode(prompt):
            raise UsageError("the prompt has image tokens of its own; with --image they are put before it")
        tokens = codec.encode_with_image(
            prompt,
            boi=place.boi_token_index,
            eoi=place.eoi_token_index,
            image=place.image_token_index,
            count=place.mm_tokens_per_image,
        )
        features = model.vision.features(picture(image, model.vision, folder, computed).to(device))
    start = model.model.decoder.bos_token_id
    if start is None:
        raise UsageError("the decoder has no bos_token_id to start with", hint=f"see {folder}/config.json")
    if not tokens:
        raise UsageError("the prompt is empty")
    ids_BT = torch.tensor([tokens], device=device)
    steps = generate(
        model,
        ids_BT,
        torch.ones_like(ids_BT, dtype=torch.bool),
        start_token=start,
        max_new_tokens=max_new_tokens,
        features_ITC=features,
    )
    written: list[int] = []
    told = ""
    for token in until_end(steps, end_tokens(model, folder)):
        written.append(token)
        text = codec.decode(written)
        # A character of several tokens is whole only with the last of them.
        if text.startswith(told) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(told) :]
            told = text
    if rest := codec.decode(written)[len(told) :]:
        yield rest


def end_tokens(model: EncoderDecoder, folder: Path) -> set[int]:
    """The tokens that end a text: those of generation_config.json, or of the decoder's config where it names none."""
    path = folder / "generation_config.json"
    ends = read_json_object(path).get("eos_token_id") if path.is_file() else None
    if ends is None:
        ends = model.model.decoder.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


@torch.inference_mode()
def generate(
    model: EncoderDecoder,
    ids_BT: Tensor,
    kept_BT: Tensor,
    *,
    start_token: int,
    max_new_tokens: int,
    features_ITC: Tensor | None = None,
    cached: bool = True,
) -> Iterator[Tensor]:
    """The most probable next token of every sequence, again and again: [B], int64, one yield per step.

    The caller stops when it has seen what ends a sequence; see `until_end`.

    Args:
        model: The encoder-decoder; `resident` makes it fast.
        ids_BT: The encoder's input.
        kept_BT: False at its padding.
        start_token: What the decoder starts with (`decoder.bos_token_id`).
        max_new_tokens: Steps at most.
        features_ITC: Soft tokens of the images in the encoder's input.
        cached: Keep keys and values between steps; without, every step computes all tokens again.

    Raises:
        CheckpointError: The logits are not finite: the most probable token of NaN would be the first of the table.
        UsageError: They are not, because float16 overflows.
    """
    memory_BMC = model.encode(ids_BT, kept_BT, features_ITC)
    caches = [LayerCache() for _ in range(len(model.decoder))] if cached else None
    written_BT = torch.full((ids_BT.shape[0], 1), start_token, device=ids_BT.device)
    for _ in range(max_new_tokens):
        fresh_BT = written_BT[:, -1:] if cached else written_BT
        states = model.decode(fresh_BT, torch.ones_like(written_BT, dtype=torch.bool), memory_BMC, kept_BT, caches)
        logits_BV = model.decoder.logits(states[:, -1])
        if not bool(torch.isfinite(logits_BV).all()):
            raise not_finite("the logits", model.weights)
        token_B = logits_BV.argmax(-1)
        written_BT = torch.cat((written_BT, token_B[:, None]), dim=1)
        yield token_B


def until_end(tokens: Iterator[Tensor], ends: Collection[int]) -> Iterator[int]:
    """The tokens of a single sequence up to the first one that ends it, which is not given."""
    for token_B in tokens:
        token = int(token_B[0])
        if token in ends:
            return
        yield token
