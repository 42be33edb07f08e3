"""Gemma 3's config.json, in all its dialects, as one typed config, and the tensors that it implies.

Dialects, by the transformers version that writes them: 4.50 to 4.56 have `rope_theta`, `rope_local_base_freq`,
`rope_scaling` and `sliding_window_pattern`; 4.57 adds `layer_types` and `_sliding_window_pattern`; 5.x nests
`rope_parameters.{full_attention, sliding_attention}`. Some files have both. The published `text_config` of 4b and
larger models is sparse: absent fields have the defaults of `Gemma3TextConfig`.
"""

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import Field

from t5g2convert.checkpoint.families.config_section import (
    MAX_DEPTH,
    Depth,
    ExpectedTensor,
    Positive,
    Scalar,
    Size,
    SourceModel,
    Token,
    describe_model_type,
    parse_section,
    refuse_bidirectional,
    subsection,
    whole,
)
from t5g2convert.checkpoint.families.known_settings import GEMMA3, GEMMA3_TEXT, SIGLIP
from t5g2convert.checkpoint.families.rope_config import LayerType, Rope, read_layer_ropes
from t5g2convert.checkpoint.families.setting_rules import Left, account, left_note, present
from t5g2convert.checkpoint.families.text_and_vision import (
    GemmaText,
    ImageTokens,
    SiglipConfig,
    activation_note,
    check_images,
    check_multiple,
    check_stack,
    stack_fields,
    stack_tensors,
    tower_fields,
    vision_tensors,
)
from t5g2convert.errors import CheckpointError, MappingError

MULTIMODAL: Final = "gemma3"
TEXT_ONLY: Final = "gemma3_text"
TOWERLESS: Final = (
    f"model_type is {MULTIMODAL}, but it has no vision tower tensors (mlx-lm saves models this way): it is read as a "
    "text-only model, and --vision-from gives it a tower"
)
"""The note on a multimodal model without its tower."""
TOWER_MODULES: Final = frozenset({"vision_tower", "multi_modal_projector"})
"""Modules of a multimodal Gemma 3 that only images need, under the names common to all spellings."""


OWN_TOKENS: Final[tuple[str, ...]] = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Ids that published files have at the top and not in text_config."""


class Gemma3Text(GemmaText):
    """The text model, with field names and defaults of transformers' Gemma3TextConfig."""

    vocab_size: Size = 262_208
    tie_word_embeddings: bool = True
    # Settled from the dialects before validation; never absent afterwards.
    rope_full_theta: Positive
    rope_full_factor: Positive
    rope_sliding_theta: Positive

    @property
    def ropes(self) -> Mapping[LayerType, Rope]:
        """The position embedding of each kind of layer."""
        return {
            "full_attention": Rope(rope_type="linear", rope_theta=self.rope_full_theta, factor=self.rope_full_factor),
            "sliding_attention": Rope(rope_theta=self.rope_sliding_theta),
        }


class Gemma3Vision(SiglipConfig):
    """The vision tower, with field names and defaults of transformers' SiglipVisionConfig."""

    hidden_size: Size = 768
    intermediate_size: Size = 3072
    num_hidden_layers: Annotated[Depth, Field(gt=0)] = 12
    image_size: Size = 224
    patch_size: Size = 16


class Gemma3Tokens(ImageTokens):
    """The multimodal fields at the top of config.json, with defaults of transformers' Gemma3Config."""

    image_token_index: Token = 262_144


