from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from t5g2convert.checkpoint.families.rope_config import LayerType
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.parity.batches import token_batch
from t5g2convert.parity.first_difference import ATTENTION, first_difference
from t5g2convert.parity.side_by_side import causal_encoder_run, hidden_memory_run
from t5g2convert.reference.attention import Rotation
from t5g2convert.reference.gemma3 import Gemma3Reference
from t5g2convert.reference.stack import Run
from t5g2convert.reference.t5gemma2 import T5Gemma2Reference
from tests.conftest import TwinFolder

LAYER = 1
KIND: LayerType = "sliding_attention"

Side = tuple[nn.Module, list[object]]
Sides = tuple[Side, Side, Tensor]


def side(run: Run, layer: nn.Module) -> Side:
    return layer, [run.hidden_BTC, *run.arguments(KIND, LAYER)]


@pytest.fixture(scope="module", params=["encoder", "decoder"])
def sides(request: pytest.FixtureRequest, twin_folder: TwinFolder, converted_twin: TwinFolder) -> Sides:
    """Return a layer of Gemma 3, its converted layer, their inputs, and the mask without padding."""
    source = Gemma3Reference(open_checkpoint(twin_folder("images-float32")))
    target = T5Gemma2Reference(open_checkpoint(converted_twin("images-float32")))
    batch = token_batch(290, 24, never=set())
    stack = target.encoder if request.param == "encoder" else target.decoder
    start = causal_encoder_run if request.param == "encoder" else hidden_memory_run
    return (
        side(source.start(batch.ids_BT, batch.kept_BT), source.text.layer(LAYER)),
        side(start(target, batch), stack.layer(LAYER)),
        batch.kept_BT,
    )


def departure(sides: Sides, change: Callable[[nn.Module, list[object]], object] = lambda _, given: None) -> str:
    """Return the first difference after this change to the T5Gemma 2 layer."""
    expected, (layer, given), kept = sides
    layer, given = deepcopy(layer), list(given)
    with torch.no_grad():
        change(layer, given)
        return first_difference(*expected, layer, given, kept)


def parameters() -> list[str]:
    norms = ["pre_self_attn_layernorm", "post_self_attn_layernorm"]
    norms += ["pre_feedforward_layernorm", "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm"]
    return (
        norms + [f"self_attn.{name}_proj" for name in "qkvo"] + [f"mlp.{name}_proj" for name in ("gate", "up", "down")]
    )


def test_every_module_with_a_weight_is_tested(sides: Sides) -> None:
    layer = sides[1][0]
    assert {f"{name}.weight" for name in parameters()} == {name for name, _ in layer.named_parameters()}


@pytest.mark.parametrize("name", parameters())
def test_the_module_with_another_weight_is_named(name: str, sides: Sides) -> None:
    def change(layer: nn.Module, _: list[object]) -> None:
        weight = layer.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.add_(0.25)

    assert departure(sides, change) == name


def test_the_first_of_several_differences_is_named(sides: Sides) -> None:
    def change(layer: nn.Module, _: list[object]) -> None:
        for name in ("mlp.up_proj", "self_attn.v_proj"):
            layer.get_submodule(name).weight.mul_(2.0)  # type: ignore[operator]

    assert departure(sides, change) == "self_attn.v_proj"


def test_a_nan_weight_is_named(sides: Sides) -> None:
    def change(layer: nn.Module, _: list[object]) -> None:
        layer.get_submodule("mlp.up_proj").weight[0, 0] = torch.nan  # type: ignore[operator]

    assert departure(sides, change) == "mlp.up_proj"


def test_another_rotation_or_mask_is_named(sides: Sides) -> None:
    def turn(_: nn.Module, given: list[object]) -> None:
        assert isinstance(given[1], Rotation)
        given[1] = Rotation(*(part.flip(-2) for part in given[1]))

    def see_everything(_: nn.Module, given: list[object]) -> None:
        assert isinstance(given[2], Tensor)
        given[2] = torch.ones_like(given[2])

    def other_scale(layer: nn.Module, _: list[object]) -> None:
        layer.self_attn.scale *= 2  # type: ignore[operator,union-attr]

    for change in (turn, see_everything, other_scale):
        assert departure(sides, change) == ATTENTION


def test_a_difference_only_in_padding_is_ignored(sides: Sides) -> None:
    kept = sides[2]

    def change(_: nn.Module, given: list[object]) -> None:
        assert isinstance(given[0], Tensor)
        given[0] = torch.where(kept[..., None], given[0], 5.0)

    assert departure(sides, change) == departure(sides) == ""
    expected, found, _ = sides
    states = found[1][0]
    assert isinstance(states, Tensor)
    given = [torch.where(kept[..., None], states, 5.0), *found[1][1:]]
    name = first_difference(*expected, found[0], given, None)
    assert name == "pre_self_attn_layernorm"


def test_all_hooks_are_removed(sides: Sides) -> None:
    (ours, _), (theirs, _), _ = sides
    departure(sides)
    hooked = [module for layer in (ours, theirs) for module in layer.modules() if module._forward_hooks]
    assert hooked == []
    assert not any(module._forward_pre_hooks for layer in (ours, theirs) for module in layer.modules())
