"""What a weight map may say: its YAML as frozen types. `mapping.weightmap` loads one from a file, with all checks."""

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
"""The parts of the target, in the order of tables."""

_BY_KEY: dict[str, type[Operation]] = {
    "take_rows": TakeRows,
    "scaled_row": ScaledRow,
    "zeros": Zeros,
    "aligned": Aligned,
}


class Declaration(BaseModel):
    """Frozen, strictly typed, and closed: an unknown key is an error."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


def _operation(value: object) -> object:
    """Choose the operation by its key, so that a wrong one gets one error and not one for each class."""
    if value is None or isinstance(value, Operation):
        return value or Copy()
    if not isinstance(value, dict) or len(value) != 1 or next(iter(value)) not in _BY_KEY:
        raise ValueError(f"expected one operation of: {', '.join(_BY_KEY)}")
    return _BY_KEY[next(iter(value))].model_validate(value)


def _names(value: object) -> object:
    if not isinstance(value, str) and not (
        isinstance(value, list) and value and all(isinstance(name, str) for name in value)
    ):
        raise ValueError("expected the pattern of a name, or a list of such patterns")
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
        raise ValueError("a spelling is a prefix as it stands, without braces")
    return prefix


def _token_text(token: str) -> str:
    if not re.fullmatch(r'[^\s,:\[\]{}"\\\x00-\x1f][^"\\\x00-\x1f]*', token):
        raise ValueError("expected a token that JSON writes as it stands")
    return token


Names = Annotated[str | list[str], BeforeValidator(_names)]
TargetType = Annotated[str, Field(json_schema_extra={"enum": sorted(TARGETS)})]
Feature = Annotated[str, Field(json_schema_extra={"enum": sorted(frozenset().union(*source_variants(FAMILIES)))})]
FileName = Annotated[str, AfterValidator(_file_name)]
TokenText = Annotated[str, AfterValidator(_token_text)]
Spelling = Annotated[str, AfterValidator(_spelling)]

DropOption = Literal["drop_heads"]
"""Options that a drop may wait for."""

RESERVED_FILES = frozenset({"config.json", "generation_config.json", "t5g2.json", INDEX_FILE})
"""What a conversion writes, and so carries over from no source."""


class Source(Declaration):
    """The source family."""

    model_type: list[str] = Field(
        min_length=1, description="The model_type values of config.json that the map converts."
    )


class Target(Declaration):
    """The target family."""

    model_type: Annotated[TargetType | list[TargetType], BeforeValidator(_names)] = Field(
        description="The model_type of its config.json, or those that it may be."
    )
    architecture: str = Field(description="The class that loads the output.")
    roots: dict[str, Any] = Field(
        default_factory=dict,
        description="Name of a prefix of target names to the prefix, which may be a case as in config.",
    )

    @property
    def model_types(self) -> tuple[str, ...]:
        """All of them."""
        return (self.model_type,) if isinstance(self.model_type, str) else tuple(self.model_type)


class Vocabulary(Declaration):
    """Which rows of the embedding table are real."""

    cut: dict[PositiveInt, PositiveInt] = Field(
        default_factory=dict,
        description="Rows in the source to rows in the target, where no id in use lies in those that go; "
        "tables of other lengths are kept.",
    )
    moved: dict[str, NonNegativeInt] = Field(
        default_factory=dict,
        description="Token id by the name of its config value, used where the source's lies past the cut.",
    )


class Row(Declaration):
    """One distinct tensor: where it comes from, where it goes, its shape, and the operation if it is no copy."""

    from_: str | None = Field(default=None, alias="from", description="Pattern of the source tensor's name.")
    to: dict[Part, Names] = Field(
        min_length=1, description="Part of the target to pattern of the target tensor's name, or to several patterns."
    )
    tied: list[str] = Field(
        default_factory=list, description="Parameters that share the first target's storage and so are not written."
    )
    shape: list[Size] = Field(description="The source tensor's shape, as numbers and dimensions.")
    op: Annotated[AnyOperation | Copy, BeforeValidator(_operation)] = Field(
        default=Copy(), description="take_rows, scaled_row, zeros or aligned; a copy without it."
    )
    merged_attention: bool = Field(
        default=False, description="The decoder's joint self- and cross-attention reads this self-attention tensor."
    )
    when: Feature | None = Field(default=None, description="The row holds only for such sources.")

    @property
    def targets(self) -> tuple[tuple[Part, str], ...]:
        """Part and pattern of every target."""
        return tuple(
            (part, name) for part, names in self.to.items() for name in ([names] if isinstance(names, str) else names)
        )

    @property
    def target_shape(self) -> tuple[Size, ...]:
        """Shape of every target, as numbers and dimensions."""
        return self.op.target_shape(tuple(self.shape))

    def applies(self, features: frozenset[str]) -> bool:
        """Whether the row holds for a source."""
        return self.when is None or self.when in features


class Drop(Declaration):
    """Source tensors that are left behind on purpose, for one reason."""

    from_: Names = Field(alias="from", description="Pattern of the source tensor's name, or several patterns.")
    because: str = Field(description="The reason, shown in every plan.")
    must_equal: str | None = Field(
        default=None,
        description="Pattern of a tensor that it must repeat value by value; the conversion is refused otherwise.",
    )
    option: DropOption | None = Field(
        default=None, description="The drop holds only where this option is given; such a tensor is refused otherwise."
    )
    when: Feature | None = Field(default=None, description="The drop holds only for such sources.")

    @property
    def patterns(self) -> tuple[str, ...]:
        """All patterns."""
        return (self.from_,) if isinstance(self.from_, str) else tuple(self.from_)

    def applies(self, features: frozenset[str]) -> bool:
        """Whether the drop holds for a source, if its option is given."""
        return self.when is None or self.when in features


Length = Annotated[int, Field(gt=0, le=MAX_INTEGER)]


class PresetSettings(Declaration):
    """What a preset may set, by the names of config values: what a plan declares as changed, and nothing else."""

    rope_full_factor: Positive | None = Field(default=None, description="Full layers divide positions by it.")
    rope_full_theta: Positive | None = Field(default=None, description="Base of the frequencies of full layers.")
    rope_sliding_theta: Positive | None = Field(default=None, description="The same of sliding layers.")
    rope_factor: Positive | None = Field(default=None, description="All layers divide positions by it.")
    rope_theta: Positive | None = Field(default=None, description="Base of the frequencies of all layers.")
    sliding_window: Length | None = Field(default=None, description="Tokens that a sliding layer sees.")
    max_position_embeddings: Length | None = Field(default=None, description="Tokens of the longest input.")

    @model_validator(mode="after")
    def _sets_something(self) -> Self:
        if not self.model_fields_set or None in self.given.values():
            raise ValueError("expected at least one setting, and a value for each")
        return self

    @property
    def given(self) -> Mapping[str, Any]:
        """Those that stand there."""
        return {name: getattr(self, name) for name in type(self).model_fields if name in self.model_fields_set}


class Preset(Declaration):
    """Settings that go together, by the names of config values."""

    requires: dict[str, int | float] = Field(description="Config values that the source must have.")
    settings: PresetSettings = Field(description="Config values of the target.")
    assumed: list[str] = Field(
        default_factory=list, description="Those of the settings that are ours; the plan says which."
    )


class MovedToken(Declaration):
    """What the tokenizer calls a token whose id moves, and the token that gives way to it."""

    id: str = Field(description="Name of the config value that moves, one of vocabulary.moved.")
    token: TokenText = Field(description="The token.")
    replaces: TokenText = Field(description="The token that has the new id in the source's tokenizer, and goes.")


class TokenizerFiles(Declaration):
    """tokenizer.json and tokenizer_config.json, made from the source's."""

    moved: list[MovedToken] = Field(default_factory=list, description="One for each of vocabulary.moved.")
    special: list[TokenText] = Field(default_factory=list, description="Tokens that become special where one moves.")
    config: dict[str, Any] = Field(
        default_factory=dict,
        description="Keys that tokenizer_config.json gets where the source's lacks them; null takes one away.",
    )


