"""The families that a conversion may lead to: for each `model_type`, the tensors that a config of it implies.

The lists of tensors stand in code, apart from any weight map, so that a map that forgets one is found out.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families import gemma3, research, t5gemma, t5gemma2
from t5g2convert.checkpoint.families.config_section import ImpliedTensor, describe_model_type
from t5g2convert.checkpoint.families.expected_tensors import gemma3_tensors, t5gemma2_encoder_tensors, t5gemma2_tensors
from t5g2convert.checkpoint.families.research import research_tensors
from t5g2convert.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Target:
    """A family that a conversion leads to.

    Attributes:
        implied: From config.json and its path to every tensor of such a folder, once.
        stacks: Where the settings of its text stacks stand in config.json, by part, as paths that end with a dot.
    """

    implied: Callable[[Mapping[str, Any], Path], Iterator[ImpliedTensor]]
    stacks: Mapping[str, str]


TARGETS: Final[Mapping[str, Target]] = {
    t5gemma.MODEL_TYPE: Target(t5gemma.implied_tensors, {"encoder": "encoder.", "decoder": "decoder."}),
    t5gemma2.MODEL_TYPE: Target(t5gemma2_tensors, {"encoder": "encoder.text_config.", "decoder": "decoder."}),
    t5gemma2.ENCODER_TYPE: Target(t5gemma2_encoder_tensors, {"encoder": "text_config."}),
    gemma3.MULTIMODAL: Target(gemma3_tensors, {"decoder": "text_config."}),
    gemma3.TEXT_ONLY: Target(gemma3_tensors, {"decoder": ""}),
    research.MODEL_TYPE: Target(research_tensors, {"encoder": "encoder.", "decoder": "decoder."}),
}
"""`model_type` to family."""


def target_of(config: Mapping[str, Any], where: Path) -> Target:
    """The family of a converted folder.

    Raises:
        CheckpointError: No conversion leads to such a model.
    """
    target = TARGETS.get(str(config.get("model_type")))
    if target is None:
        raise CheckpointError(f"{describe_model_type(config)} is not a target of a conversion", where=where)
    return target


def implied_tensors(config: Mapping[str, Any], where: Path) -> Iterator[ImpliedTensor]:
    """Every tensor that the config of a converted folder implies, once.

    Raises:
        CheckpointError: The config cannot be read, or is of a family that no conversion leads to.
    """
    return target_of(config, where).implied(config, where)
