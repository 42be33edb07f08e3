"""How the parts are judged that were taken out of a T5Gemma 2: its encoder, and its decoder as Gemma 3."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from t5g2convert.checkpoint.families.gemma3 import MULTIMODAL, TEXT_ONLY, Gemma3, read_gemma3
from t5g2convert.checkpoint.families.t5gemma2 import (
    DEFAULT_THETA,
    ENCODER_TYPE,
    MODEL_TYPE,
    T5Gemma2,
    T5Gemma2Encoder,
    T5Gemma2Text,
    read_t5gemma2_encoder,
)
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.sources import Sources
from t5g2convert.parity.batches import ImageBatch
from t5g2convert.parity.checks.config import SHARED, flatten, judge_settings
from t5g2convert.parity.checks.generation_config import generation_faults
from t5g2convert.parity.checks.runs import judge_dependence
from t5g2convert.parity.checks.text import (
    Pair,
    Track,
    advance_side_by_side,
    hidden_memory_run,
    judge_decoder,
    judge_encoder,
)
from t5g2convert.parity.checks.tokenizer import judge_carried, make_tokenizer_check
from t5g2convert.parity.checks.vision import judge_vision
from t5g2convert.parity.declared_changes import change_remarks
from t5g2convert.parity.parents import Parent
from t5g2convert.parity.reports.report import Check
from t5g2convert.parity.session import Judge
from t5g2convert.parity.suites.base import Kind
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.stack import Stack
from t5g2convert.reference.t5gemma2 import EncoderReference, T5Gemma2Reference
from t5g2convert.reference.vision import VisionTower


class T5Gemma2Parent(Parent):
    """T5Gemma 2, as the source of what is taken out of it.

    Attributes:
        whole: What it computes.

    Raises:
        CheckpointError: It is not T5Gemma 2, or has a switch that the passes do not know.
    """

    def __init__(self, sources: Sources) -> None:
        super().__init__(sources)
        self.whole = T5Gemma2Reference(self.checkpoint)

    @property
    def vision(self) -> VisionTower | None:
        """Its tower."""
        return self.whole.vision


class _Extracted(Kind[T5Gemma2Parent]):
    """What both parts have in common."""

    sources = (MODEL_TYPE,)

    def parent(self, sources: Sources) -> T5Gemma2Parent:
        """T5Gemma 2."""
        return T5Gemma2Parent(sources)

    def against(self, judge: Judge, parent: T5Gemma2Parent, target: Checkpoint) -> None:
        """config, tokenizer and the parities."""
        judge.make(["config"], lambda: [self.config(parent, target)])
        make_tokenizer_check(judge, target, lambda: judge_carried(parent.folders, target, judge.manifest))
        judge.remarks += change_remarks(target, judge.changes)
        whole = T5Gemma2Reference(parent.checkpoint, **judge.reading(rounded=True))
        if whole.vision is None:
            judge.skip(["vision_parity"], "the source has no images")
        if not judge.unfit(self.parities if whole.vision is not None else self.parities[1:], target):
            judge.make(self.parities[1:], lambda: [self.passes(judge, whole, target)])

    @abstractmethod
    def config(self, parent: T5Gemma2Parent, target: Checkpoint) -> Check:
        """config: the settings are those of the part."""

    @abstractmethod
    def passes(self, judge: Judge, whole: T5Gemma2Reference, target: Checkpoint) -> Check:
        """The parities: that of the tower is made on the way, that of the text is returned."""


class ToEncoder(_Extracted):
    """T5Gemma 2 to its encoder alone."""

    targets = (ENCODER_TYPE,)
    parities = ("vision_parity", "encoder_parity")
    part = "encoder"

    def read(self, target: Checkpoint) -> T5Gemma2Encoder:
        """T5Gemma 2's encoder."""
        return read_t5gemma2_encoder(target.config, target.path / "config.json")

    def config(self, parent: T5Gemma2Parent, target: Checkpoint) -> Check:
        """config: the settings are those of the whole model's encoder."""
        return judge_settings(dict(flatten(encoder_config(parent.whole.model))), target, (), ())

    def passes(self, judge: Judge, whole: T5Gemma2Reference, target: Checkpoint) -> Check:
        """encoder_parity: both encoders read the same under the masks that encoders have."""
        alone = EncoderReference(target, **judge.reading())
        features = look_alike(judge, whole.vision, alone.vision)
        batch = judge.inputs.batch(alone)
        images = None if features is None else judge.inputs.image_batch(alone, features)
        pairs = [_pair(whole, alone, batch.ids_BT, batch.kept_BT)]
        if images is not None:
            pairs.append(_image_pair(whole, alone, images))
        track = Track("encoder", alone.encoder, pairs)
        _walk(whole.encoder, track, judge)
        return judge_encoder(whole.encoder, track, batch, images, judge.tolerance, masks="its own masks")

    def runs(self, judge: Judge, target: Checkpoint) -> Check:
        """Finite states that depend on what is read."""
        alone = EncoderReference(target, **judge.reading())
        judge.progress("the encoder by itself")
        return judge_dependence(alone, "states", alone.encode)


