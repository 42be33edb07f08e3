"""Where two layers that should be the same depart: the first tensor inside them that differs."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

ATTENTION = "self_attn (windows, RoPE, scale, softcap or heads)"
"""What is between the projections and o_proj, and has no parameters."""

CROSS_ATTENTION = "cross_attn (scale, softcap or heads)"
"""The same of a decoder's attention to the encoder's output."""


def first_departure(
    expected: nn.Module,
    expected_inputs: Sequence[object],
    found: nn.Module,
    found_inputs: Sequence[object],
    kept_BT: Tensor | None,
) -> str:
    """Run two layers of the same structure once more, and name the first module inside whose outputs differ.

    Where none does, the first parameter that differs; nothing where only the result of the whole does.

    Args:
        expected: The parent's layer.
        expected_inputs: States and the rest, as it takes them.
        found: The target's, whose names are given; it may have parameters behind those of the parent's.
        found_inputs: What it takes.
        kept_BT: False at padding; None where there is none.
    """
    lefts, rights = _outputs(expected, expected_inputs), _outputs(found, found_inputs)
    for (name, right), (_, left) in zip(rights, lefts, strict=False):
        if left.shape != right.shape or not torch.equal(_tokens(left, kept_BT), _tokens(right, kept_BT)):
            return name
    # Some parameters are no module's: the projection of the soft tokens, the table of positions.
    parameters = zip(expected.parameters(), found.named_parameters(), strict=False)
    return next((name for ours, (name, theirs) in parameters if not torch.equal(ours, theirs)), "")


def _outputs(layer: nn.Module, inputs: Sequence[object]) -> list[tuple[str, Tensor]]:
    """The first output of every module inside a layer, in the order in which they are computed.

    The first: merged attention calls its projections again for the memory.
    """
    outputs: dict[str, Tensor] = {}

    def keep(name: str, tensor: Tensor) -> None:
        outputs.setdefault(name, tensor)

    with ExitStack() as hooks:
        for name, module in layer.named_modules():
            if name.endswith(("o_proj", "out_proj")):
                between = CROSS_ATTENTION if name.startswith("cross_attn.") else ATTENTION
                before = module.register_forward_pre_hook(partial(_keep_input, keep, between))
                hooks.callback(before.remove)
            if next(module.children(), None) is None:
                after = module.register_forward_hook(partial(_keep_output, keep, name))
                hooks.callback(after.remove)
        layer(*inputs)
    return list(outputs.items())


def _keep_input(keep: Callable[[str, Tensor], None], name: str, _module: nn.Module, given: tuple[Tensor, ...]) -> None:
    keep(name, given[0])


def _keep_output(
    keep: Callable[[str, Tensor], None], name: str, _module: nn.Module, _given: object, output: Tensor
) -> None:
    keep(name, output)


def _tokens(x: Tensor, kept_BT: Tensor | None) -> Tensor:
    """What belongs to tokens that are no padding, of [B, T, C] or [B, heads, T, D]."""
    if kept_BT is None:
        return x
    return x[kept_BT] if x.ndim == 3 else x.transpose(1, 2)[kept_BT]
