"""The reference of weight maps, from their schema and the families."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

from docs.generate.tables import table
from t5g2convert.mapping.schema import WeightMap
from t5g2convert.mapping.source_families import FAMILIES

SIZE: Final = [{"minimum": 0, "type": "integer"}, {"type": "string"}]
"""The schema's type of a tensor's size."""


def weight_map_reference() -> str:
    """Return every declaration of the schema, and the terms that maps of each family may use."""
    schema = WeightMap.model_json_schema(by_alias=True)
    definitions: dict[str, Any] = schema["$defs"]
    order: list[str] = []

    def visit(node: Any) -> None:
        if isinstance(node, dict):
            name = str(node.get("$ref", "")).rpartition("/")[2]
            if name and name not in order:
                order.append(name)
                visit(definitions[name])
            for value in node.values():
                visit(value)
        elif isinstance(node, list):
            for value in node:
                visit(value)

    visit(schema["properties"])
    sections = [_declaration("WeightMap", schema, definitions)]
    sections += [_declaration(name, definitions[name], definitions) for name in order]
    return "\n\n".join([*sections, *_terms()])


def _declaration(name: str, node: Mapping[str, Any], definitions: Mapping[str, Any]) -> str:
    sections = [f"### {name}", *node["description"].split("\n\n")]
    required = node.get("required", [])
    rows = []
    for key, entry in node.get("properties", {}).items():
        holder = _reference(entry) or _reference(entry.get("items", {}))
        told = entry.get("description") or definitions.get(holder, {}).get("description", "")
        rows.append((f"`{key}`", _type(entry), "required" if key in required else "", " ".join(told.split())))
    if rows:
        sections.append(table(("key", "is", "", ""), iter(rows)).strip())
    return "\n\n".join(sections)


def _reference(entry: Mapping[str, Any]) -> str:
    return str(entry.get("$ref", "")).rpartition("/")[2]


def _type(entry: Mapping[str, Any]) -> str:
    """Return a type as text."""
    if name := _reference(entry):
        return f"[{name}](#{name.lower()})"
    if entry.get("anyOf") == SIZE:
        return "a number or a dimension"
    if "anyOf" in entry:
        kinds = [_type(each) for each in entry["anyOf"] if each.get("type") != "null"]
        return " or ".join(dict.fromkeys(kinds))
    if "const" in entry:
        return f"`{entry['const']}`"
    if "enum" in entry:
        return ", ".join(f"`{each}`" for each in entry["enum"])
    kind = entry.get("type")
    if kind == "array":
        return f"list of {_type(entry['items'])}"
    if kind == "object":
        keys = _type(entry["propertyNames"]) if "propertyNames" in entry else "keys"
        inner = entry.get("additionalProperties")
        return f"{keys} to {_type(inner)}" if isinstance(inner, dict) else f"{keys} to anything"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "true or false"}
    told = words[str(kind)]
    for key, how in (("minimum", "from"), ("exclusiveMinimum", "above"), ("pattern", "matching")):
        if key in entry:
            told += f" {how} `{entry[key]}`"
    return told


def _terms() -> Iterator[str]:
    yield "## Terms of each family"
    yield "By the `model_type` of the source: names allowed in `shape:`, after `$`, and in `when:` and `case:`."
    told: dict[tuple[str, ...], list[str]] = {}
    for name, family in FAMILIES.items():
        variants = " or ".join(" and ".join(f"`{it}`" for it in sorted(variant)) for variant in family.variants)
        listed = [", ".join(f"`{it}`" for it in sorted(them)) for them in (family.terms.dims, family.terms.values)]
        told.setdefault((*listed, variants), []).append(f"`{name}`")
    for (dims, values, variants), names in told.items():
        yield f"### {', '.join(names)}"
        yield f"- dimensions: {dims}; and `vocab`, the rows that the target keeps"
        yield f"- values: {values}; and `vocab`, `dtype`, the target's"
        yield f"- features: {variants}"
