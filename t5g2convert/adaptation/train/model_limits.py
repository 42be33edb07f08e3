"""What training asks of a model's config, and what it refuses in one."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from t5g2convert.checkpoint.families.registry import read_trainable
from t5g2convert.errors import CheckpointError, UsageError


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """What the config of a model says that training asks for.

    Attributes:
        softcap: The decoder's `final_logit_softcapping`.
        encoder_positions: Tokens that the encoder reads at most.
        decoder_positions: Tokens that the decoder reads at most.
        rope_factor: By which positions in the encoder's and decoder's full layers are divided; None where they differ.
    """

    softcap: float | None
    encoder_positions: int
    decoder_positions: int
    rope_factor: float | None


def read_facts(config: Mapping[str, Any], where: Path) -> ModelFacts:
    """What training asks of a config.

    Raises:
        CheckpointError: It is of another kind of model.
    """
    model = read_trainable(config, where)
    factors = {
        stack.rope_parameters["full_attention"].linear_factor
        for stack in (model.encoder, model.decoder)
        if "full_attention" in stack.rope_parameters
    }
    return ModelFacts(
        softcap=model.decoder.final_logit_softcapping,
        encoder_positions=model.encoder.max_position_embeddings,
        decoder_positions=model.decoder.max_position_embeddings,
        rope_factor=factors.pop() if len(factors) == 1 else None if factors else 1.0,
    )


def check_rope(facts: ModelFacts, asked: str | None) -> None:
    """Refuse another RoPE than the config has: it decides what the weights compute, and is set by `t5g2 convert`.

    Raises:
        UsageError: It is another, or is none.
    """
    if asked is None:
        return
    kind, _, number = asked.partition(":")
    try:
        factor = float(number)
    except ValueError:
        factor = 0.0
    if kind != "linear" or factor <= 0:
        raise UsageError(f"unknown RoPE scaling {asked!r}", hint="expected linear:F as linear:8")
    if factor != facts.rope_factor:
        found = "factors that differ" if facts.rope_factor is None else f"linear:{facts.rope_factor:g}"
        raise UsageError(
            f"--rope-scaling {asked} was asked for, config.json has {found}",
            hint=f"t5g2 convert --rope-scaling {asked} makes such a model",
        )


def check_dropout(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a model that drops out: the noise of it is seeded nowhere, so that no run could be had again.

    Raises:
        CheckpointError: A part of the config has a rate that is not 0.
    """
    for name, value in _rates(config):
        if value:
            raise CheckpointError(f"{name} is {value}, expected 0: dropout is not trained with", where=where)


def _rates(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _rates(value, f"{path}{key}.")
        elif key in ("dropout_rate", "attention_dropout"):
            yield f"{path}{key}", value
