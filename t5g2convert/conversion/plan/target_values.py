"""The values for the target's config: the source's, and what options and presets change."""

from collections.abc import Mapping
from typing import Any, Final

from t5g2convert.checkpoint.families.config_section import MAX_INTEGER
from t5g2convert.conversion.options import PlanOptions, parse_rope_scaling
from t5g2convert.errors import MappingError
from t5g2convert.mapping.resolve import Resolution
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.weightmap import did_you_mean

ROPE_FACTORS: Final = ("rope_full_factor", "rope_factor")
"""The value that `--rope-scaling` sets: that of full layers, or of all layers where a family has one for all."""


def target_values(resolution: Resolution, options: PlanOptions, weight_map: WeightMap, dtype: str) -> dict[str, Any]:
    """Return the values that the map's config may name with a dollar sign.

    Args:
        resolution: The map applied to the source.
        options: The options.
        weight_map: The map.
        dtype: The target's dtype, by its name in config.json.
    """
    values = {
        **resolution.values,
        **changed_values(options, resolution.values, weight_map),
        "vocab": resolution.dims["vocab"],
        "dtype": dtype,
    }
    for part, own in resolution.stacks.items():
        stack = {**own, **changed_values(options, own, weight_map, f"the {part}")}
        # The config of an encoder-decoder already has such names for the values of its stacks.
        values |= {f"{part}.{name}": value for name, value in stack.items() if "." not in name}
    return values


def changed_values(
    options: PlanOptions, values: Mapping[str, Any], weight_map: WeightMap, owner: str = "the source"
) -> dict[str, Any]:
    """Return the config values that options and a preset change, by name.

    Args:
        options: The options.
        values: The values of the source, or of one stack's parent.
        weight_map: The map, which has the presets.
        owner: The model that has the values, for errors.

    Raises:
        MappingError: The map has no such preset, or the preset is for another size of model.
    """
    changed = {} if options.preset is None else _preset(options.preset, values, weight_map, owner)
    factor = parse_rope_scaling(options.rope_scaling)
    if factor is not None:
        name = next((name for name in ROPE_FACTORS if name in values), None)
        if name is None:
            raise MappingError(f"--rope-scaling does not apply to mapping {weight_map.name!r}")
        positions = values["max_position_embeddings"] * (factor / values[name])
        # Bounded before it is made an integer: a source's own factor may be so small that this is infinite.
        changed |= {name: factor, "max_position_embeddings": int(min(max(positions, 1), MAX_INTEGER))}
    if options.sliding_window is not None:
        changed["sliding_window"] = options.sliding_window
    return changed


def _preset(name: str, values: Mapping[str, Any], weight_map: WeightMap, owner: str) -> dict[str, Any]:
    preset = weight_map.presets.get(name)
    if preset is None:
        known = ", ".join(weight_map.presets) or "none"
        raise MappingError(
            f"mapping {weight_map.name!r} has no preset {name!r}",
            hint=did_you_mean(name, weight_map.presets) or f"its presets: {known}",
        )
    for field, needed in preset.requires.items():
        if values[field] != needed:
            raise MappingError(
                f"preset {name} is for {field} {needed}, {owner} has {values[field]}",
                hint="use --rope-scaling and --sliding-window instead",
            )
    return dict(preset.settings.chosen)