@dataclass(frozen=True, slots=True)
class Gemma3:
    """A Gemma 3 model as its config describes it.

    Attributes:
        family: The `model_type` of its config.
        text: Its text model.
        vision: Its vision tower; None for a text-only model.
        tokens: Its image tokens.
        projector: How the projector is made: `copy`, or for a donor's tower also `zeros` or `aligned`.
        projected_width: The output width of the stored projector, in elements.
        notes: Notes on the config for the user.
    """

    family: str
    text: Gemma3Text
    vision: Gemma3Vision | None
    tokens: Gemma3Tokens
    projector: str = "copy"
    projected_width: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def features(self) -> frozenset[str]:
        """`text_only`, or `vision` and how the projector is made."""
        return frozenset({"text_only"} if self.vision is None else {"vision", f"projector_{self.projector}"})

    def with_vision_of(self, donor: "Gemma3", projector: str | None) -> "Gemma3":
        """Return this text-only model with the vision tower of another; see `SourceModel`."""
        if self.vision is not None:
            raise MappingError(
                "--vision-from applies only to sources without images; this one has its own vision tower"
            )
        if donor.vision is None:
            raise MappingError("the --vision-from checkpoint has no vision tower")
        if self.family == MULTIMODAL:
            self._check_tokens(donor)
        width, same = donor.text.hidden_size, donor.text.hidden_size == self.text.hidden_size
        projector = projector or ("copy" if same else "zeros")
        if projector == "copy" and not same:
            raise MappingError(
                f"the donor's projector has output width {width}, the source has {self.text.hidden_size}",
                hint="--projector zeros or aligned",
            )
        return replace(self, vision=donor.vision, tokens=donor.tokens, projector=projector, projected_width=width)

    def _check_tokens(self, donor: "Gemma3") -> None:
        """Refuse a donor that marks images with other tokens than this model."""
        differing = [
            f"{name} is {getattr(donor.tokens, name)}, the source's {getattr(self.tokens, name)}"
            for name in ("boi_token_index", "eoi_token_index", "image_token_index")
            if getattr(donor.tokens, name) != getattr(self.tokens, name)
        ]
        if differing:
            raise MappingError(
                f"the --vision-from checkpoint marks images with different tokens: {'; '.join(differing)}"
            )

    @property
    def dims(self) -> Mapping[str, int]:
        """Sizes in elements and counts, by the names that maps use."""
        text, vision = self.text, self.vision or _NO_VISION
        return {
            "rows": text.vocab_size,
            "hidden": text.hidden_size,
            **text.dims,
            "projected": self.projected_width or text.hidden_size,
            "eoi_token": self.tokens.eoi_token_index,
            **vision.dims,
        }

    @property
    def fields(self) -> Mapping[str, str]:
        """The fields of config.json of each dimension."""
        text = "text_config." if self.family == MULTIMODAL else ""
        sizes = {"rows": f"{text}vocab_size", "hidden": f"{text}hidden_size"}
        return {**sizes, **stack_fields(text), **tower_fields("vision_config.")}

    @property
    def values(self) -> Mapping[str, Scalar]:
        """The fields under their own names; tower fields start with `vision_`."""
        vision = (self.vision or _NO_VISION).model_dump()
        return {
            **self.text.model_dump(),
            **self.tokens.model_dump(),
            **{f"vision_{name}": value for name, value in vision.items()},
        }


def read_gemma3(config: Mapping[str, Any], where: Path, tensors: Collection[str] | None = None) -> Gemma3:
    """Read a Gemma 3 config in any dialect, and fill in its defaults.

    Args:
        config: config.json.
        where: Its path, for errors.
        tensors: The names of the checkpoint's tensors. A multimodal model without any tower tensor is read as a
            text-only model: mlx-lm saves 4b and larger models without the tower, but keeps their model_type. Without
            names, only the config decides.

    Raises:
        CheckpointError: The config is another model's, a field has the wrong type, two dialects contradict each other,
            or a setting changes the computation and T5Gemma 2 does not support it.
    """
    config = present(config)
    family, left = config.get("model_type"), list[Left]()
    if family == MULTIMODAL:
        section, fields = "text_config", subsection(config, "text_config", where)
        refuse_bidirectional(config, where)
        left += account(GEMMA3, config, where)
        _refuse_model_type(fields, (TEXT_ONLY, MULTIMODAL), where, section)
        vision = None
        if tensors is None or has_tower(tensors):
            tower = subsection(config, "vision_config", where)
            left += account(SIGLIP, tower, where, "vision_config.")
            _refuse_model_type(tower, ("siglip_vision_model",), where, "vision_config")
            vision = parse_section(Gemma3Vision, tower, where, "vision_config")
        tokens = parse_section(Gemma3Tokens, {**config, **_renamed(config, where)}, where)
        settled = {key: config[key] for key in OWN_TOKENS if key in config}
        settled["tie_word_embeddings"] = config.get("tie_word_embeddings", True)
    elif family == TEXT_ONLY:
        section, fields, vision, tokens, settled = "", config, None, Gemma3Tokens(), {}
    else:
        raise CheckpointError(f"{describe_model_type(config)} is not Gemma 3", where=where)
    dot = f"{section}." if section else ""
    refuse_bidirectional(fields, where, section)
    ropes = read_layer_ropes(fields, where, dot)
    left += [*account(GEMMA3_TEXT, fields, where, dot), *ropes.left]
    settled |= {
        "layer_types": _layer_types(fields, where),
        "rope_full_theta": ropes.full_theta,
        "rope_full_factor": ropes.full_factor,
        "rope_sliding_theta": ropes.sliding_theta,
    }
    text = parse_section(Gemma3Text, {**fields, **settled}, where, section)
    check_stack(text, where, section)
    if family == MULTIMODAL and vision is None and text.final_logit_softcapping is not None:
        raise CheckpointError(
            f"text_config.final_logit_softcapping is {text.final_logit_softcapping}: the multimodal class ignores it, "
            "the text-only class does not",
            where=where,
            hint="set it to null in a copy of config.json to convert the model as the multimodal class computes it",
        )
    if vision is not None:
        check_multiple(vision, "hidden_size", "num_attention_heads", where, "vision ")
        if tensors is not None:
            check_images(tokens, vision, where)
    notes = (*left_note(left), *_notes(config, fields, text, section))
    return Gemma3(family, text, vision, tokens, notes=notes)


