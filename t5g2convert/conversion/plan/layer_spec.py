"""The layers that `--encoder-layers` and `--decoder-layers` take of a parent. The grammar, in full:

    SPEC    = "first:" N | item { "," item }       a list of one number is written as a range
    item    = number | A ":" B [ ":" STEP ]        from A on and below B, as Python's range

Numbers count the parent's layers from 0, and go up.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from t5g2convert.checkpoint.families.config_section import MAX_DEPTH
from t5g2convert.errors import UsageError

LayerSpec = str | Sequence[int]
"""What the API takes: a SPEC, or the numbers themselves."""

FORMS: Final = "expected first:N, a range A:B or A:B:STEP, or a list as 0,3,5:12"


def parse_layers(spec: LayerSpec, option: str) -> tuple[int, ...]:
    """The numbers of the layers that are taken, in their order.

    Args:
        spec: The layers.
        option: The option's name, for errors.

    Raises:
        UsageError: It is of another form, takes nothing, or takes a layer twice or out of order.
    """
    if not isinstance(spec, str | Sequence):
        raise UsageError(f"{option}: {spec!r} is not a selection of layers", hint=FORMS)
    layers = _numbers(spec, option) if isinstance(spec, str) else tuple(spec)
    for layer in layers:
        if type(layer) is not int or not 0 <= layer < MAX_DEPTH:
            raise UsageError(f"{option}: {layer!r} is no layer's number", hint="layers are counted from 0")
    if not layers:
        raise UsageError(f"{option} {_shown(spec)} takes no layer", hint="a stack has one at least")
    for before, after in pairwise(layers):
        if after <= before:
            told = "is taken twice" if after == before else f"stands behind {before}"
            raise UsageError(f"{option}: layer {after} {told}", hint="layers keep their order, and each is taken once")
    return layers


def _numbers(spec: str, option: str) -> tuple[int, ...]:
    if re.fullmatch(r"[0-9]+", spec):
        number = _number(spec, option)
        raise UsageError(
            f"{option} {spec} is one number",
            hint=f"first:{number} for the first {number} layers, {number}:{number + 1} for this one alone",
        )
    first = re.fullmatch(r"first:([0-9]+)", spec)
    if first is not None:
        return tuple(range(_number(first[1], option)))
    taken: list[int] = []
    for item in spec.split(","):
        if re.fullmatch(r"[0-9]+(:[0-9]+){0,2}", item) is None:
            raise UsageError(f"{option}: {item!r} in {_shown(spec)} is no layers", hint=FORMS)
        numbers = [_number(text, option) for text in item.split(":")]
        if len(numbers) == 3 and numbers[2] == 0:
            raise UsageError(f"{option}: the step of {item} is 0", hint="1 or more")
        taken += range(*numbers) if len(numbers) > 1 else numbers
    return tuple(taken)


def _number(text: str, option: str) -> int:
    """A number that may be one of a model's layers, or the end of them."""
    if len(text) > len(str(MAX_DEPTH)) or int(text) > MAX_DEPTH:
        raise UsageError(f"{option}: no model has {text[:20]} layers", hint=f"{MAX_DEPTH} at most")
    return int(text)


def _shown(spec: LayerSpec) -> str:
    return repr(spec if isinstance(spec, str) else list(spec))


def written(layers: Sequence[int], depth: int) -> str:
    """Return the SPEC of some of a parent's `depth` layers, a range where they are evenly spaced.

    >>> written([1, 3, 5], 6)
    '1:6:2'
    """
    steps = {after - before for before, after in pairwise(layers)}
    if len(steps) != 1:
        return ",".join(map(str, layers)) if steps else f"{layers[0]}:{layers[0] + 1}"
    (step,) = steps
    return f"{layers[0]}:{min(layers[-1] + step, depth)}" + (f":{step}" if step > 1 else "")


def with_full_attention(layers: Sequence[int], kinds: Sequence[str]) -> tuple[int, ...] | None:
    """Return as many layers, chosen as nearly alike as can be, that keep layers of full attention.

    The selection is moved as a whole, by the least that keeps most of them; where it cannot be moved, one layer gives
    place to the nearest of full attention.

    Args:
        layers: A selection without such a layer.
        kinds: The kind of each of the parent's layers.

    Returns:
        None where the parent has no such layer.
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
