"""T5Gemma 2's config.json, of the whole model or of a standalone encoder, and the tensors that it implies."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.checkpoint.families.config_section import (
    ExpectedTensor,
    Number,
    Scalar,
    Token,
    describe_model_type,
    parse_section,
    refuse_bidirectional,
    subsection,
)
from t5g2convert.checkpoint.families.rope_config import LayerType, Rope
from t5g2convert.checkpoint.families.text_and_vision import (
    ImageTokens,
    SiglipConfig,
    TextConfig,
    check_stack,
    stack_fields,
    stack_tensors,
    tower_fields,
    vision_tensors,
)
from t5g2convert.errors import CheckpointError, MappingError

MODEL_TYPE: Final = "t5gemma2"
ENCODER_TYPE: Final = "t5gemma2_encoder"

FIRST_SENTINEL: Final = "<unused6237>"
"""The first sentinel of Google's models, id 262139 of Gemma 3's vocabulary; the others descend from it.

Source: the notebook Research/[T5Gemma_2]Example.ipynb in google-gemma/cookbook.
"""

DEFAULT_THETA: Final[Mapping[LayerType, float]] = {"full_attention": 1_000_000.0, "sliding_attention": 10_000.0}
"""transformers' defaults for a kind of layer that a config does not have."""


class T5Gemma2Text(TextConfig):
    """The text stack of an encoder or decoder, with the defaults of transformers' T5Gemma2TextConfig."""

    rope_parameters: dict[LayerType, Rope]
    dropout_rate: Number = 0.0

    @property
    def ropes(self) -> Mapping[LayerType, Rope]:
        """The position embedding of each kind of layer."""
        return self.rope_parameters


class T5Gemma2Tokens(ImageTokens):
    """The tokens of images, with the defaults of transformers' T5Gemma2Config."""

    image_token_index: Token = 256_001


@dataclass(frozen=True, slots=True)
class T5Gemma2Encoder:
    """The encoder of a T5Gemma 2 as its config describes it."""

    encoder: T5Gemma2Text
    vision: SiglipConfig
    tokens: T5Gemma2Tokens


@dataclass(frozen=True, slots=True)
class T5Gemma2(T5Gemma2Encoder):
    """A T5Gemma 2 model as its config describes it."""

    decoder: T5Gemma2Text
    notes: tuple[str, ...] = ()

    @property
    def family(self) -> str:
        """The `model_type` of its config."""
        return MODEL_TYPE

    @property
    def features(self) -> frozenset[str]:
        """`vision`, or `text_only` if the tower is a stub without layers."""
        return frozenset({"vision" if self.vision.num_hidden_layers else "text_only"})

    @property
    def dims(self) -> Mapping[str, int]:
        """Sizes in elements and counts, by the names that maps use."""
        return {
            "rows": self.encoder.vocab_size,
            "hidden": self.encoder.hidden_size,
            **{f"encoder_{name}": size for name, size in self.encoder.dims.items()},
            **{f"decoder_{name}": size for name, size in self.decoder.dims.items()},
            **self.vision.dims,
        }

    @property
    def fields(self) -> Mapping[str, str]:
        """The fields of config.json of each dimension."""
        fields = {"rows": "encoder.text_config.vocab_size", "hidden": "encoder.text_config.hidden_size"}
        for stack, path in (("encoder", "encoder.text_config"), ("decoder", "decoder")):
            fields |= {f"{stack}_{dim}": field for dim, field in stack_fields(f"{path}.").items()}
        return {**fields, **tower_fields("encoder.vision_config.")}

    @property
    def values(self) -> Mapping[str, Scalar]:
        """The tokens, and the fields of the stacks (`encoder.NAME`, `decoder.NAME`) and the tower (`vision_NAME`)."""
        values: dict[str, Scalar] = self.tokens.model_dump()
        for name, stack in (("encoder", self.encoder), ("decoder", self.decoder)):
            fields = stack.model_dump(exclude={"rope_parameters"})
            for rope, theta in DEFAULT_THETA.items():
                settings, kind = stack.rope_parameters.get(rope), rope.removesuffix("_attention")
                fields[f"rope_{kind}_theta"] = settings.rope_theta if settings else theta
                fields[f"rope_{kind}_factor"] = settings.linear_factor if settings else 1.0
            values |= {f"{name}.{field}": value for field, value in fields.items()}
        return values | {f"vision_{field}": value for field, value in self.vision.model_dump().items()}

    def with_vision_of(self, donor: "T5Gemma2", projector: str | None) -> "T5Gemma2":
        """Refuse a donor; see `SourceModel`."""
        raise MappingError("--vision-from applies only to decoder-only sources")


