"""The rotary position embedding in the dialects of config.json: one number where several spellings may give it.

transformers 4 writes `rope_theta` and `rope_scaling`, 5 `rope_parameters`; some files carry both.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from t5g2convert.errors import CheckpointError


class Rope(NamedTuple):
    """The base of the wavelengths, and the factor that positions are divided by."""

    theta: float
    factor: float


def read_rope(fields: Mapping[str, Any], default_theta: float, where: Path, section: str = "") -> Rope:
    """The embedding of a model that has one for all its layers.

    Args:
        fields: A section of config.json.
        default_theta: What holds where no spelling is there.
        where: The file, for errors.
        section: The section's name with a dot behind it, for errors.

    Raises:
        CheckpointError: A spelling of the wrong type, two that contradict each other, or a kind other than default and
            linear.
    """
    parameters, scaling = (object_of(fields, key, where, section) for key in ("rope_parameters", "rope_scaling"))
    names = f"{section}rope_parameters", f"{section}rope_scaling"
    factors = {
        f"{name}.factor": stated_factor(name, node, where)
        for name, node in zip(names, (parameters, scaling), strict=True)
    }
    thetas = {f"{section}rope_theta": fields.get("rope_theta"), f"{names[0]}.rope_theta": parameters.get("rope_theta")}
    return Rope(agreed(thetas, default_theta, where), agreed(factors, 1.0, where))


def agreed(spellings: Mapping[str, object], default: float, where: Path) -> float:
    """The positive number that all spellings of a setting give that are there, by their names.

    Raises:
        CheckpointError: One is no such number, or two give different ones.
    """
    given = {name: value for name, value in spellings.items() if value is not None}
    for name, value in given.items():
        if type(value) not in (int, float) or not 0 < value <= sys.float_info.max:  # type: ignore[operator]
            raise CheckpointError(f"{name} is {value!r}, expected a positive number", where=where)
    if len(set(given.values())) > 1:
        told = " but ".join(f"{name} says {value}" for name, value in given.items())
        raise CheckpointError(told, where=where, hint="remove the wrong one")
    return float(next(iter(given.values()), default))  # type: ignore[arg-type]


def stated_factor(name: str, section: Mapping[str, Any], where: Path) -> object:
    """The factor that a section states: its own where it is linear, 1 where it is default, None where it says neither.

    Raises:
        CheckpointError: Another kind, or a linear one without a factor.
    """
    kind = section.get("rope_type", section.get("type", "default"))
    if kind not in ("default", "linear"):
        raise CheckpointError(f"{name} has rope_type {kind!r}; only default and linear are converted", where=where)
    if kind == "linear" and section.get("factor") is None:
        raise CheckpointError(f"{name} is linear but has no factor", where=where)
    return section["factor"] if kind == "linear" else 1.0 if section.get("rope_type") else None


def object_of(fields: Mapping[str, Any], key: str, where: Path, section: str = "") -> Mapping[str, Any]:
    """The object under a key; an empty one where it is absent or null.

    Raises:
        CheckpointError: It is no object.
    """
    node = fields.get(key) or {}
    if not isinstance(node, dict):
        raise CheckpointError(f"{section}{key} is not an object", where=where)
    return node