def is_towerless(model: SourceModel) -> bool:
    """Return whether a model has a multimodal model_type but no tower."""
    return model.family == MULTIMODAL and "text_only" in model.features


def has_tower(tensors: Collection[str]) -> bool:
    """Return whether any tensor belongs to a vision tower or its projector.

    >>> has_tower(["language_model.model.norm.weight"]), has_tower(["model.vision_tower.post_layernorm.bias"])
    (False, True)
    """
    return any(not TOWER_MODULES.isdisjoint(name.split(".")) for name in tensors)


_NO_VISION: Final = Gemma3Vision()


def _layer_types(fields: Mapping[str, Any], where: Path) -> object:
    """Return the listed kinds of layers, or derive them from the pattern: by default five sliding, one full."""
    if fields.get("layer_types") is not None:
        return fields["layer_types"]
    pattern = whole(fields.get("sliding_window_pattern", 6))
    if fields.get("_sliding_window_pattern", pattern) != pattern:
        raise CheckpointError(
            f"_sliding_window_pattern is {fields['_sliding_window_pattern']!r}, which readers take for {pattern!r}",
            where=where,
            hint="list the layer kinds in layer_types",
        )
    depth = whole(fields.get("num_hidden_layers", 26))
    if type(depth) is not int or depth > MAX_DEPTH:
        return []  # num_hidden_layers is refused by its own name
    if type(pattern) is not int or pattern < 1:
        raise CheckpointError(f"sliding_window_pattern {pattern!r} is not a positive number of layers", where=where)
    return _kinds(pattern, depth)


def _notes(config: Mapping[str, Any], fields: Mapping[str, Any], text: Gemma3Text, section: str) -> Iterator[str]:
    """Yield notes on settings that are overridden by others that they contradict."""
    dot = f"{section}." if section else ""
    for name in ("sliding_window_pattern", "_sliding_window_pattern"):
        pattern = whole(fields.get(name))
        if (
            "layer_types" in fields
            and pattern is not None
            and _kinds(pattern, len(text.layer_types)) != text.layer_types
        ):
            yield f"{dot}{name} is {pattern!r}, but {dot}layer_types lists other kinds of layers, which are taken"
    yield from activation_note(fields, text.hidden_activation, dot)
    if not section:
        return
    for name in ("initializer_range", "tie_word_embeddings", *OWN_TOKENS):
        winner, other = (dot, "") if name == "initializer_range" else ("", dot)
        value, taken = (config if other == "" else fields).get(name), getattr(text, name)
        if value is not None and value != taken:
            yield f"{other}{name} is {value!r}, but {winner}{name} is {taken!r}, which is taken"


def _kinds(pattern: object, depth: int) -> list[str]:
    """Return the kinds of layers of a pattern; an empty list if it is not valid."""
    if type(pattern) is not int or pattern < 1:
        return []
    return ["sliding_attention" if (layer + 1) % pattern else "full_attention" for layer in range(depth)]


def _renamed(config: Mapping[str, Any], where: Path) -> dict[str, Any]:
    """Return the ids of image tokens that are stored under transformers' alternative names."""
    found: dict[str, Any] = {}
    for name in ("boi_token", "eoi_token", "image_token"):
        index, other = f"{name}_index", f"{name}_id"
        if other not in config:
            continue
        if index in config and config[index] != config[other]:
            raise CheckpointError(
                f"{index} is {config[index]!r} but {other} is {config[other]!r}",
                where=where,
                hint="remove the incorrect one",
            )
        found[index] = config[other]
    return found


def _refuse_model_type(fields: Mapping[str, Any], known: tuple[str, ...], where: Path, section: str) -> None:
    """Refuse a section of another model."""
    model_type = fields.get("model_type", known[0])
    if model_type not in known:
        raise CheckpointError(f"{section}.model_type is {model_type!r}, expected {known[0]!r}", where=where)


def gemma3_tensors(config: Mapping[str, Any], where: Path) -> Iterator[ExpectedTensor]:
    """Yield every tensor of Gemma 3 as repositories on the Hub name them, without tied copies and pooling heads.

    Raises:
        CheckpointError: As `read_gemma3`.
    """
    model = read_gemma3(config, where)
    root = "model." if model.vision is None else "language_model.model."
    text = model.text
    yield ExpectedTensor(f"{root}embed_tokens.weight", "embedding", (text.vocab_size, text.hidden_size))
    for name, shape in stack_tensors(text, ("input_layernorm", "post_attention_layernorm")):
        yield ExpectedTensor(root + name, "decoder", shape)
    if model.vision is not None:
        yield from vision_tensors(model.vision, text.hidden_size, "")