class ToGemma3(_Extracted):
    """T5Gemma 2's decoder to Gemma 3."""

    targets = (MULTIMODAL, TEXT_ONLY)
    parities = ("vision_parity", "decoder_parity")
    part = "decoder"

    def read(self, target: Checkpoint) -> Gemma3:
        """Gemma 3."""
        return read_gemma3(target.config, target.path / "config.json")

    def config(self, parent: T5Gemma2Parent, target: Checkpoint) -> Check:
        """config: the settings are those of the decoder, and of the tower."""
        model = parent.whole.model
        faults = generation_faults(parent.writing, target.path, model.decoder)
        return judge_settings(dict(flatten(gemma3_config(model))), target, faults, ())

    def passes(self, judge: Judge, whole: T5Gemma2Reference, target: Checkpoint) -> Check:
        """decoder_parity: Gemma 3 reads what the decoder reads with its memory hidden."""
        gemma = Gemma3Reference(target, **judge.reading())
        look_alike(judge, whole.vision, gemma.vision)
        batch = judge.inputs.batch(gemma)
        ending = gemma.model.tokens.eoi_token_index
        if ending < gemma.text.settings.vocab_size:
            judge.remarks.append(
                "the end-of-image token was left out: Gemma 3 scales the row of its table, T5Gemma 2 keeps a vector"
            )
        expected = hidden_memory_run(whole, batch)
        track = Track("decoder", gemma.text, [Pair(expected, gemma.start(batch.ids_BT, batch.kept_BT), batch.kept_BT)])
        _walk(whole.decoder, track, judge)
        return judge_decoder(whole.decoder, track, batch, judge.tolerance)

    def runs(self, judge: Judge, target: Checkpoint) -> Check:
        """Finite logits that depend on what is read."""
        gemma = Gemma3Reference(target, **judge.reading())
        judge.progress("Gemma 3 by itself")
        return judge_dependence(gemma, "logits", gemma.logits)


def _walk(source: Stack, track: Track, judge: Judge) -> None:
    track.compare_embeddings()
    advance_side_by_side(source, [track], judge.progress)
    judge.progress("the last norm")


def _pair(whole: EncoderReference, alone: EncoderReference, ids_BT: Tensor, kept_BT: Tensor) -> Pair:
    runs = [model.start_encoder(ids_BT, model.encoder_masks(kept_BT)) for model in (whole, alone)]
    return Pair(runs[0], runs[1], kept_BT)


def _image_pair(whole: EncoderReference, alone: EncoderReference, images: ImageBatch) -> Pair:
    """Text with an image: both get the features of the whole model, so that a tower is told by its own check."""
    kept_BT = torch.ones_like(images.ids_BT, dtype=torch.bool)
    runs = []
    for model in (whole, alone):
        ids_BT = images.with_token(model.model.tokens.image_token_index)
        runs.append(model.start_encoder(ids_BT, model.encoder_masks(kept_BT), images.features_ITC))
    return Pair(runs[0], runs[1], kept_BT)


def look_alike(
    judge: Judge,
    source: VisionTower | None,
    target: VisionTower | None,
    *,
    projected: bool = True,
    normed: bool = True,
) -> Tensor | None:
    """vision_parity; the image features of the source's tower, if both have one. See `judge_vision`."""
    if source is None:
        return None
    features: list[Tensor] = []

    def look() -> list[Check]:
        if target is None:
            return [Check("vision_parity", False, "the source has a vision tower, the target has none")]
        seen = judge.inputs.pixels(source).to(judge.device)
        check, found = judge_vision(
            source,
            target,
            seen,
            projected=projected,
            normed=normed,
            tolerance=judge.tolerance,
            progress=judge.progress,
        )
        features.append(found)
        return [check]

    judge.make(["vision_parity"], look)
    return features[0] if features else None


def encoder_config(model: T5Gemma2) -> dict[str, Any]:
    """config.json of the encoder alone, without `dtype`."""
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
    """config.json of the decoder as Gemma 3, without `dtype`."""
    stack = _stack(model.decoder)
    full, sliding = (stack["rope_parameters"][kind] for kind in DEFAULT_THETA)
    text = {
        "model_type": TEXT_ONLY,
        **stack,
        # The same again for transformers 4.
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
