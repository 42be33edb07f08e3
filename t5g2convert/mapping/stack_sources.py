"""The checkpoint, layers and embedding table from which each text stack of the target is made."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from t5g2convert.checkpoint.families.config_section import SourceModel
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.sources import DECODER_FROM, SOURCE, STACKS, Role
from t5g2convert.errors import MappingError
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.template import has_value

Layers = Mapping[str, tuple[int, ...]]
"""The layers that a stack takes from its parent, by part and in order; a stack that takes all is not listed."""


@dataclass(frozen=True, slots=True)
class StackSources:
    """The checkpoints of a target other than its source, and what the target takes from each.

    Attributes:
        others: The other checkpoints, by role.
        projector: How a donor's projector gets the source's width; see `SourceModel.with_vision_of`.
        table: The role of the checkpoint that gives the embedding table.
        layers: The layers of each stack.
        rows: Rows of the target's embedding table; None for the number that the map keeps.
        encoder_norm: The one factor by which the encoder's final norm multiplies, instead of its parent's; None for its
            parent's.
    """

    others: Mapping[Role, Checkpoint] = field(default_factory=dict)
    projector: str | None = None
    table: Role = SOURCE
    layers: Layers = field(default_factory=dict)
    rows: int | None = None
    encoder_norm: float | None = None


SOURCE_ONLY: Final = StackSources()

SHARED_SIZES: Final = {"hidden": "hidden_size", "vocab": "rows of the embedding table"}
"""Dimensions that must be equal in both parents, with their names in errors."""

SHARED_VALUES: Final = ("attention_dropout",)
"""Config values that must be equal in both parents: the target's class has one value for both stacks."""


def check_map(weight_map: WeightMap, stack_sources: StackSources) -> None:
    """Refuse a map that lacks what an option needs: settings for each stack, or the encoder's final norm.

    Raises:
        MappingError: The map does not fit the option, which the error names.
    """
    options = {f"--{part}-layers": part for part in stack_sources.layers}
    if DECODER_FROM in stack_sources.others:
        options["--decoder-from"] = "decoder"
    for option, part in options.items():
        if not has_value(weight_map.config, f"{part}.num_hidden_layers"):
            reason = f"its target has no {part} settings of its own"
            raise MappingError(f"{option} cannot be used with mapping {weight_map.name!r}: {reason}")
    if stack_sources.encoder_norm is not None and not any(row.encoder_norm for row in weight_map.weights):
        raise MappingError(f"--encoder-norm cannot be used with mapping {weight_map.name!r}: no row has encoder_norm")


def check_fit(
    sizes: Mapping[str, int], values: Mapping[str, Any], decoder_sizes: Mapping[str, int], decoder: Mapping[str, Any]
) -> None:
    """Refuse a parent of the decoder with states or tokens of another size than the source's.

    Args:
        sizes: The source's dimensions, with `vocab` after the cut.
        values: The source's config values.
        decoder_sizes: The dimensions of the decoder's parent.
        decoder: The config values of the decoder's parent.

    Raises:
        MappingError: The parents differ (the error lists all differing values), or the source is an encoder-decoder.
    """
    if "layers" not in sizes:
        raise MappingError("--decoder-from applies only to decoder-only sources")
    differing = [
        f"{what} {decoder_sizes[name]}, not {sizes[name]}"
        for name, what in SHARED_SIZES.items()
        if decoder_sizes[name] != sizes[name]
    ]
    differing += [
        f"{name} {decoder[name]}, not {values[name]}"
        for name in SHARED_VALUES
        if name in values and decoder.get(name) != values[name]
    ]
    if differing:
        raise MappingError(
            f"the --decoder-from checkpoint does not fit the source: it has {', '.join(differing)}",
            hint="both stacks share the embedding table and the width of their states",
        )


def check_layers(layers: Layers, depths: Mapping[str, int | None]) -> Layers:
    """Return the layers to take, without stacks that take all.

    Args:
        layers: The layers of each stack from the options.
        depths: The number of layers of each stack's parent; None for an encoder-decoder.

    Raises:
        MappingError: A parent has no such layer.
    """
    taken = {}
    for part in (part for part in STACKS if part in layers):
        depth = depths[part]
        if depth is None:
            raise MappingError(f"--{part}-layers applies only to decoder-only sources")
        if layers[part][-1] >= depth:
            raise MappingError(
                f"--{part}-layers takes layer {layers[part][-1]}, the {part}'s parent has {depth} layers",
                hint=f"layers are counted from 0 to {depth - 1}",
            )
        if len(layers[part]) < depth:
            taken[part] = layers[part]
    return taken


def stack_values(values: Mapping[str, Any], layers: tuple[int, ...] | None) -> Mapping[str, Any]:
    """Return the config values of a stack: its parent's, with the number and kinds of the layers that it takes."""
    if layers is None:
        return values
    kinds = values["layer_types"]
    return {**values, "num_hidden_layers": len(layers), "layer_types": [kinds[layer] for layer in layers]}


def depth_of(model: SourceModel) -> int | None:
    """Return the number of text layers of a decoder-only source, None for an encoder-decoder."""
    return model.dims.get("layers")
