"""Trained tensors, as far as they can be judged: that they hold numbers, and whether training has moved them."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor


def given_faults(name: str, pairs: Iterable[tuple[Tensor, Tensor]], unmoved: list[str]) -> Iterator[str]:
    """What is wrong with a trained tensor; a sound one that is the source's still is added to `unmoved`.

    Args:
        name: Its name.
        pairs: The same values of the source and of the target, in order, each in its own dtype.
        unmoved: Where its name goes.
    """
    moved, at = False, 0
    for source, target in pairs:
        if len(source) != len(target):
            yield f"{name} ends too early"
            return
        finite = torch.isfinite(target)
        if not bool(finite.all()):
            yield f"{name} was trained, and holds no number at element {at + int((~finite).nonzero()[0])}"
            return
        moved |= not torch.equal(source.to(target.dtype), target)
        at += len(target)
    if not moved:
        unmoved.append(name)
