"""Name patterns. The grammar, in full:

    pattern     = [ root ] literal { index literal }
    root        = "{text}" | "{vision}" | ...      a key of the map's `roots`, only at the start of the pattern; one of
                                                   its spellings replaces it
    index       = "{layer}" | "{vision_layer}"     a layer's number without leading zeros, less than the config's depth;
                | "{encoder_layer}" | ...          an encoder-decoder has an index for each stack
    literal     = any characters except braces     matched exactly

Names are not searched by pattern: a pattern is *expanded* over the layers of the model into whole names, which are
looked up. So a name cannot match by accident, and a layer too many or too few is an unused or a missing name.

    >>> [name for _, name in expand("{text}layers.{layer}.mlp", {"text": "model."}, {"layers": 2})]
    ['model.layers.0.mlp', 'model.layers.1.mlp']
"""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Final

INDEX_RANGES: Final = {
    "layer": "layers",
    "encoder_layer": "encoder_layers",
    "decoder_layer": "decoder_layers",
    "vision_layer": "vision_layers",
}
"""The dimension that limits each index placeholder."""

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def placeholders(pattern: str) -> list[str]:
    """Return the names in braces, in order."""
    return _PLACEHOLDER.findall(pattern)


def root_of(pattern: str) -> str | None:
    """Return the root of a pattern, if it has one."""
    first = _PLACEHOLDER.match(pattern)
    return first[1] if first and first[1] not in INDEX_RANGES else None


def index_of(pattern: str) -> str | None:
    """Return the index placeholder of a pattern, if it has one."""
    return next((name for name in placeholders(pattern) if name in INDEX_RANGES), None)


def unknown_placeholder(pattern: str, roots: Mapping[str, object]) -> str | None:
    """Return the first name in braces that is neither a root nor an index."""
    return next((name for name in placeholders(pattern) if name not in INDEX_RANGES and name not in roots), None)


def pattern_fault(pattern: str, roots: Mapping[str, object], dims: Collection[str]) -> str | None:
    """Return why a pattern is not valid for a source with these dimensions, or None."""
    names = placeholders(pattern)
    if "{" in _PLACEHOLDER.sub("", pattern) or "}" in _PLACEHOLDER.sub("", pattern):
        return "unbalanced braces"
    for position, name in enumerate(names):
        if name in INDEX_RANGES:
            if INDEX_RANGES[name] not in dims:
                return f"the source has no {INDEX_RANGES[name].replace('_', ' ')} to count {{{name}}}"
            continue
        if name not in roots:
            return f"unknown root or index {{{name}}}"
        if position or not pattern.startswith("{"):
            return f"the root {{{name}}} must come first"
    if len([name for name in names if name in INDEX_RANGES]) > 1:
        return "more than one index"
    return None


def expand(
    pattern: str, roots: Mapping[str, str], dims: Mapping[str, int], layers: Iterable[int] | None = None
) -> Iterator[tuple[int | None, str]]:
    """Yield all names of a pattern, each with its layer (None for a pattern without an index).

    Args:
        pattern: The pattern.
        roots: The spelling of each root.
        dims: The model's sizes, which limit the index.
        layers: The layers to expand; None for all.
    """
    root = root_of(pattern)
    if root is not None:
        pattern = pattern.replace(f"{{{root}}}", roots[root])
    index = index_of(pattern)
    if index is None:
        yield None, pattern
        return
    for layer in range(dims[INDEX_RANGES[index]]) if layers is None else layers:
        yield layer, pattern.replace(f"{{{index}}}", str(layer))
