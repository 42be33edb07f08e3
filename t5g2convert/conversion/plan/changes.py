"""The settings in which the target differs from its source; verification accepts exactly these."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final

from t5g2convert.checkpoint.dtypes import CONFIG_NAMES
from t5g2convert.checkpoint.families.registry import target_of
from t5g2convert.checkpoint.inputs import DECODER_FROM, ROLES, SOURCE, VISION_FROM, Role, role_in
from t5g2convert.conversion.plan.drafts import Draft
from t5g2convert.conversion.plan.types import Change
from t5g2convert.mapping.resolve import Resolution
from t5g2convert.mapping.weightmap import LoadedMap


def declared_changes(
    resolution: Resolution, drafts: Sequence[Draft], config: Mapping[str, Any], loaded: LoadedMap, model_dtype: str
) -> Iterator[Change]:
    """Yield the settings in which the target differs from the source, or a stack from its parent.

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
"""Settings of a stack, by path, that a map may set itself: those of long contexts."""


def setting(config: Mapping[str, Any], path: str) -> Any:
    """Return the value at a path of keys in a config, None if there is none."""
    node: Any = config
    for key in path.split("."):
        node = node.get(key) if isinstance(node, dict) else None
    return node