class Files(Declaration):
    """What stands beside the weights."""

    carry: list[FileName] = Field(
        default_factory=list,
        description=f"File names, copied where the source has them; {TEMPLATES_FOLDER} stands for its *.jinja.",
    )
    tokenizer: TokenizerFiles | None = Field(default=None, description="Makes the tokenizer's files.")
    processor: dict[str, Any] | None = Field(
        default=None,
        description="Makes processor_config.json for a source with images, in the form of config; "
        "the source's own settings of the image processor win.",
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
        default=None, description="The part of an encoder-decoder that the map takes out; `t5g2 extract --part`."
    )
    source: Source
    target: Target
    requires: dict[str, Any] = Field(
        default_factory=dict,
        description="Config values that the source must have, the target having no others, in the form of config.",
    )
    roots: dict[str, Annotated[list[Spelling], Field(min_length=1)]] = Field(
        description="Name of a family of tensors to the spellings of its prefix; one of them is in a checkpoint."
    )
    vocabulary: Vocabulary = Field(default=Vocabulary())
    weights: list[Row] = Field(min_length=1)
    drop: list[Drop] = Field(default_factory=list)
    presets: dict[str, Preset] = Field(default_factory=dict, description="What --preset may name.")
    config: dict[str, Any] = Field(
        description="config.json of the target; $name is a value of the source's config, $encoder.name and "
        "$decoder.name are values of that stack's own parent."
    )
    generation_config: dict[str, Any] | None = Field(
        default=None,
        description="What generation_config.json of the target gets where the source has none, in the same form; "
        "all else in it is carried. None for what writes no text.",
    )
    files: Files = Field(default=Files())


def count_parameters(counted: Mapping[str, int]) -> dict[str, int]:
    """Parameters by part, in the order of tables, with their total."""
    by_part: dict[str, int] = {part: counted.get(part, 0) for part in PARTS}
    return {**by_part, "total": sum(by_part.values())}
