"""Find the first module at which the outputs of two layers differ."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

import torch
from torch import Tensor, nn

ATTENTION = "self_attn (windows, RoPE, scale, softcap or heads)"
"""Everything between the projections and o_proj; it has no parameters."""

CROSS_ATTENTION = "cross_attn (scale, softcap or heads)"
"""The same for a decoder's attention to the encoder's output."""


def first_difference(
    expected: nn.Module,
    expected_inputs: Sequence[object],
    found: nn.Module,
    found_inputs: Sequence[object],
    kept_BT: Tensor | None,
) -> str:
    """Rerun two layers of the same structure, and return the name of the first module with different outputs.

    If no module differs, return the first parameter that does, or an empty string if only the sum of the whole layer
    differs.

    Args:
        expected: The source's layer.
        expected_inputs: Its arguments, the states first.
        found: The target's layer, which gives the returned names; it may have more parameters at its end.
        found_inputs: Its arguments.
        kept_BT: False at padding; None without padding.
    """
    lefts, rights = _outputs(expected, expected_inputs), _outputs(found, found_inputs)
    for (name, right), (_, left) in zip(rights, lefts, strict=False):
        if left.shape != right.shape or not torch.equal(_tokens(left, kept_BT), _tokens(right, kept_BT)):
            return name
    # Some parameters do not belong to a module: the projection of the soft tokens, the table of positions.
    parameters = zip(expected.parameters(), found.named_parameters(), strict=False)
    return next((name for ours, (name, theirs) in parameters if not torch.equal(ours, theirs)), "")


def _outputs(layer: nn.Module, inputs: Sequence[object]) -> list[tuple[str, Tensor]]:
    """Return the first output of every module inside a layer, in the order of computation.

    Merged attention calls its projections a second time, for the memory.
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


def _keep_input(keep: Callable[[str, Tensor], None], name: str, _module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
    keep(name, inputs[0])


def _keep_output(
    keep: Callable[[str, Tensor], None], name: str, _module: nn.Module, _inputs: object, output: Tensor
) -> None:
    keep(name, output)


def _tokens(x: Tensor, kept_BT: Tensor | None) -> Tensor:
    """Return the rows of tokens that are not padding, from [B, T, C] or [B, heads, T, D]."""
    if kept_BT is None:
        return x
    return x[kept_BT] if x.ndim == 3 else x.transpose(1, 2)[kept_BT]
