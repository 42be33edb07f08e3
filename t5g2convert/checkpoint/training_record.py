"""The record of a training in the manifest: its settings, its data, and the tensors that it changed."""

from typing import Annotated, Any, Literal, Self

from pydantic import (
    Field,
    ModelWrapValidatorHandler,
    NonNegativeInt,
    PositiveInt,
    PrivateAttr,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_serializer,
    model_validator,
)

from t5g2convert.checkpoint.families.config_section import ConfigSection, Number, Positive
from t5g2convert.checkpoint.manifest_section import Digest, Section, digest_of
from t5g2convert.checkpoint.merge_record import MergeRecord


class TaskRecord(Section):
    """A task of the training objective."""

    name: str
    kind: Literal["spans", "prefix"]
    rate: Number
    mean_span: Number | None
    weight: PositiveInt
    mode_token: NonNegativeInt | None
    sentinel: bool


class MixtureRecord(ConfigSection):
    """The tasks of the training objective; other keys are ignored."""

    tasks: Annotated[list[TaskRecord], Field(min_length=1)]
    first_sentinel: str | NonNegativeInt | None = None


class TrainingSettings(ConfigSection):
    """The settings of a training that this tool reads, whatever the objective.

    `document()` has all of them, in the order they were written.
    """

    teacher: Digest | None
    steps: PositiveInt
    lr: Positive
    lr_floor: Number
    warmup: NonNegativeInt
    seed: NonNegativeInt
    betas: Annotated[list[Number], Field(min_length=2, max_length=2)]
    weight_decay: Number
    clip: Positive
    freeze_until: NonNegativeInt
    trainable: list[str]
    _document: dict[str, Any] = PrivateAttr(default_factory=dict)

    @model_validator(mode="wrap")
    @classmethod
    def _keep_all(cls, fields: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        settings = handler(fields)
        if isinstance(fields, dict):
            settings._document = fields
        return settings

    @model_serializer
    def document(self) -> dict[str, Any]:
        """Return all settings as JSON."""
        return self._document


class UL2Settings(TrainingSettings):
    """The settings of a training with UL2."""

    mixture: MixtureRecord
    encoder_length: PositiveInt
    decoder_length: PositiveInt
    documents: Literal["packed", "single"] = "packed"
    image_every: PositiveInt | None
    batch_tokens: PositiveInt


class PairSettings(TrainingSettings):
    """The settings of fine-tuning on pairs."""

    objective: Literal["pairs"]
    batch_pairs: PositiveInt
    eval_pairs: NonNegativeInt
    lr_encoder: Positive | None
    lr_decoder: Positive | None
    lr_projector: Positive | None


def _of_objective(fields: Any, _: ValidatorFunctionWrapHandler) -> TrainingSettings:
    """Read settings as those of their objective; only UL2 has none named."""
    named = isinstance(fields, dict) and "objective" in fields
    return PairSettings.model_validate(fields) if named else UL2Settings.model_validate(fields)


AnyTrainingSettings = Annotated[TrainingSettings, WrapValidator(_of_objective)]


class LegRecord(Section):
    """The steps of a training until its settings were changed, and the settings until then."""

    until: PositiveInt
    settings: AnyTrainingSettings
    settings_sha256: Digest

    @model_validator(mode="before")
    @classmethod
    def _settings_match_the_digest(cls, fields: Any) -> Any:
        return _matching_settings(fields)


def _matching_settings(fields: Any) -> Any:
    if isinstance(fields, dict) and digest_of(fields.get("settings")) != fields.get("settings_sha256"):
        raise ValueError("settings_sha256 does not match the settings")
    return fields


class AdaptationRecord(Section):
    """The training that produced the values that differ from the source's.

    Attributes:
        steps: Number of steps run.
        checkpoints: The steps of the averaged checkpoints, or of the single exported one.
        tokens: Number of tokens read until then.
        settings: All settings that determine the result, including the identity of a teacher.
        settings_sha256: The sha256 of the settings.
        data_sha256: The sha256 of the packed data.
        trained: The names of the trained tensors, with `{layer}` where the tensors of all layers were trained.
        frozen: The parts without any trained tensor.
        earlier: The steps before each change of the settings, if they were changed.
        before: The training that the source had before.
        merged: The adapter that was merged into the source, after that training.
    """

    steps: PositiveInt
    checkpoints: Annotated[list[PositiveInt], Field(min_length=1)]
    tokens: NonNegativeInt
    settings: AnyTrainingSettings
    settings_sha256: Digest
    data_sha256: Digest
    trained: Annotated[list[str], Field(min_length=1)]
    frozen: list[str]
    earlier: list[LegRecord] | None = None
    before: "AdaptationRecord | None" = None
    merged: MergeRecord | None = None

    @property
    def ul2(self) -> UL2Settings | None:
        """The settings of the last training with UL2, if there was one."""
        if isinstance(self.settings, UL2Settings):
            return self.settings
        return None if self.before is None else self.before.ul2

    @model_validator(mode="before")
    @classmethod
    def _settings_match_the_digest(cls, fields: Any) -> Any:
        return _matching_settings(fields)
