"""The checks of a part that `t5g2 extract` made from a T5Gemma 2: its encoder, or its decoder as Gemma 3."""

from collections.abc import Mapping
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from t5g2convert.checkpoint.families.gemma3 import MULTIMODAL, TEXT_ONLY, read_gemma3
from t5g2convert.checkpoint.families.t5gemma2 import (
    DEFAULT_THETA,
    ENCODER_TYPE,
    MODEL_TYPE,
    T5Gemma2,
    T5Gemma2Text,
    read_t5gemma2_encoder,
)
from t5g2convert.parity.batches import ImageBatch
from t5g2convert.parity.checks.config import SHARED, flatten, generation_faults, judge_settings
from t5g2convert.parity.checks.runs import judge_dependence
from t5g2convert.parity.checks.text import judge_decoder, judge_encoder
from t5g2convert.parity.replay import replay_conversion
from t5g2convert.parity.reports.report import Check, Skipped
from t5g2convert.parity.session import Shared, Verification
from t5g2convert.parity.side_by_side import Pair, Track, advance_side_by_side, hidden_memory_run
from t5g2convert.parity.source_models import T5Gemma2Source
from t5g2convert.parity.suites.base import (
    NO_IMAGES,
    Suite,
    compare_towers,
    conversion_remarks,
    copied_tokenizer,
    integrity,
    provenance,
)
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.stack import Stack
from t5g2convert.reference.t5gemma2 import EncoderReference, T5Gemma2Reference


@Shared
def _whole(verification: Verification[T5Gemma2Source]) -> T5Gemma2Reference:
    """The whole model, as the extraction cast it."""
    return T5Gemma2Reference(verification.source.checkpoint, **verification.reading(rounded=True))


@Shared
def _encoder(verification: Verification[Any]) -> EncoderReference:
    """The output as a standalone encoder."""
    verification.require_tensors()
    return EncoderReference(verification.target, **verification.reading())


@Shared
def _gemma3(verification: Verification[Any]) -> Gemma3Reference:
    """The output as Gemma 3."""
    verification.require_tensors()
    return Gemma3Reference(verification.target, **verification.reading())


def _walk(verification: Verification[Any], source: Stack, track: Track) -> None:
    track.compare_embeddings()
    advance_side_by_side(source, [track], verification.progress)
    verification.progress("the last norm")


# The encoder


def _encoder_settings(verification: Verification[T5Gemma2Source]) -> Check:
    expected = encoder_config(verification.source.whole.model)
    return judge_settings(dict(flatten(expected)), verification.target, (), ())


@Shared
def _encoder_seen(verification: Verification[T5Gemma2Source]) -> tuple[Check, Tensor | None]:
    """vision_parity, and the image features of the whole model."""
    source = _whole(verification).vision
    assert source is not None, "the pass is made for a source with a tower"
    return compare_towers(verification, source, _encoder(verification).vision)


def _encoder_vision(verification: Verification[T5Gemma2Source]) -> Check | Skipped:
    return NO_IMAGES if _whole(verification).vision is None else _encoder_seen(verification)[0]


def _encoder_parity(verification: Verification[T5Gemma2Source]) -> Check:
    """Compare the states of both encoders under an encoder's masks."""
    whole, alone = _whole(verification), _encoder(verification)
    batch, seen = verification.inputs.batch(alone), _encoder_seen.if_known(verification)
    features = None if seen is None else seen[1]
    images = None if features is None else verification.inputs.image_batch(alone, features)
    pairs = [_pair(whole, alone, batch.ids_BT, batch.kept_BT)]
    if images is not None:
        pairs.append(_image_pair(whole, alone, images))
    track = Track("encoder", alone.encoder, pairs)
    _walk(verification, whole.encoder, track)
    check = judge_encoder(whole.encoder, track, batch, images, verification.tolerance, masks="its own masks")
    return check.remarked(batch.remarks)


def _pair(whole: EncoderReference, alone: EncoderReference, ids_BT: Tensor, kept_BT: Tensor) -> Pair:
    runs = [model.start_encoder(ids_BT, model.encoder_masks(kept_BT)) for model in (whole, alone)]
    return Pair(runs[0], runs[1], kept_BT)


def _image_pair(whole: EncoderReference, alone: EncoderReference, images: ImageBatch) -> Pair:
    """Start both on text with an image; both get the whole model's features, so only vision_parity judges the tower."""
    kept_BT = torch.ones_like(images.ids_BT, dtype=torch.bool)
    runs = []
    for model in (whole, alone):
        ids_BT = images.with_token(model.model.tokens.image_token_index)
        runs.append(model.start_encoder(ids_BT, model.encoder_masks(kept_BT), images.features_ITC))
    return Pair(runs[0], runs[1], kept_BT)


def _encoder_runs(verification: Verification[Any]) -> Check:
    encoder = _encoder(verification)
    verification.progress("the encoder alone")
    return judge_dependence(encoder, "states", encoder.encode)


# The decoder


def _decoder_settings(verification: Verification[T5Gemma2Source]) -> Check:
    model = verification.source.whole.model
    faults = generation_faults(verification.source.generation_folder, verification.output, model.decoder)
    return judge_settings(dict(flatten(gemma3_config(model))), verification.target, faults, ())


