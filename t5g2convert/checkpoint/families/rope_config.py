"""The rotary position embedding in all dialects of config.json: one number from several possible spellings.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 `rope_parameters`; some files have both. A
spelling is read if all readers agree on its meaning, and refused otherwise. It is never silently read as no scaling.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from pydantic import model_validator

from t5g2convert.checkpoint.families.config_section import ConfigSection, Positive
from t5g2convert.checkpoint.families.known_settings import ROPE
from t5g2convert.checkpoint.families.setting_rules import Left, account
from t5g2convert.errors import CheckpointError

LayerType = Literal["sliding_attention", "full_attention"]

LAYER_TYPES: Final = ("full_attention", "sliding_attention")


class Rope(ConfigSection):
    """The rotary position embedding of one kind of layer; a linear factor divides the frequencies."""

    rope_type: Literal["default", "linear"] = "default"
    rope_theta: Positive
    factor: Positive = 1.0

    @model_validator(mode="before")
    @classmethod
    def _older_spelling(cls, fields: Any) -> Any:
        """Accept `type`, the name in transformers 4, which newer versions still read if `rope_type` is absent."""
        if isinstance(fields, dict) and fields.get("rope_type") is None and fields.get("type") is not None:
            return {**fields, "rope_type": fields["type"]}
        return fields

    @property
    def linear_factor(self) -> float:
        """The effective factor: always 1 for a default embedding."""
        return self.factor if self.rope_type == "linear" else 1.0


class LayerRopes(NamedTuple):
    """The rotary embeddings of full and of sliding layers, and the unused settings."""

    full_theta: float
    full_factor: float
    sliding_theta: float
    left: tuple[Left, ...]


def read_rope(
    fields: Mapping[str, Any], default_theta: float, where: Path, section: str = ""
) -> tuple[Rope, tuple[Left, ...]]:
    """Read the embedding of a model with one embedding for all layers, and the settings that are not used.

    Args:
        fields: A section of config.json, without nulls.
        default_theta: The theta if no spelling is present.
        where: The file, for errors.
        section: The section's name with a dot behind it, for errors.

    Raises:
        CheckpointError: A spelling has the wrong type, two spellings contradict each other, or the kind is neither
            default nor linear.
    """
    names = [f"{section}rope_parameters", f"{section}rope_scaling"]
    nodes = [object_of(fields, key, where, section) for key in ("rope_parameters", "rope_scaling")]
    for name, node in zip(names, nodes, strict=True):
        _refuse_layer_types(name, node, where, "this model has one rotary embedding for all layers")
    factors = {f"{name}.factor": stated_factor(name, node, where) for name, node in zip(names, nodes, strict=True)}
    left = [left for name, node in zip(names, nodes, strict=True) for left in account(ROPE, node, where, f"{name}.")]
    thetas = {f"{section}rope_theta": fields.get("rope_theta"), f"{names[0]}.rope_theta": nodes[0].get("rope_theta")}
    theta = agreed(thetas, default_theta, where)
    _agree_theta(names[1], nodes[1], theta, where)
    return Rope(rope_type="linear", rope_theta=theta, factor=agreed(factors, 1.0, where)), tuple(left)


def read_layer_ropes(fields: Mapping[str, Any], where: Path, section: str = "") -> LayerRopes:
    """Read the embeddings of a Gemma 3 in any dialect; all spellings must agree.

    Args:
        fields: The text section of config.json, without nulls.
        where: The file, for errors.
        section: The section's name with a dot behind it, for errors.

    Raises:
        CheckpointError: A spelling has the wrong type, two spellings contradict each other, readers disagree on the
            meaning of a spelling, the kind is neither default nor linear, or layers with a window have a factor.
    """
    parameters, scaling = f"{section}rope_parameters", f"{section}rope_scaling"
    given = object_of(fields, "rope_scaling", where, section)
    nested = object_of(fields, "rope_parameters", where, section)
    _refuse_layer_types(scaling, given, where, "readers apply rope_scaling to full layers only")
    full, sliding = (object_of(nested, kind, where, f"{parameters}.") for kind in LAYER_TYPES)
    names = [f"{parameters}.{kind}" for kind in LAYER_TYPES]
    full_factors = {
        f"{scaling}.factor": stated_factor(scaling, given, where, bare_type=False),
        f"{names[0]}.factor": stated_factor(names[0], full, where),
    }
    sliding_factor = stated_factor(names[1], sliding, where)
    if sliding_factor not in (None, 1):
        raise CheckpointError(
            f"{names[1]} has factor {sliding_factor!r}", where=where, hint="Gemma 3 scales full layers only"
        )
    left = [
        item
        for name, node in ((scaling, given), (names[0], full), (names[1], sliding))
        for item in account(ROPE, node, where, f"{name}.")
    ]
    full_thetas = {f"{section}rope_theta": fields.get("rope_theta"), f"{names[0]}.rope_theta": full.get("rope_theta")}
    sliding_thetas = {
        f"{section}rope_local_base_freq": fields.get("rope_local_base_freq"),
        f"{names[1]}.rope_theta": sliding.get("rope_theta"),
    }
    full_theta = agreed(full_thetas, 1_000_000.0, where)
    _agree_theta(scaling, given, full_theta, where)
    _refuse_flat(parameters, nested, full_theta, where)
    return LayerRopes(
        full_theta, agreed(full_factors, 1.0, where), agreed(sliding_thetas, 10_000.0, where), tuple(left)
    )


def agreed(spellings: Mapping[str, object], default: float, where: Path) -> float:
    """Return the positive number that all present spellings of a setting give; `spellings` has them by name.

    Raises:
        CheckpointError: A value is not a positive number, or two values disagree.
    """
    given = {name: value for name, value in spellings.items() if value is not None}
    for name, value in given.items():
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
            raise CheckpointError(f"{name} is {value!r}, expected a positive number", where=where)
    if len(set(given.values())) > 1:
        told = " but ".join(f"{name} says {value}" for name, value in given.items())
        raise CheckpointError(told, where=where, hint="remove the incorrect one")
    return float(next(iter(given.values()), default))  # type: ignore[arg-type]


def stated_factor(name: str, section: Mapping[str, Any], where: Path, *, bare_type: bool = True) -> object:
    """Return the factor that a section states: its own for linear, 1 for default, None if it states neither.

    Args:
        name: The section's name, for errors.
        section: Its settings, without nulls.
        where: The file, for errors.
        bare_type: Whether all readers accept `type` if rope_type is absent.

    Raises:
        CheckpointError: The kind is another one, there are two kinds, a linear kind lacks a factor, or a factor has
            another kind.
    """
    kind, older = section.get("rope_type"), section.get("type")
    if kind is not None and older is not None and kind != older:
        raise CheckpointError(
            f"{name}.rope_type is {kind!r} but {name}.type is {older!r}", where=where, hint="remove the incorrect one"
        )
    stated = kind if kind is not None else older
    if stated not in (None, "default", "linear"):
        raise CheckpointError(f"{name} has rope_type {stated!r}; only default and linear are converted", where=where)
    factor = section.get("factor")
    if stated == "linear" and factor is None:
        raise CheckpointError(f"{name} is linear but has no factor", where=where)
    if stated == "linear":
        if kind is None and not bare_type and factor != 1:
            raise CheckpointError(
                f"{name}.type is 'linear' without a rope_type: transformers 4 divides by the factor {factor!r}, "
                "transformers 5 does not",
                where=where,
                hint="rename it to rope_type if the factor is intended, or remove it",
            )
        return factor
    if factor is not None and factor != 1:
        said = "has no rope_type" if stated is None else "is of rope_type 'default'"
        raise CheckpointError(
            f"{name}.factor is {factor!r}, but {name} {said}: readers ignore the factor",
            where=where,
            hint="set rope_type to linear if the factor is intended, or remove it",
        )
    return 1.0 if stated is not None or factor is not None else None


def object_of(fields: Mapping[str, Any], key: str, where: Path, section: str = "") -> Mapping[str, Any]:
    """Return the object under a key; an empty one if it is absent or null.

    Raises:
        CheckpointError: The value is not an object.
    """
    node = fields.get(key)
    if node is None:
        return {}
    if not isinstance(node, dict):
        raise CheckpointError(f"{section}{key} is not an object", where=where)
    return node


def _refuse_layer_types(name: str, node: Mapping[str, Any], where: Path, because: str) -> None:
    """Refuse sections of layer types where readers do not expect them."""
    found = [kind for kind in LAYER_TYPES if kind in node]
    if found:
        raise CheckpointError(
            f"{name}.{found[0]} is ignored by transformers: {because}",
            where=where,
            hint="move the layer types to rope_parameters"
            if name.endswith("rope_scaling")
            else "write the settings without layer types",
        )


def _refuse_flat(name: str, nested: Mapping[str, Any], full_theta: float, where: Path) -> None:
    """Refuse settings outside of a layer type, which transformers ignores, unless they repeat the effective values."""
    same = {"rope_type": "default", "type": "default", "rope_theta": full_theta, "factor": 1}
    for key, value in nested.items():
        if key not in LAYER_TYPES and not (key in same and value == same[key]):
            raise CheckpointError(
                f"{name}.{key} is {value!r}, not under a layer type: transformers ignores it in Gemma 3",
                where=where,
                hint=f"move it into {name}.full_attention, or remove it",
            )


def _agree_theta(name: str, scaling: Mapping[str, Any], theta: float, where: Path) -> None:
    """Refuse a different theta in rope_scaling: transformers 5 uses it, 4 does not."""
    given = scaling.get("rope_theta")
    if given is not None and agreed({f"{name}.rope_theta": given}, theta, where) != theta:
        raise CheckpointError(
            f"{name}.rope_theta is {given!r}, but {theta!r} elsewhere: transformers 5 uses it, 4 does not",
            where=where,
            hint="write the intended theta as rope_theta outside rope_scaling, and remove the other",
        )
