"""Preflight: everything that can be checked before a process is started and a weight is read."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Generic, TypeVar

from t5g2convert.adaptation.data.corpora import Corpora
from t5g2convert.adaptation.data.tokens import ModelTokens, read_tokens
from t5g2convert.adaptation.train.dataset import Samples
from t5g2convert.adaptation.train.run_settings import RunSettings
from t5g2convert.adaptation.train.samples import make_samples, measure, notes_of
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.dataset import UL2Dataset
from t5g2convert.checkpoint.families.registry import read_trainable
from t5g2convert.checkpoint.folder import Checkpoint, open_checkpoint
from t5g2convert.errors import CheckpointError, UsageError


@dataclass(frozen=True, slots=True)
class ModelLimits:
    """The limits in a model's config that training must respect.

    Attributes:
        softcap: The decoder's `final_logit_softcapping`.
        encoder_positions: Longest encoder input, in tokens.
        decoder_positions: Longest decoder input, in tokens.
        rope_factor: Linear RoPE factor of the full-attention layers; None if they have different factors.
    """

    softcap: float | None
    encoder_positions: int
    decoder_positions: int
    rope_factor: float | None

    @property
    def notes(self) -> Sequence[str]:
        """Notes for the user."""
        factor = "different factors" if self.rope_factor is None else f"linear factor {self.rope_factor:g}"
        return [] if self.rope_factor == 1 else [f"RoPE in full layers: {factor}, from config.json"]


S_co = TypeVar("S_co", bound=Samples[Any], covariant=True)


@dataclass(frozen=True, slots=True)
class Prepared(Generic[S_co]):
    """A checked run, ready to start; with held-out samples if it is evaluated."""

    checkpoint: Checkpoint
    limits: ModelLimits
    tokens: ModelTokens
    samples: S_co
    notes: tuple[str, ...]
    held_out: tuple[S_co, ...] = ()


def prepare(
    model: Path, data: Path | Corpora, settings: Settings, *, rope_scaling: str | None = None
) -> Prepared[UL2Dataset]:
    """Open model and data, and check that they fit the settings and each other.

    Args:
        model: A converted model.
        data: A folder written by `t5g2 pack`, a file that lists several with weights (see `data.corpora`), or both
            opened.
        settings: The run's settings.
        rope_scaling: `linear:F` that the config must have; None accepts any.

    Raises:
        CheckpointError: The model is damaged or of another kind.
        DataError: The data is missing, damaged, packed with another tokenizer, or does not fit the objective.
        MappingError: The file that lists the data is not valid.
        UsageError: The settings do not fit the model or each other.
    """
    checkpoint, limits = open_model(model, settings, rope_scaling=rope_scaling)
    tokens = read_tokens(model)
    check_lengths(settings, limits)
    corpora = data if isinstance(data, Corpora) else Corpora.open(data)
    corpora.check_tokenizer(model)
    samples = make_samples(corpora, settings, tokens, checkpoint)
    sizes = measure(samples)
    samples.settings = samples.settings.model_copy(update=sizes.per_step(settings))
    return Prepared(checkpoint, limits, tokens, samples, (*limits.notes, *notes_of(samples, sizes)))


def open_model(model: Path, settings: RunSettings, *, rope_scaling: str | None) -> tuple[Checkpoint, ModelLimits]:
    """Open the model to train, and check that it fits the settings of every objective.

    Args:
        model: A converted model.
        settings: The run's settings.
        rope_scaling: `linear:F` that the config must have; None accepts any.

    Raises:
        CheckpointError: The model is damaged or of another kind.
        UsageError: The settings do not fit the model or each other.
    """
    checkpoint = open_checkpoint(model)
    limits = read_limits(checkpoint.config, model / "config.json")
    check_rope(limits, rope_scaling)
    check_freezing(settings, checkpoint.tensors)
    check_skipped(settings)
    check_dropout(checkpoint.config, model / "config.json")
    return checkpoint, limits


def read_limits(config: Mapping[str, Any], where: Path) -> ModelLimits:
    """Read the limits from a config.

    Raises:
        CheckpointError: The model is of another kind.
    """
    model = read_trainable(config, where)
    factors = {
        stack.rope_parameters["full_attention"].linear_factor
        for stack in (model.encoder, model.decoder)
        if "full_attention" in stack.rope_parameters
    }
    return ModelLimits(
        softcap=model.decoder.final_logit_softcapping,
        encoder_positions=model.encoder.max_position_embeddings,
        decoder_positions=model.decoder.max_position_embeddings,
        rope_factor=factors.pop() if len(factors) == 1 else None if factors else 1.0,
    )


def check_rope(limits: ModelLimits, expected: str | None) -> None:
    """Refuse a RoPE scaling that the config does not have: only `t5g2 convert` can set it.

    Raises:
        UsageError: It differs, or is not valid.
    """
    if expected is None:
        return
    kind, _, number = expected.partition(":")
    try:
        factor = float(number)
    except ValueError:
        factor = 0.0
    if kind != "linear" or factor <= 0:
        raise UsageError(f"unknown RoPE scaling {expected!r}", hint="expected linear:F, for example linear:8")
    if factor != limits.rope_factor:
        found = "different factors" if limits.rope_factor is None else f"linear:{limits.rope_factor:g}"
        raise UsageError(
            f"--rope-scaling is {expected}, but config.json has {found}",
            hint=f"t5g2 convert --rope-scaling {expected} makes one",
        )


def check_dropout(config: Mapping[str, Any], where: Path) -> None:
    """Refuse a model with dropout: its noise is not seeded, so a run could not be reproduced.

    Raises:
        CheckpointError: A dropout rate is not 0.
    """
    for name, value in _dropout_rates(config):
        if value:
            raise CheckpointError(f"{name} is {value}, expected 0: training has no dropout", where=where)


def _dropout_rates(section: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _dropout_rates(value, f"{path}{key}.")
        elif key in ("dropout_rate", "attention_dropout"):
            yield f"{path}{key}", value


def check_lengths(settings: Settings, limits: ModelLimits) -> None:
    """Refuse lengths beyond the model's positions, and a batch smaller than one sample.

    Raises:
        UsageError: They do not fit.
    """
    for name, length, limit in (
        ("encoder", settings.encoder_length, limits.encoder_positions),
        ("decoder", settings.decoder_length, limits.decoder_positions),
    ):
        if length > limit:
            raise UsageError(
                f"--{name}-length {length} exceeds the {limit} positions of the {name}",
                hint="the limit is max_position_embeddings in config.json",
            )
    if not settings.samples:
        raise UsageError(
            f"--batch-tokens {settings.batch_tokens} is smaller than one sample of {settings.encoder_length} encoder "
            "tokens"
        )


def check_skipped(settings: RunSettings) -> None:
    """Refuse to skip steps that the run does not have.

    Raises:
        UsageError: A range begins after the last step.
    """
    for first, last in settings.skipped:
        if first > settings.steps:
            raise UsageError(f"--skip-steps {first}-{last} begins after the last step, {settings.steps}")


def check_freezing(settings: RunSettings, names: Collection[str]) -> None:
    """Refuse a freeze without tensors to train or without an end, and patterns that match no tensor.

    Args:
        settings: The run's settings.
        names: Names of the model's tensors.

    Raises:
        UsageError: The freeze is not valid.
    """
    if bool(settings.freeze_until) != bool(settings.trainable):
        raise UsageError("--freeze-until and --trainable must be used together")
    if settings.freeze_until >= settings.steps:
        raise UsageError(
            f"--freeze-until {settings.freeze_until} must be less than --steps {settings.steps}: the other tensors "
            "would never be trained"
        )
    for pattern in settings.trainable:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UsageError(
                f"--trainable {pattern} matches none of the model's {len(names)} tensors",
                hint="use the names in MODEL's safetensors, for example model.encoder.layers.0.mlp.up_proj.weight",
            )
