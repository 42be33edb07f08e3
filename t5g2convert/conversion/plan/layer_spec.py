"""The grammar of `--encoder-layers` and `--decoder-layers`, which select layers of a parent:

    SPEC    = "first:" N | item { "," item }       a single number is refused: write N:N+1
    item    = number | A ":" B [ ":" STEP ]        from A to below B, as Python's range

Numbers count the parent's layers from 0, and increase.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from t5g2convert.checkpoint.families.config_section import MAX_DEPTH
from t5g2convert.errors import UsageError

LayerSpec = str | Sequence[int]
"""The type of the options in the Python API: a SPEC, or the numbers themselves."""

FORMS: Final = "expected first:N, a range A:B or A:B:STEP, or a list as 0,3,5:12"


def parse_layers(spec: LayerSpec, option: str) -> tuple[int, ...]:
    """Return the numbers of the selected layers, in order.

    Args:
        spec: The selection.
        option: The name of the option, for errors.

    Raises:
        UsageError: The selection is malformed or empty, or has a layer twice or out of order.
    """
    if not isinstance(spec, str | Sequence):
        raise UsageError(f"{option}: {spec!r} is not a selection of layers", hint=FORMS)
    layers = _numbers(spec, option) if isinstance(spec, str) else tuple(spec)
    for layer in layers:
        if type(layer) is not int or not 0 <= layer < MAX_DEPTH:
            raise UsageError(f"{option}: {layer!r} is not the number of a layer", hint="layers are counted from 0")
    if not layers:
        raise UsageError(f"{option} {_shown(spec)} selects no layer", hint="a stack has at least one")
    for before, after in pairwise(layers):
        if after <= before:
            fault = "is selected twice" if after == before else f"comes after {before}"
            raise UsageError(f"{option}: layer {after} {fault}", hint="layers keep their order, each at most once")
    return layers


def _numbers(spec: str, option: str) -> tuple[int, ...]:
    if re.fullmatch(r"[0-9]+", spec):
        number = _number(spec, option)
        raise UsageError(
            f"{option} {spec} is a single number",
            hint=f"first:{number} for the first {number} layers, {number}:{number + 1} for only this one",
        )
    first = re.fullmatch(r"first:([0-9]+)", spec)
    if first is not None:
        return tuple(range(_number(first[1], option)))
    taken: list[int] = []
    for item in spec.split(","):
        if re.fullmatch(r"[0-9]+(:[0-9]+){0,2}", item) is None:
            raise UsageError(f"{option}: {item!r} in {_shown(spec)} is not a selection of layers", hint=FORMS)
        numbers = [_number(text, option) for text in item.split(":")]
        if len(numbers) == 3 and numbers[2] == 0:
            raise UsageError(f"{option}: the step of {item} is 0", hint="expected 1 or more")
        taken += range(*numbers) if len(numbers) > 1 else numbers
    return tuple(taken)


def _number(text: str, option: str) -> int:
    """Parse the number of a layer, or the end of a range of layers."""
    if len(text) > len(str(MAX_DEPTH)) or int(text) > MAX_DEPTH:
        raise UsageError(f"{option}: no model has {text[:20]} layers", hint=f"at most {MAX_DEPTH}")
    return int(text)


def _shown(spec: LayerSpec) -> str:
    return repr(spec if isinstance(spec, str) else list(spec))


def written(layers: Sequence[int], depth: int) -> str:
    """Return the SPEC of layers of a parent with `depth` layers: a range if they are evenly spaced.

    >>> written([1, 3, 5], 6)
    '1:6:2'
    """
    steps = {after - before for before, after in pairwise(layers)}
    if len(steps) != 1:
        return ",".join(map(str, layers)) if steps else f"{layers[0]}:{layers[0] + 1}"
    (step,) = steps
    return f"{layers[0]}:{min(layers[-1] + step, depth)}" + (f":{step}" if step > 1 else "")


def with_full_attention(layers: Sequence[int], kinds: Sequence[str]) -> tuple[int, ...] | None:
    """Return the most similar selection of the same size that keeps full-attention layers.

    Shift the selection as a whole, by the smallest shift that keeps the most full-attention layers. If no shift keeps
    any, replace one layer by the nearest full-attention layer.

    Args:
        layers: A selection without full-attention layers.
        kinds: The kind of each of the parent's layers.

    Returns:
        The selection; None if the parent has no full-attention layer.
    """
    full = [number for number, kind in enumerate(kinds) if kind == "full_attention"]
    if not full:
        return None
    moves = range(-layers[0], len(kinds) - layers[-1])
    moved = [tuple(layer + move for layer in layers) for move in sorted(moves, key=lambda move: (abs(move), -move))]
    best = max(moved, key=lambda chosen: len(set(full).intersection(chosen)))
    if set(full).intersection(best):
        return best
    leaving, coming = min(((old, new) for old in layers for new in full), key=lambda pair: abs(pair[0] - pair[1]))
    return tuple(sorted({*layers, coming} - {leaving}))
