"""The base of all config readers: strict fields, one error for all faults, and names of other models."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Final, Protocol, Self, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from t5g2convert.errors import CheckpointError

MAX_INTEGER: Final = 2**31 - 1
"""The largest size and token id that are accepted."""


def whole(value: object) -> object:
    """Return 256 for 256.0: JSON has only one kind of number, but strict readers of the output expect an int."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


Size = Annotated[int, BeforeValidator(whole), Field(gt=0, le=MAX_INTEGER)]
MAX_DEPTH: Final = 10_000
Depth = Annotated[int, BeforeValidator(whole), Field(ge=0, le=MAX_DEPTH)]
Token = Annotated[int, BeforeValidator(whole), Field(ge=-MAX_INTEGER, le=MAX_INTEGER)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]

Scalar = int | float | bool | str | list[Any] | None
"""A value of config.json that is copied unchanged."""

KNOWN_MODELS: Final = {
    "gemma": "the first Gemma",
    "gemma2": "Gemma 2",
    "gemma3n": "Gemma 3n",
    "gemma3n_text": "Gemma 3n",
    "gemma4": "Gemma 4",
    "gemma4_text": "Gemma 4",
    "paligemma": "PaliGemma",
    "recurrent_gemma": "RecurrentGemma",
    "shieldgemma2": "ShieldGemma 2, an image classifier made from a Gemma 3, which does not generate text",
    "t5gemma": "T5Gemma, the first generation, an encoder-decoder already",
    "t5gemma2": "T5Gemma 2, an encoder-decoder already",
}
"""Other model types that users try, with a description."""


class ConfigSection(BaseModel):
    """A section of config.json: known fields are typed strictly, unknown ones are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore", protected_namespaces=())


Section = TypeVar("Section", bound=ConfigSection)


@dataclass(frozen=True, slots=True)
class ExpectedTensor:
    """A tensor that a config implies, and the part of the model that it belongs to."""

    name: str
    part: str
    shape: tuple[int, ...]


class SourceModel(Protocol):
    """A source model in the terms that maps use."""

    @property
    def family(self) -> str:
        """The `model_type` of config.json."""

    @property
    def features(self) -> frozenset[str]:
        """The features of `when:` and `case:` that hold."""

    @property
    def dims(self) -> Mapping[str, int]:
        """Sizes, for `shape:` and for the ranges of `{layer}`."""

    @property
    def fields(self) -> Mapping[str, str]:
        """The fields of config.json that each dimension is computed from, for errors."""

    @property
    def values(self) -> Mapping[str, Scalar]:
        """Config values, for `$name` in the target's config."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Notes on its config for the user, for example about dropped settings."""

    def with_vision_of(self, donor: Self, projector: str | None) -> Self:
        """Return this model with the vision tower of another model of the same family.

        Args:
            donor: The other model.
            projector: How the donor's projector gets this model's width: copy, zeros or aligned; None for copy if the
                widths are equal, else zeros.

        Raises:
            MappingError: This model already has a tower, the donor has none, or the projector does not fit.
        """


def parse_section(model: type[Section], fields: Mapping[str, Any], where: Path, section: str = "") -> Section:
    """Validate a section; `section` is its name in config.json, for errors.

    Raises:
        CheckpointError: A field has the wrong type or an impossible value; the message lists all of them.
    """
    try:
        return model.model_validate(dict(fields))
    except ValidationError as error:
        prefix = f"{section}." if section else ""
        # pydantic gives one reason for each type that a field may have; name the field once.
        reasons = {
            _field_path(item["loc"]): item["msg"].removeprefix("Value error, ") for item in reversed(error.errors())
        }
        told = {f"{prefix}{field}".rstrip("."): reason for field, reason in reversed(reasons.items())}
        text = "; ".join(f"{field}: {reason}" if field else reason for field, reason in told.items())
        raise CheckpointError(text, where=where) from None


def _field_path(location: tuple[int | str, ...]) -> str:
    """Return the path of a faulty field with list positions, without the names of the types that pydantic tried.

    A fault of several fields together has an empty path.
    """
    if not location:
        return ""
    return ".".join([str(location[0]), *(str(step) for step in location[1:] if isinstance(step, int))])


def refuse_bidirectional(fields: Mapping[str, Any], where: Path, section: str = "") -> None:
    """Refuse a decoder with bidirectional masks; `section` is its name in config.json, for errors.

    Raises:
        CheckpointError: The decoder has bidirectional masks.
    """
    place = f"{section}." if section else ""
    if fields.get("use_bidirectional_attention"):
        raise CheckpointError(
            f"{place}use_bidirectional_attention is true: this is an encoder with other masks, as EmbeddingGemma is",
            where=where,
        )
    if fields.get("is_causal") is not None and not fields["is_causal"]:
        raise CheckpointError(f"{place}is_causal is false: this is an encoder with other masks", where=where)


def subsection(config: Mapping[str, Any], key: str, where: Path) -> dict[str, Any]:
    """Return the object under a key.

    Raises:
        CheckpointError: It is missing or not an object.
    """
    value = config.get(key)
    if not isinstance(value, dict):
        raise CheckpointError(f"{key} is {'missing' if value is None else 'not an object'}", where=where)
    return value


def describe_model_type(config: Mapping[str, Any]) -> str:
    """Describe the model type of a config, for errors."""
    model_type = config.get("model_type")
    if not isinstance(model_type, str):
        return "a config without model_type"
    known = KNOWN_MODELS.get(model_type)
    return f"model_type {model_type!r}" + (f" ({known})" if known else "")
