"""The schema of weight maps, as frozen types; `mapping.weightmap` loads a map from a file and checks it."""

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveInt,
    model_validator,
)

from t5g2convert.checkpoint.families.config_section import MAX_INTEGER, Positive
from t5g2convert.checkpoint.families.registry import TARGETS
from t5g2convert.checkpoint.file_names import INDEX_FILE
from t5g2convert.checkpoint.folder import is_plain_name
from t5g2convert.checkpoint.tokenizer.chat_templates import TEMPLATES_FOLDER
from t5g2convert.mapping.operations import Aligned, AnyOperation, Copy, Operation, ScaledRow, Size, TakeRows, Zeros
from t5g2convert.mapping.source_families import FAMILIES, source_variants

Part = Literal["embedding", "encoder", "decoder", "vision", "projector"]
PARTS: tuple[Part, ...] = get_args(Part)
"""The parts of a target, in the order of tables."""

_BY_KEY: dict[str, type[Operation]] = {
    "take_rows": TakeRows,
    "scaled_row": ScaledRow,
    "zeros": Zeros,
    "aligned": Aligned,
}


class Declaration(BaseModel):
    """The base of all sections of a map: frozen, strictly typed, and unknown keys are errors."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def _operation(value: object) -> object:
    """Choose the operation by its key, so that a fault gives one error instead of one for each class."""
    if value is None or isinstance(value, Operation):
        return value or Copy()
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in _BY_KEY:
        raise ValueError(f"expected one operation of: {', '.join(_BY_KEY)}")
    return _BY_KEY[next(iter(value))].model_validate(value)


def _names(value: object) -> object:
    if not isinstance(value, str) and not (
        isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    ):
        raise ValueError("expected a name pattern, or a list of name patterns")
    return value


def _file_name(name: str) -> str:
    if name == TEMPLATES_FOLDER:
        return name
    if not is_plain_name(name):
        raise ValueError("expected the name of a file in the source folder")
    if name in RESERVED_FILES or name.endswith(".safetensors"):
        raise ValueError("the conversion writes this file itself")
    return name


def _spelling(prefix: str) -> str:
    if "{" in prefix or "}" in prefix:
        raise ValueError("a spelling is a literal prefix; it has no braces")
    return prefix


def _token_text(token: str) -> str:
    if not re.fullmatch(r'[^\s,:\[\]{}"\\\x00-\x1f][^"\\\x00-\x1f]*', token):
        raise ValueError("expected a token that JSON writes without escapes")
    return token


Names = Annotated[str | list[str], BeforeValidator(_names)]
TargetType = Annotated[str, Field(json_schema_extra={"enum": sorted(TARGETS)})]
Feature = Annotated[str, Field(json_schema_extra={"enum": sorted(frozenset().union(*source_variants(FAMILIES)))})]
FileName = Annotated[str, AfterValidator(_file_name)]
TokenText = Annotated[str, AfterValidator(_token_text)]
Spelling = Annotated[str, AfterValidator(_spelling)]

DropOption = Literal["drop_heads"]
"""Options that a drop may depend on."""

RESERVED_FILES = frozenset({"config.json", "generation_config.json", "t5g2.json", INDEX_FILE})
"""Files that a conversion writes itself and therefore never copies from a source."""


class Source(Declaration):
    """The source family."""

    model_type: list[str] = Field(
        min_length=1, description="The model_type values of config.json that the map converts."
    )


class Target(Declaration):
    """The target family."""

    model_type: Annotated[TargetType | list[TargetType], BeforeValidator(_names)] = Field(
        description="The model_type of the target's config.json, or a list if the config decides."
    )
    architecture: str = Field(description="The class that loads the output.")
    roots: dict[str, Any] = Field(
        default_factory=dict,
        description="Name of a root of target names to its prefix, which may be a case as in config.",
    )

    @property
    def model_types(self) -> tuple[str, ...]:
        """Return all model types of the target."""
        return (self.model_type,) if isinstance(self.model_type, str) else tuple(self.model_type)


class Vocabulary(Declaration):
    """The rows of the embedding table that the target keeps."""

    cut: dict[PositiveInt, PositiveInt] = Field(
        default_factory=dict,
        description="Rows in the source to rows in the target, applied if no id in use is in the rows that are cut; "
        "tables of other lengths are kept.",
    )
    moved: dict[str, NonNegativeInt] = Field(
        default_factory=dict,
        description="Name of a config value to the token id that replaces the source's if that is past the cut.",
    )


class Row(Declaration):
    """One tensor: its source, its targets, its shape, and the operation if it is not a copy."""

    from_: str | None = Field(default=None, alias="from", description="Pattern of the source tensor's name.")
    to: dict[Part, Names] = Field(
        min_length=1, description="Part of the target to pattern of the target tensor's name, or to several patterns."
    )
    tied: list[str] = Field(
        default_factory=list, description="Parameters that share the first target's storage and are not written."
    )
    shape: list[Size] = Field(description="The source tensor's shape, as numbers and dimensions.")
    op: Annotated[AnyOperation | Copy, BeforeValidator(_operation)] = Field(
        default=Copy(), description="take_rows, scaled_row, zeros or aligned; a copy by default."
    )
    merged_attention: bool = Field(
        default=False, description="The decoder's merged self- and cross-attention uses this self-attention tensor."
    )
    encoder_norm: bool = Field(
        default=False, description="The encoder's tensor is its final norm, which --encoder-norm may replace."
    )
    when: Feature | None = Field(default=None, description="The row applies only to sources with this feature.")

    @property
    def targets(self) -> tuple[tuple[Part, str], ...]:
        """Return the part and pattern of every target."""
        return tuple(
            (part, name) for part, names in self.to.items() for name in ([names] if isinstance(names, str) else names)
        )

    @property
    def target_shape(self) -> tuple[Size, ...]:
        """Return the shape of every target, as numbers and dimensions."""
        return self.op.target_shape(tuple(self.shape))

    def applies(self, features: frozenset[str]) -> bool:
        """Return whether the row applies to a source with these features."""
        return self.when is None or self.when in features


class Drop(Declaration):
    """Source tensors that are dropped on purpose, for one reason."""

    from_: Names = Field(alias="from", description="Pattern of the source tensor's name, or several patterns.")
    because: str = Field(description="The reason, shown in every plan.")
    must_equal: str | None = Field(
        default=None,
        description="Pattern of a tensor that must have the same values; the conversion is refused otherwise.",
    )
    option: DropOption | None = Field(
        default=None, description="The drop applies only with this option; without it, matching tensors are refused."
    )
    when: Feature | None = Field(default=None, description="The drop applies only to sources with this feature.")

    @property
    def patterns(self) -> tuple[str, ...]:
        """Return all patterns."""
        return (self.from_,) if isinstance(self.from_, str) else tuple(self.from_)

    def applies(self, features: frozenset[str]) -> bool:
        """Return whether the drop applies to a source with these features, assuming its option is passed."""
        return self.when is None or self.when in features


Length = Annotated[int, Field(gt=0, le=MAX_INTEGER)]


class PresetSettings(Declaration):
    """The config values that a preset may set; a plan declares each as changed."""

    rope_full_factor: Positive | None = Field(default=None, description="Factor that full layers divide positions by.")
    rope_full_theta: Positive | None = Field(default=None, description="Base of the frequencies of full layers.")
    rope_sliding_theta: Positive | None = Field(default=None, description="Base of the frequencies of sliding layers.")
    rope_factor: Positive | None = Field(default=None, description="Factor that all layers divide positions by.")
    rope_theta: Positive | None = Field(default=None, description="Base of the frequencies of all layers.")
    sliding_window: Length | None = Field(default=None, description="Window of sliding layers, in tokens.")
    max_position_embeddings: Length | None = Field(default=None, description="Length of the longest input, in tokens.")

    @model_validator(mode="after")
    def _sets_something(self) -> Self:
        if not self.model_fields_set or None in self.chosen.values():
            raise ValueError("expected at least one setting, and a value for each")
        return self

    @property
    def chosen(self) -> Mapping[str, Any]:
        """Return the settings that the preset has."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