def read_t5gemma2(config: Mapping[str, Any], where: Path) -> T5Gemma2:
    """Read the config of a T5Gemma 2.

    Raises:
        CheckpointError: The config is another model's, or a field is missing or of the wrong type.
    """
    if config.get("model_type") != MODEL_TYPE:
        raise CheckpointError(f"{describe_model_type(config)} is not T5Gemma 2", where=where)
    encoder = subsection(config, "encoder", where)
    return T5Gemma2(
        read_stack(subsection(encoder, "text_config", where), where, "encoder.text_config"),
        parse_section(SiglipConfig, subsection(encoder, "vision_config", where), where, "encoder.vision_config"),
        # Both sections name the tokens; transformers reads the image token at the top, the others in the encoder.
        parse_section(T5Gemma2Tokens, {**encoder, **_top_image_token(config)}, where, "encoder"),
        read_stack(subsection(config, "decoder", where), where, "decoder"),
    )


def read_t5gemma2_encoder(config: Mapping[str, Any], where: Path) -> T5Gemma2Encoder:
    """Read the config of a T5Gemma 2's standalone encoder.

    Raises:
        CheckpointError: The config is another model's, or a field is missing or of the wrong type.
    """
    if config.get("model_type") != ENCODER_TYPE:
        raise CheckpointError(f"{describe_model_type(config)} is not T5Gemma 2's encoder", where=where)
    return T5Gemma2Encoder(
        read_stack(subsection(config, "text_config", where), where, "text_config"),
        parse_section(SiglipConfig, subsection(config, "vision_config", where), where, "vision_config"),
        # The config class of the standalone encoder has another default than the whole model's; it is never intended.
        parse_section(T5Gemma2Tokens, config, where),
    )


def _top_image_token(config: Mapping[str, Any]) -> dict[str, Any]:
    return {"image_token_index": config.get("image_token_index", 256_001)}


def read_stack(fields: Mapping[str, Any], where: Path, section: str) -> T5Gemma2Text:
    """Read one text stack; `section` is its name in config.json, which is `decoder` for a decoder.

    Raises:
        CheckpointError: A field is missing, of the wrong type, or does not fit another.
    """
    if section == "decoder":
        refuse_bidirectional(fields, where, section)
    stack = parse_section(T5Gemma2Text, fields, where, section)
    check_stack(stack, where, section)
    if unsettled := set(stack.layer_types) - stack.rope_parameters.keys():
        raise CheckpointError(f"{section}.rope_parameters lacks {', '.join(sorted(unsettled))}", where=where)
    return stack


def t5gemma2_tensors(config: Mapping[str, Any], where: Path) -> Iterator[ExpectedTensor]:
    """Yield every tensor of the published layout, without tied copies and rotary buffers.

    Raises:
        CheckpointError: As `read_t5gemma2`.
    """
    model = read_t5gemma2(config, where)
    yield from _encoder_tensors(model, "model.encoder.")
    for name, shape in stack_tensors(model.decoder, ("pre_self_attn_layernorm", "post_self_attn_layernorm")):
        yield ExpectedTensor(f"model.decoder.{name}", "decoder", shape)


def t5gemma2_encoder_tensors(config: Mapping[str, Any], where: Path) -> Iterator[ExpectedTensor]:
    """Yield every tensor of T5Gemma 2's standalone encoder, under names that all versions of transformers accept.

    Raises:
        CheckpointError: As `read_t5gemma2_encoder`.
    """
    yield from _encoder_tensors(read_t5gemma2_encoder(config, where), "")


def _encoder_tensors(model: T5Gemma2Encoder, root: str) -> Iterator[ExpectedTensor]:
    vocab, hidden = model.encoder.vocab_size, model.encoder.hidden_size
    yield ExpectedTensor(f"{root}embed_tokens.weight", "embedding", (vocab, hidden))
    yield ExpectedTensor(f"{root}embed_tokens.eoi_embedding", "embedding", (hidden,))
    for name, shape in stack_tensors(model.encoder, ("pre_self_attn_layernorm", "post_self_attn_layernorm")):
        yield ExpectedTensor(root + name, "encoder", shape)
    yield from vision_tensors(model.vision, hidden, root)
