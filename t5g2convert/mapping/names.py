"""Name patterns. The grammar, in full:

    pattern     = [ root ] literal { index literal }
    root        = "{text}" | "{vision}" | ...      a key of the map's `roots`, first in the pattern, stands for one of
                                                   its spellings
    index       = "{layer}" | "{vision_layer}"     digits without leading zeros, below the depth that the config says;
                | "{encoder_layer}" | ...          the stacks of a source that is an encoder-decoder have each its own
    literal     = any characters but braces        matched as they are

Nothing is ever searched: a pattern is *expanded* over the layers of the model at hand into whole names, which are
looked up. So a name can't match by accident, and a layer too many or too few is a name that is left over.
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
"""Index placeholder to the dim that says how far it counts."""

_PLACEHOLDER = re.compile(r"\{([^{}]*)\}")


def placeholders(pattern: str) -> list[str]:
    """The names in braces, in order."""
    return _PLACEHOLDER.findall(pattern)


def root_of(pattern: str) -> str | None:
    """The root of a pattern, if it has one."""
    first = _PLACEHOLDER.match(pattern)
    return first[1] if first and first[1] not in INDEX_RANGES else None


def index_of(pattern: str) -> str | None:
    """The index placeholder of a pattern, if it has one."""
    return next((name for name in placeholders(pattern) if name in INDEX_RANGES), None)


def unknown_placeholder(pattern: str, roots: Mapping[str, object]) -> str | None:
    """The first name in braces that is neither root nor index."""
    return next((name for name in placeholders(pattern) if name not in INDEX_RANGES and name not in roots), None)


def pattern_fault(pattern: str, roots: Mapping[str, object], dims: Collection[str]) -> str | None:
    """Why a pattern is not of the grammar, or None; `dims` are those that the source's family has."""
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
    """All names that a pattern stands for, each with its layer (None for a pattern without index).

    Args:
        pattern: The pattern.
        roots: The spelling of each root.
        dims: Sizes; they say how far an index counts.
        layers: What the index counts, if not all layers.
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
