"""Templates of the target's files: plain JSON with placeholders for the source's values.

* `$name` is the source's value; `$vocab` and `$dtype` are the target's.
* `$encoder.name` and `$decoder.name` are the values of the stack's own parent, with the layers that the stack takes.
* `{case: {vision: X, text_only: Y}}` is X or Y, depending on the source's features.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from t5g2convert.checkpoint.sources import STACKS
from t5g2convert.mapping.strictyaml import NodePath

TARGET_VALUES = ("vocab", "dtype")
"""Names of values that planning determines; they are not read from the source's config."""


def value_names(names: Collection[str]) -> set[str]:
    """Return the names that may follow a dollar sign in a config, for a family with these values."""
    plain = [name for name in names if "." not in name]
    return {*names, *(f"{part}.{name}" for part in STACKS for name in plain), *TARGET_VALUES}


def has_value(node: Any, name: str) -> bool:
    """Return whether a template uses a value."""
    if isinstance(node, dict | list):
        return any(has_value(item, name) for item in (node.values() if isinstance(node, dict) else node))
    return bool(node == f"${name}")


def template_faults(
    node: Any, names: set[str], variants: Collection[frozenset[str]], at: NodePath
) -> Iterator[tuple[str, NodePath, str | None]]:
    """Yield every fault of a template: the reason, its path, and the name if an unknown name is the reason.

    Args:
        node: The template.
        names: The names that may follow a dollar sign.
        variants: The sets of features that a source can have; exactly one name of a case must be in each.
        at: The template's place in the map.
    """
    if isinstance(node, str) and node.startswith("$"):
        if node[1:] not in names:
            yield f"unknown value {node}", at, node[1:]
    elif isinstance(node, list):
        for position, item in enumerate(node):
            yield from template_faults(item, names, variants, (*at, position))
    elif isinstance(node, dict):
        if "case" in node and (len(node) != 1 or not _covers(node["case"], variants)):
            known = ", ".join(sorted(frozenset().union(*variants)))
            yield (
                f"case must be the only key, and must have exactly one of its names for every source: {known}",
                at,
                None,
            )
        for key, item in node.items():
            yield from template_faults(item, names, variants, (*at, key))


def _covers(cases: Any, variants: Collection[frozenset[str]]) -> bool:
    """Return whether exactly one case applies in every variant, and every case in some variant."""
    if not isinstance(cases, dict):
        return False
    return all(len(variant & cases.keys()) == 1 for variant in variants) and cases.keys() <= frozenset().union(
        *variants
    )


def fill(node: Any, values: Mapping[str, Any], features: frozenset[str]) -> Any:
    """Return a template with its values filled in; it cannot fail, since templates are checked on loading."""
    if isinstance(node, str) and node.startswith("$"):
        return values[node[1:]]
    if isinstance(node, list):
        return [fill(item, values, features) for item in node]
    if isinstance(node, dict):
        if "case" in node:
            return fill(next(item for name, item in node["case"].items() if name in features), values, features)
        return {key: fill(item, values, features) for key, item in node.items()}
    return node
