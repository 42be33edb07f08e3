"""The families that a conversion can produce, by `model_type`.

The lists of tensors are written in code, independently of any weight map, to catch a map that forgets a tensor.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families import gemma3, t5gemma, t5gemma2
from t5g2convert.checkpoint.families.config_section import ExpectedTensor, describe_model_type
from t5g2convert.errors import CheckpointError

ReadSettings = Callable[[Mapping[str, Any], Path], dict[str, Any]]


@dataclass(frozen=True, slots=True)
class TargetFamily:
    """A family that a conversion can produce.

    Attributes:
        tensors: Yields every tensor of a folder of this kind once, from config.json and its path.
        stacks: The sections of config.json that hold the settings of the text stacks, by part, each with a final dot.
        read_settings: Reads the settings that `t5g2 inspect` shows; None for a family that is inspected as a source.
        read_trainable: Reads the config of a model that can be trained; None for a family that cannot be trained.
    """

    tensors: Callable[[Mapping[str, Any], Path], Iterator[ExpectedTensor]]
    stacks: Mapping[str, str]
    read_settings: ReadSettings | None = None
    read_trainable: Callable[[Mapping[str, Any], Path], t5gemma2.T5Gemma2] | None = None


def _t5gemma_settings(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    model = t5gemma.read_t5gemma(config, where)
    stacks = {"encoder": model.encoder.model_dump(), "decoder": model.decoder.model_dump()}
    return {**stacks, "tie_word_embeddings": model.tied}


def _t5gemma2_settings(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    model = t5gemma2.read_t5gemma2(config, where)
    sections = {"encoder": model.encoder, "decoder": model.decoder, "vision": model.vision}
    return {name: section.model_dump() for name, section in sections.items()}


def _t5gemma2_encoder_settings(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    model = t5gemma2.read_t5gemma2_encoder(config, where)
    return {"encoder": model.encoder.model_dump(), "vision": model.vision.model_dump()}


TARGETS: Final[dict[str, TargetFamily]] = {
    t5gemma.MODEL_TYPE: TargetFamily(
        t5gemma.expected_tensors, {"encoder": "encoder.", "decoder": "decoder."}, _t5gemma_settings
    ),
    t5gemma2.MODEL_TYPE: TargetFamily(
        t5gemma2.t5gemma2_tensors,
        {"encoder": "encoder.text_config.", "decoder": "decoder."},
        _t5gemma2_settings,
        t5gemma2.read_t5gemma2,
    ),
    t5gemma2.ENCODER_TYPE: TargetFamily(
        t5gemma2.t5gemma2_encoder_tensors, {"encoder": "text_config."}, _t5gemma2_encoder_settings
    ),
    gemma3.MULTIMODAL: TargetFamily(gemma3.gemma3_tensors, {"decoder": "text_config."}),
    gemma3.TEXT_ONLY: TargetFamily(gemma3.gemma3_tensors, {"decoder": ""}),
}
"""`model_type` to family. Code outside this package may add its own family before it loads a map or a model."""


def target_of(config: Mapping[str, Any], where: Path) -> TargetFamily:
    """Return the family of a converted folder.

    Raises:
        CheckpointError: No conversion produces this kind of model.
    """
    target = TARGETS.get(str(config.get("model_type")))
    if target is None:
        raise CheckpointError(f"{describe_model_type(config)} is not a target of a conversion", where=where)
    return target


def expected_tensors(config: Mapping[str, Any], where: Path) -> Iterator[ExpectedTensor]:
    """Yield every tensor that the config of a converted folder implies, once.

    Raises:
        CheckpointError: The config cannot be read, or no conversion produces this kind of model.
    """
    return target_of(config, where).tensors(config, where)


def read_trainable(config: Mapping[str, Any], where: Path) -> t5gemma2.T5Gemma2:
    """Read the config of a model that can be trained.

    Raises:
        CheckpointError: The config cannot be read, or is not a T5Gemma 2's.
    """
    target = TARGETS.get(str(config.get("model_type")))
    read = target.read_trainable if target is not None else None
    return (read or t5gemma2.read_t5gemma2)(config, where)