def _decoder_vision(verification: Verification[T5Gemma2Source]) -> Check | Skipped:
    source = _whole(verification).vision
    if source is None:
        return NO_IMAGES
    return compare_towers(verification, source, _gemma3(verification).vision)[0]


def _decoder_parity(verification: Verification[T5Gemma2Source]) -> Check:
    """Compare Gemma 3 with the decoder, while a mask hides the decoder's memory."""
    whole, gemma = _whole(verification), _gemma3(verification)
    batch, remarks = verification.inputs.batch(gemma), []
    if gemma.model.tokens.eoi_token_index < gemma.text.settings.vocab_size:
        remarks.append(
            "the end-of-image token was left out: Gemma 3 scales its embedding row, T5Gemma 2 stores a separate vector"
        )
    expected = hidden_memory_run(whole, batch)
    pair = Pair(expected, gemma.start(batch.ids_BT, batch.kept_BT), batch.kept_BT)
    track = Track("decoder", gemma.text, [pair])
    _walk(verification, whole.decoder, track)
    check = judge_decoder(whole.decoder, track, batch, verification.tolerance)
    return check.remarked([*remarks, *batch.remarks])


def _decoder_runs(verification: Verification[Any]) -> Check:
    gemma = _gemma3(verification)
    verification.progress("Gemma 3 alone")
    return judge_dependence(gemma, "logits", gemma.logits)


# The expected settings of a part


def encoder_config(model: T5Gemma2) -> dict[str, Any]:
    """Return config.json of the encoder alone, without `dtype`."""
    return {
        "architectures": ["T5Gemma2Encoder"],
        "model_type": ENCODER_TYPE,
        **model.tokens.model_dump(),
        "initializer_range": model.encoder.initializer_range,
        "processor_class": "Gemma3Processor" if model.vision.num_hidden_layers else "GemmaTokenizer",
        "tie_word_embeddings": True,
        "text_config": {
            "model_type": "t5gemma2_text", "dropout_rate": model.encoder.dropout_rate, **_stack(model.encoder),
        },
        "vision_config": _tower(model),
    }  # fmt: skip


def gemma3_config(model: T5Gemma2) -> dict[str, Any]:
    """Return config.json of the decoder as Gemma 3, without `dtype`."""
    stack = _stack(model.decoder)
    full, sliding = (stack["rope_parameters"][kind] for kind in DEFAULT_THETA)
    text = {
        "model_type": TEXT_ONLY,
        **stack,
        # The same settings for transformers 4.
        "rope_theta": full["rope_theta"],
        "rope_scaling": {"rope_type": "linear", "factor": full["factor"]},
        "rope_local_base_freq": sliding["rope_theta"],
    }
    if model.vision.num_hidden_layers == 0:
        return {"architectures": ["Gemma3ForCausalLM"], **text}
    tokens = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id", "initializer_range")}
    return {
        "architectures": ["Gemma3ForConditionalGeneration"],
        "model_type": MULTIMODAL,
        **model.tokens.model_dump(),
        **tokens,
        "tie_word_embeddings": True,
        "text_config": text,
        "vision_config": _tower(model),
    }


def _stack(stack: T5Gemma2Text) -> dict[str, Any]:
    thetas = {kind: rope.rope_theta for kind, rope in stack.rope_parameters.items()}
    thetas = {kind: thetas.get(kind, theta) for kind, theta in DEFAULT_THETA.items()}
    full = stack.rope_parameters.get("full_attention")
    factor = 1.0 if full is None else full.linear_factor
    return {
        **{name: getattr(stack, name) for name in SHARED},
        "rope_parameters": {
            "full_attention": {"rope_type": "linear", "rope_theta": thetas["full_attention"], "factor": factor},
            "sliding_attention": {"rope_type": "default", "rope_theta": thetas["sliding_attention"]},
        },
        "tie_word_embeddings": True,
    }


def _tower(model: T5Gemma2) -> Mapping[str, Any]:
    return {"model_type": "siglip_vision_model", "vision_use_head": False, **model.vision.model_dump()}


TO_ENCODER: Final = Suite(
    sources=(MODEL_TYPE,),
    targets=(ENCODER_TYPE,),
    open_source=T5Gemma2Source,
    read_config=read_t5gemma2_encoder,
    replay=partial(replay_conversion, part="encoder"),
    checks={
        "integrity": integrity,
        "provenance": provenance,
        "config": _encoder_settings,
        "tokenizer": copied_tokenizer,
        "vision_parity": _encoder_vision,
        "encoder_parity": _encoder_parity,
        "runs": _encoder_runs,
    },
    remarks=conversion_remarks,
)
"""The encoder of a T5Gemma 2, alone."""

TO_GEMMA3: Final = Suite(
    sources=(MODEL_TYPE,),
    targets=(MULTIMODAL, TEXT_ONLY),
    open_source=T5Gemma2Source,
    read_config=read_gemma3,
    replay=partial(replay_conversion, part="decoder"),
    checks={
        "integrity": integrity,
        "provenance": provenance,
        "config": _decoder_settings,
        "tokenizer": copied_tokenizer,
        "vision_parity": _decoder_vision,
        "decoder_parity": _decoder_parity,
        "runs": _decoder_runs,
    },
    remarks=conversion_remarks,
)
"""The decoder of a T5Gemma 2, as Gemma 3."""
