"""The layers that `--encoder-layers` and `--decoder-layers` take of a parent. The grammar, in full:

    SPEC    = "first:" N | item { "," item }       a list of one number is written as a range
    item    = number | A ":" B [ ":" STEP ]        from A on and below B, as Python's range

Numbers count the parent's layers from 0, and go up.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from typing import Final

from t5g2convert.checkpoint.config import MAX_DEPTH
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