class Preset(Declaration):
    """Settings that belong together, by name of the config value."""

    requires: dict[str, int | float] = Field(description="Config values that the source must have.")
    settings: PresetSettings = Field(description="Config values of the target.")
    assumed: list[str] = Field(
        default_factory=list, description="Settings that no publication confirms; the plan names them."
    )


class MovedToken(Declaration):
    """A token that moves to another id, and the token that it replaces."""

    id: str = Field(description="Name of the config value, one of vocabulary.moved.")
    token: TokenText = Field(description="The token.")
    replaces: TokenText = Field(description="The token that has the new id in the source's tokenizer; it is removed.")


class TokenizerFiles(Declaration):
    """How tokenizer.json and tokenizer_config.json are made from the source's."""

    moved: list[MovedToken] = Field(default_factory=list, description="One for each of vocabulary.moved.")
    special: list[TokenText] = Field(default_factory=list, description="Tokens that become special if a token moves.")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys added to tokenizer_config.json if the source's lacks them; null removes a key.",
    )


class Files(Declaration):
    """The files next to the weights."""

    carry: list[FileName] = Field(
        default_factory=list,
        description=f"Files to copy if the source has them; {TEMPLATES_FOLDER} means its *.jinja files.",
    )
    tokenizer: TokenizerFiles | None = Field(default=None, description="How the tokenizer's files are made.")
    processor: dict[str, Any] | None = Field(
        default=None,
        description="processor_config.json for a source with images, a template as config; "
        "the source's own settings of the image processor take precedence.",
    )


