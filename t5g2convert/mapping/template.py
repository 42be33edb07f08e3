"""The target's config as a map writes it: plain JSON in which some values stand for values of the source.

* `$name` is the source's value of that name; `$vocab` and `$dtype` belong to the target.
* `$encoder.name` and `$decoder.name` are the values of that stack's own parent, with the layers that the stack takes.
* `{case: {vision: X, text_only: Y}}` is X or Y, by which of the features holds for the source.
"""

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from t5g2convert.checkpoint.inputs import STACKS
from t5g2convert.mapping.strictyaml import NodePath

TARGET_VALUES = ("vocab", "dtype")
"""Names that are settled while planning, not read from the source's config."""


def value_names(names: Collection[str]) -> set[str]:
    """What may stand behind a dollar sign in a config, for a family whose values have these names."""
    plain = [name for name in names if "." not in name]
    return {*names, *(f"{part}.{name}" for part in STACKS for name in plain), *TARGET_VALUES}


def has_value(node: Any, name: str) -> bool:
    """Whether a template asks for a value, by its name."""
    if isinstance(node, dict | list):
        return any(has_value(item, name) for item in (node.values() if isinstance(node, dict) else node))
    return bool(node == f"${name}")


def template_faults(
    node: Any, names: set[str], variants: Collection[frozenset[str]], at: NodePath
) -> Iterator[tuple[str, NodePath, str | None]]:
    """Every fault of a template: the reason, where it stands, and the unknown name if that is the reason.

    Args:
        node: The template.
        names: What may stand behind a dollar sign.
        variants: The sets of features that may hold; of the names of a case one must hold in each.
        at: Where the template stands.
    """
    if isinstance(node, str) and node.startswith("$"):
        if node[1:] not in names:
            yield f"unknown value {node}", at, node[1:]
    elif isinstance(node, list):
        for position, item in enumerate(node):
            yield from template_faults(item, names, variants, (*at, position))
    elif isinstance(node, dict):
        if "case" in node and (len(node) != 1 or not _settles(node["case"], variants)):
            known = ", ".join(sorted(frozenset().union(*variants)))
            yield f"case must stand alone, and one of its names must hold for every source, of {known}", at, None
        for key, item in node.items():
            yield from template_faults(item, names, variants, (*at, key))


def _settles(cases: Any, variants: Collection[frozenset[str]]) -> bool:
    """Whether one of the cases holds in every variant, and each of them somewhere."""
    if not isinstance(cases, dict):
        return False
    return all(len(variant & cases.keys()) == 1 for variant in variants) and cases.keys() <= frozenset().union(
        *variants
    )


def fill(node: Any, values: Mapping[str, Any], features: frozenset[str]) -> Any:
    """The JSON that a template stands for; templates are checked when the map is loaded, so this cannot fail."""
    if isinstance(node, str) and node.startswith("$"):
        return values[node[1:]]
    if isinstance(node, list):
        return [fill(item, values, features) for item in node]
    if isinstance(node, dict):
        if "case" in node:
            return fill(next(item for name, item in node["case"].items() if name in features), values, features)
        return {key: fill(item, values, features) for key, item in node.items()}
    return node
