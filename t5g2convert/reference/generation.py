"""Greedy generation with the reference encoder-decoder."""

from collections.abc import Collection, Iterator
from pathlib import Path

import torch
from torch import Tensor

from t5g2convert.checkpoint.families import t5gemma
from t5g2convert.checkpoint.families.text_and_vision import ImageTokens
from t5g2convert.checkpoint.folder import open_checkpoint, read_json_object
from t5g2convert.checkpoint.header import CONFIG_NAMES
from t5g2convert.command_options import takes_options
from t5g2convert.errors import UsageError
from t5g2convert.reference.cache import LayerCache
from t5g2convert.reference.encoder_decoder import EncoderDecoder
from t5g2convert.reference.options import GenerateOptions
from t5g2convert.reference.prompts import TextCodec, picture
from t5g2convert.reference.t5gemma import T5GemmaReference
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from t5g2convert.reference.weights import check_device, not_finite


@takes_options(GenerateOptions)
@torch.inference_mode()
def generate(folder: Path, prompt: str, options: GenerateOptions) -> Iterator[str]:
    """Generate text greedily from a prompt that the encoder reads; yield it piece by piece.

    ```python
    for piece in generate(Path("t5gemma-2-270m-270m"), "Rain is", max_new_tokens=16):
        print(piece, end="")
    ```

    Args:
        folder: A T5Gemma or T5Gemma 2 folder with a tokenizer.
        prompt: The encoder's input.
        options: As keyword arguments; see `GenerateOptions`.

    Raises:
        CheckpointError: The folder is damaged, has no tokenizer, or its logits are not finite.
        UsageError: The model has no vision tower, the prompt is empty, or float16 overflows.
    """
    image, device = options.image, options.device
    check_device(options.dtype, device)
    checkpoint = open_checkpoint(folder)
    computed = getattr(torch, options.dtype or CONFIG_NAMES.get(checkpoint.dtype, "float32"))
    first = checkpoint.config.get("model_type") == t5gemma.MODEL_TYPE
    reference = T5GemmaReference if first else T5Gemma2Reference
    model: T5GemmaReference | T5Gemma2Reference = reference(
        checkpoint, dtype=computed, device=device, resident=True, kernel="sdpa"
    )
    codec = TextCodec(folder, model.encoder.settings.vocab_size)
    if image is None:
        tokens, features = codec.encode(prompt), None
    elif isinstance(model, T5Gemma2Reference) and model.vision is not None:
        tokens = _with_image(codec, prompt, model.vision.tokens)
        features = model.vision.features(picture(image, model.vision, folder, computed).to(device))
    else:
        raise UsageError(f"cannot read {image}: {folder} has no vision tower")
    start = model.model.decoder.bos_token_id
    if start is None:
        raise UsageError("the decoder's config has no bos_token_id to start from", hint=f"see {folder}/config.json")
    if not tokens:
        raise UsageError("the prompt is empty")
    ids_BT = torch.tensor([tokens], device=device)
    steps = greedy_tokens(
        model,
        ids_BT,
        torch.ones_like(ids_BT, dtype=torch.bool),
        start_token=start,
        max_new_tokens=options.max_new_tokens,
        features_ITC=features,
    )
    yield from _texts(codec, until_end(steps, end_tokens(model, folder)))


def _with_image(codec: TextCodec, prompt: str, tokens: ImageTokens) -> list[int]:
    """Return the ids of an image's tokens followed by the prompt."""
    if tokens.image_token_index in codec.encode(prompt):
        raise UsageError("the prompt already has image tokens; --image adds its own before the prompt")
    return codec.encode_with_image(
        prompt,
        boi=tokens.boi_token_index,
        eoi=tokens.eoi_token_index,
        image=tokens.image_token_index,
        count=tokens.mm_tokens_per_image,
    )


def _texts(codec: TextCodec, tokens: Iterator[int]) -> Iterator[str]:
    """Decode tokens as they arrive; a character of several tokens is yielded with the last one."""
    ids: list[int] = []
    yielded = ""
    for token in tokens:
        ids.append(token)
        text = codec.decode(ids)
        if text.startswith(yielded) and not text.endswith("\N{REPLACEMENT CHARACTER}"):
            yield text[len(yielded) :]
            yielded = text
    if rest := codec.decode(ids)[len(yielded) :]:
        yield rest


def end_tokens(model: EncoderDecoder, folder: Path) -> set[int]:
    """Return the tokens that end a text, from generation_config.json or otherwise from the decoder's config."""
    path = folder / "generation_config.json"
    ends = read_json_object(path).get("eos_token_id") if path.is_file() else None
    if ends is None:
        ends = model.model.decoder.eos_token_id
    return {ends} if isinstance(ends, int) else set(ends or ())


@torch.inference_mode()
def greedy_tokens(
    model: EncoderDecoder,
    ids_BT: Tensor,
    kept_BT: Tensor,
    *,
    start_token: int,
    max_new_tokens: int,
    features_ITC: Tensor | None = None,
    cached: bool = True,
) -> Iterator[Tensor]:
    """Yield the most probable next token of every sequence, [B], int64, once per step.

    The caller decides when a sequence ends; see `until_end`.

    Args:
        model: The encoder-decoder; `resident` makes it fast.
        ids_BT: The encoder's input.
        kept_BT: False at the padding of `ids_BT`.
        start_token: The decoder's first token (`decoder.bos_token_id`).
        max_new_tokens: The largest number of steps.
        features_ITC: Soft tokens of the images in the encoder's input.
        cached: Keep keys and values between steps; otherwise every step recomputes all tokens.

    Raises:
        CheckpointError: The logits are not finite: argmax would choose the first token for NaN.
        UsageError: The logits are not finite because float16 overflows.
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
    """Yield the tokens of a single sequence up to the first end token, which is not yielded."""
    for token_B in tokens:
        token = int(token_B[0])
        if token in ends:
            return
        yield token