def _format(value: object) -> object:
    if type(value) is not int:
        raise ValueError("Input should be 1")
    return value


class MapHeader(BaseModel):
    """The keys of a map that decide which source it is for; other keys are ignored."""

    model_config = ConfigDict(frozen=True, strict=True, extra="ignore")

    extracts: str | None = None
    source: Source


class WeightMap(Declaration):
    """A weight map."""

    format: Annotated[Literal[1], BeforeValidator(_format)] = Field(description="Version of this schema.")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9_-]*$", description="What --mapping and the manifest call it.")
    title: str = Field(description="One line for lists.")
    extracts: Literal["encoder", "decoder"] | None = Field(
        default=None, description="The part that the map extracts from an encoder-decoder; `t5g2 extract --part`."
    )
    source: Source
    target: Target
    requires: dict[str, Any] = Field(
        default_factory=dict,
        description="Config values that the source must have, because the target has no others; a template as config.",
    )
    roots: dict[str, Annotated[list[Spelling], Field(min_length=1)]] = Field(
        description="Name of a root to the spellings of its prefix; a checkpoint has exactly one of them."
    )
    vocabulary: Vocabulary = Field(default=Vocabulary())
    weights: list[Row] = Field(min_length=1)
    drop: list[Drop] = Field(default_factory=list)
    presets: dict[str, Preset] = Field(default_factory=dict, description="The presets of --preset.")
    config: dict[str, Any] = Field(
        description="config.json of the target, a template; $name is a value of the source's config, $encoder.name "
        "and $decoder.name are values of that stack's own parent."
    )
    generation_config: dict[str, Any] | None = Field(
        default=None,
        description="Keys added to generation_config.json if the source's lacks them, a template as config; all "
        "other keys are copied. None for a target that does not generate.",
    )
    files: Files = Field(default=Files())


def count_parameters(counted: Mapping[str, int]) -> dict[str, int]:
    """Return the number of parameters by part, in the order of tables, with the total."""
    by_part: dict[str, int] = {part: counted.get(part, 0) for part in PARTS}
    return {**by_part, "total": sum(by_part.values())}
