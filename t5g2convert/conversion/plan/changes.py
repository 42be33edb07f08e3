"""The values of the target's config, and its declared changes from the source, which verification accepts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from t5g2convert.checkpoint.families.config_section import MAX_INTEGER
from t5g2convert.checkpoint.families.registry import target_of
from t5g2convert.checkpoint.header import CONFIG_NAMES
from t5g2convert.checkpoint.sources import DECODER_FROM, ROLES, SOURCE, VISION_FROM, Role, role_in
from t5g2convert.conversion.option_values import parse_rope_scaling
from t5g2convert.conversion.options import PlanOptions
from t5g2convert.conversion.plan.drafts import Draft
from t5g2convert.conversion.plan.types import Change
from t5g2convert.errors import MappingError
from t5g2convert.mapping.resolution import Resolution
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.weightmap import LoadedMap, did_you_mean

ROPE_FACTORS: Final = ("rope_full_factor", "rope_factor")
"""The value that `--rope-scaling` sets: the factor of full layers, or of all layers if the family has only one."""


def target_values(resolution: Resolution, options: PlanOptions, weight_map: WeightMap, dtype: str) -> dict[str, Any]:
    """Return the values that the map's config may refer to with a dollar sign.

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
        # The config of an encoder-decoder already names the values of its stacks like this.
        values |= {f"{part}.{name}": value for name, value in stack.items() if "." not in name}
    return values


def changed_values(
    options: PlanOptions, values: Mapping[str, Any], weight_map: WeightMap, owner: str = "the source"
) -> dict[str, Any]:
    """Return the config values that options and a preset change, by name.

    Args:
        options: The options.
        values: The values of the source, or of one stack's parent.
        weight_map: The map with the presets.
        owner: The model that the values belong to, for errors.

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
        # Bound it before converting it to an integer: the source's own factor may be so small that this is infinite.
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
                f"preset {name} requires {field} {needed}, but {owner} has {values[field]}",
                hint="use --rope-scaling and --sliding-window instead",
            )
    return dict(preset.settings.chosen)


def declared_changes(
    resolution: Resolution, drafts: Sequence[Draft], config: Mapping[str, Any], loaded: LoadedMap, model_dtype: str
) -> Iterator[Change]:
    """Yield the settings that differ between target and source, or between a stack and its parent.

    Args:
        resolution: The map applied to the source.
        drafts: The target's tensors.
        config: The target's config.
        loaded: The map.
        model_dtype: The target's safetensors dtype.
    """
    given = {(role_in(span.file), draft.content.dtype) for draft in drafts for span in draft.content.spans[:1]}
    cast = sorted((ROLES.index(role), CONFIG_NAMES[dtype]) for role, dtype in given if dtype != model_dtype)
    if cast and all(draft.dtype == model_dtype for draft in drafts):
        found = ", ".join(f"{_OWNERS[ROLES[number]]}{dtype}" for number, dtype in cast)
        yield Change("dtype", found, CONFIG_NAMES[model_dtype])
    rows, vocab = resolution.table[1], resolution.dims["vocab"]
    if vocab != rows:
        yield Change("vocab_size", rows, vocab)
    for name, before in resolution.model.values.items():
        if resolution.values[name] != before:
            yield Change(name, before, resolution.values[name])
    for path, name in _WRITTEN_OUT.items():
        for part, stack in target_of(config, loaded.path).stacks.items():
            before, after = resolution.stacks[part].get(name), setting(config, stack + path)
            if before is not None and after is not None and after != before:
                yield Change(stack + path, before, after)


_OWNERS: Final[Mapping[Role, str]] = {
    SOURCE: "",
    DECODER_FROM: "the decoder's parent's ",
    VISION_FROM: "the donor's ",
}
"""The owner of a dtype, as a prefix of its name."""

_WRITTEN_OUT: Final = {
    "rope_parameters.full_attention.factor": "rope_full_factor",
    "rope_parameters.full_attention.rope_theta": "rope_full_theta",
    "rope_parameters.sliding_attention.rope_theta": "rope_sliding_theta",
    "rope_parameters.factor": "rope_factor",
    "rope_parameters.rope_theta": "rope_theta",
    "sliding_window": "sliding_window",
    "max_position_embeddings": "max_position_embeddings",
}
"""Settings of a stack, by path, that a map may set itself: the settings for long contexts."""


def setting(config: Mapping[str, Any], path: str) -> Any:
    """Return the value at a path of keys in a config; None if there is none."""
    node: Any = config
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node
