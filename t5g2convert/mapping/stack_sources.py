"""Encoder and decoder of other make: another parent for the decoder, some of the layers, the table of either."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from t5g2convert.checkpoint.families.config_section import SourceModel
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.checkpoint.inputs import DECODER_FROM, SOURCE, STACKS, Role
from t5g2convert.errors import MappingError
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.template import has_value

Layers = Mapping[str, tuple[int, ...]]
"""By part, the layers that a stack takes of its parent, in its order; a stack that takes all of them is not named."""


@dataclass(frozen=True, slots=True)
class Pairing:
    """What a target is made of beside its source.

    Attributes:
        others: The other checkpoints, by role.
        projector: How a donor's projector comes to the source's width; see `SourceModel.with_vision_of`.
        table: The role of the checkpoint that gives the embedding table.
        layers: What each stack takes.
        rows: Rows of the target's embedding table; None for what the map keeps of that many.
    """

    others: Mapping[Role, Checkpoint] = field(default_factory=dict)
    projector: str | None = None
    table: Role = SOURCE
    layers: Layers = field(default_factory=dict)
    rows: int | None = None


ALONE: Final = Pairing()
"""A source and nothing else."""

SHARED_SIZES: Final = {"hidden": "hidden_size", "vocab": "rows of the embedding table"}
"""Sizes that both parents must have, by dimension, and what they are."""

SHARED_VALUES: Final = ("attention_dropout",)
"""Config values that both parents must have: the target's class has one for both stacks."""


def check_map(weight_map: WeightMap, pairing: Pairing) -> None:
    """Refuse a map whose config gives both stacks the settings of the source, where they need their own.

    Raises:
        MappingError: With the option that it cannot follow.
    """
    asked = {f"--{part}-layers": part for part in pairing.layers}
    if DECODER_FROM in pairing.others:
        asked["--decoder-from"] = "decoder"
    for option, part in asked.items():
        if not has_value(weight_map.config, f"{part}.num_hidden_layers"):
            raise MappingError(
                f"{option} is not for mapping {weight_map.name!r}: its target has no {part} of settings of its own",
            )


def check_fit(
    sizes: Mapping[str, int], values: Mapping[str, Any], decoder_sizes: Mapping[str, int], decoder: Mapping[str, Any]
) -> None:
    """Refuse a parent of the decoder whose states or tokens are of another size than the source's.

    Args:
        sizes: The source's dims, `vocab` behind the cut.
        values: The source's config values.
        decoder_sizes: The same of the decoder's parent.
        decoder: The same of the decoder's parent.

    Raises:
        MappingError: All that differs, with both values; or the source has a decoder of its own beside an encoder.
    """
    if "layers" not in sizes:
        raise MappingError("--decoder-from is for decoder-only sources")
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
            f"the checkpoint given by --decoder-from does not fit the source: it has {', '.join(differing)}",
            hint="both stacks share the embedding table and the width of their states",
        )


def check_layers(layers: Layers, depths: Mapping[str, int | None]) -> Layers:
    """The layers that are taken, without those of a stack that takes all.

    Args:
        layers: What is asked for.
        depths: By part, how many layers its parent has; None where that is no single number.

    Raises:
        MappingError: A parent has no such layer.
    """
    taken = {}
    for part in (part for part in STACKS if part in layers):
        depth = depths[part]
        if depth is None:
            raise MappingError(f"--{part}-layers is for decoder-only sources")
        if layers[part][-1] >= depth:
            raise MappingError(
                f"--{part}-layers takes layer {layers[part][-1]}, the {part}'s parent has {depth} layers",
                hint=f"they are counted from 0 to {depth - 1}",
            )
        if len(layers[part]) < depth:
            taken[part] = layers[part]
    return taken


def stack_values(values: Mapping[str, Any], layers: tuple[int, ...] | None) -> Mapping[str, Any]:
    """The config values of a stack: its parent's, with the layers that it takes; a kind goes with its layer."""
    if layers is None:
        return values
    kinds = values["layer_types"]
    return {**values, "num_hidden_layers": len(layers), "layer_types": [kinds[layer] for layer in layers]}


def depth_of(model: SourceModel) -> int | None:
    """How many text layers a source has, if it has one stack of them."""
    return model.dims.get("layers")
