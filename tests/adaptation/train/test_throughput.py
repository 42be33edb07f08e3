"""The expected speed of training: arithmetic by hand, bounds, and what transformers' class really moves."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from examples.benchmark_sources import samples_of
from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.train.assumed_machine import H100, Machine, assumptions
from t5g2convert.adaptation.train.cost import memory, operations
from t5g2convert.adaptation.train.forecast import simulate, throughput
from t5g2convert.adaptation.train.loop import make_optimizer
from t5g2convert.adaptation.train.loss import _SoftmaxLoss, _Targets
from t5g2convert.adaptation.train.model import recompute_activations
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.train.throughput import (
    BACKWARD,
    BACKWARD_CALLS,
    CALLS,
    ELEMENT_BYTES,
    LOGIT_BYTES,
    MEMORY_BYTES,
    OPTIMIZER_BYTES,
    BatchShape,
    Method,
    Pace,
    Seconds,
)
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2, read_t5gemma2
from tests.conftest import TwinFolder

PARTS = {"embedding": 1000, "encoder": 800, "decoder": 800, "vision": 70, "projector": 0, "total": 2670}
ENDLESS = 1e30

COMPUTING = Machine(
    peak=1e12, memory_rate=ENDLESS, link=ENDLESS, network=ENDLESS, disk=ENDLESS, launch=0.0, hop=0.0, product_share=1.0,
    score_share=1.0, memory_share=1.0, link_share=1.0,
)  # fmt: skip
"""A machine that only computes."""

CONNECTED = replace(COMPUTING, peak=ENDLESS, link=1000.0, network=10.0)
"""A machine that only communicates."""


@pytest.fixture
def shapes(converted_twin: TwinFolder) -> T5Gemma2:
    path = converted_twin("text-8") / "config.json"
    return read_t5gemma2(json.loads(path.read_text()), path)


def test_a_pass_takes_as_long_as_its_products_and_scores(shapes: T5Gemma2) -> None:
    # Hidden 24, feed-forward 40, queries 40, keys and values 10, 8 layers in each stack, 300 tokens.
    projections = 24 * 40 + 2 * 24 * 10 + 40 * 24 + 3 * 24 * 40
    encoder, decoder = 8 * 2 * 10 * projections, 8 * (2 * 4 * projections + 2 * 10 * 2 * 24 * 10)
    softmax = 2 * 4 * 24 * 300
    scores = 8 * 4 * 40 * (10 * 10 + 4 * 14)
    found = Pace(shapes, PARTS, 1, COMPUTING).one_pass(BatchShape(3, 10, 4))
    assert found.products == pytest.approx(3 * (4 * (encoder + decoder) + 3 * softmax) / 1e12)
    assert found.scores == pytest.approx(3 * 4.5 * scores / 1e12)
    assert found.total == pytest.approx(found.products + found.scores)
    # The cost of a sample counts four passes of scores, and the rest alike.
    cost = 3 * operations(shapes, encoder=10, decoder=4).training
    assert cost == pytest.approx(1e12 * (found.products + found.scores * 4 / 4.5))
    kept = Pace(shapes, PARTS, 1, COMPUTING, Method(recompute="none")).one_pass(BatchShape(3, 10, 4))
    assert kept.products == pytest.approx(3 * 3 * (encoder + decoder + softmax) / 1e12)
    assert kept.scores == pytest.approx(found.scores * 3.5 / 4.5)


def test_selective_recomputation_repeats_only_operations_by_element(shapes: T5Gemma2) -> None:
    machine = replace(COMPUTING, memory_rate=1e9)
    none, selective, full = (
        Pace(shapes, PARTS, 1, machine, Method(recompute=how)).one_pass(BatchShape(3, 10, 4))
        for how in ("none", "selective", "full")
    )
    assert (selective.products, selective.scores, selective.elements) == (none.products, none.scores, full.elements)
    assert none.elements < full.elements
    assert none.products < full.products


def test_a_product_takes_as_long_as_its_bytes_if_they_are_slower(shapes: T5Gemma2) -> None:
    pace = Pace(shapes, PARTS, 1, replace(COMPUTING, memory_rate=1e6))
    assert pace.product(1, 100, 10) == pytest.approx(2 * (100 + 1000 + 10) / 1e6)
    assert Pace(shapes, PARTS, 1, COMPUTING).product(1, 100, 10) == pytest.approx(2000 / 1e12)


def test_a_pass_waits_for_weights_and_gradients(shapes: T5Gemma2) -> None:
    # A layer of 100 parameters: 200 bytes twice, 400 bytes of gradients; the embedding of 1000 is gathered once.
    layer, embedding = (2 * 200 + 400) / 2 / 1000, (2000 + 4000) / 2 / 1000
    found = Pace(shapes, PARTS, 2, CONNECTED).one_pass(BatchShape(1, 10, 4))
    assert found.communication == pytest.approx(16 * layer + embedding)
    once = Pace(shapes, PARTS, 2, CONNECTED, Method(reduce="step"))
    assert once.one_pass(BatchShape(1, 10, 4)).communication == pytest.approx((16 * 400 + 2000) / 2 / 1000)
    step = once.step({(BatchShape(1, 10, 4),) * 2: 3}, steps=1, save_every=1)
    assert step.communication == pytest.approx(3 * (16 * 400 + 2000) / 2 / 1000 + 4 * 2600 / 2 / 1000)
    # Computing hides what overlaps, but not the embedding.
    slow = Pace(shapes, PARTS, 2, replace(CONNECTED, peak=1.0))
    assert slow.one_pass(BatchShape(1, 10, 4)).communication == pytest.approx(embedding)
    assert Pace(shapes, PARTS, 1, CONNECTED).one_pass(BatchShape(1, 10, 4)).communication == 0


def test_a_group_over_machines_is_never_faster_than_one_inside_a_machine(shapes: T5Gemma2) -> None:
    for machine in (H100, CONNECTED):
        pace = Pace(shapes, PARTS, 64, machine)
        seconds = [pace.collective(1e6, group) for group in (1, 2, 4, 8, 16, 32, 64)]
        assert all(one <= other for one, other in pairwise(seconds))
    # Two machines of 8: each receives half of the bytes over 8 networks.
    assert Pace(shapes, PARTS, 16, CONNECTED).collective(1000, 16) == pytest.approx(500 / 80)


def test_with_groups_of_one_machine_only_gradients_travel_between_machines(shapes: T5Gemma2) -> None:
    found = Pace(shapes, PARTS, 16, CONNECTED, Method(shard_size=8)).one_pass(BatchShape(1, 10, 4)).communication
    inside = 7 / 8 / 1000 * (16 * (2 * 200 + 400) + 2000 + 4000)
    between = 2 * (16 * 400 + 4000) / 8 / 2 / 10
    assert found == pytest.approx(inside + between)


def test_a_pass_takes_as_long_as_the_launch_of_its_kernels(shapes: T5Gemma2) -> None:
    found = Pace(shapes, PARTS, 1, replace(COMPUTING, peak=ENDLESS, launch=1.0)).one_pass(BatchShape(1, 10, 4))
    assert found.total == pytest.approx(found.launches)
    assert found.launches == pytest.approx(8 * (CALLS["encoder"] + CALLS["decoder"]) * (2 + BACKWARD_CALLS))


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("attention", ["dense", "blocks"])
def test_more_devices_never_read_fewer_tokens(shapes: T5Gemma2, recompute: Any, attention: Any) -> None:
    method = Method(recompute=recompute, attention=attention)
    rates = []
    for devices in (1, 2, 4, 8, 16, 32, 64, 128):
        pace = Pace(shapes, PARTS, devices, H100, method)
        step = pace.step({(BatchShape(2, 64, 64),) * devices: 4}, steps=1, save_every=100)
        rates.append(devices / step.total)
    assert all(one <= other for one, other in pairwise(rates))
    # But never more than as many times as there are devices, apart from the optimizer's shards and the checkpoints.
    assert rates[-1] <= 128 * rates[0] * 1.5


def test_devices_wait_for_the_slowest(shapes: T5Gemma2) -> None:
    pace = Pace(shapes, PARTS, 2, COMPUTING)
    small, large = BatchShape(1, 10, 4), BatchShape(1, 40, 20)
    found = pace.step({(small, large): 3}, steps=1, save_every=100)
    assert found.total == pytest.approx(3 * pace.one_pass(large).total)
    assert found.waiting == pytest.approx(3 * (pace.one_pass(large).total - pace.one_pass(small).total) / 2)


@pytest.mark.parametrize("devices", [1, 3, 8])
def test_the_share_of_useful_work_is_that_of_the_schedule(shapes: T5Gemma2, devices: int) -> None:
    samples = samples_of(shapes, 10**6, 256, 24 * 256, 3)
    schedule = simulate(samples, devices=devices, loop=LoopConfig(micro_tokens=700))
    held = memory(shapes, PARTS, devices=devices, encoder=schedule.encoder, decoder=schedule.labels, chunk=64)
    # The backward pass of scores has 2.5 times their operations, the cost of a sample twice.
    machine = replace(COMPUTING, score_share=4.5 / 4)
    found = throughput(schedule, Pace(shapes, PARTS, devices, machine), held, save_every=100)
    assert found.peak_share == pytest.approx(schedule.useful, rel=1e-6)
    assert (schedule.useful < 1) == (devices > 1 or schedule.passes < schedule.steps * 24)
    assert found.tokens_per_second * found.step == pytest.approx(schedule.text_tokens / schedule.text_steps)
    assert found.fits


def test_checkpoints_and_the_optimizer_are_spread(shapes: T5Gemma2) -> None:
    machine = replace(COMPUTING, peak=ENDLESS, disk=12.0, memory_rate=float(OPTIMIZER_BYTES))
    step = Pace(shapes, PARTS, 4, machine).step({}, steps=1, save_every=10)
    assert step == Seconds(checkpoints=pytest.approx(2600 / 10), optimizer=pytest.approx(2600 / 4))


@pytest.mark.parametrize(("tokens", "memory_tokens"), [(5, 9), (7, 3), (40, 30)])
def test_scores_by_blocks_are_those_that_a_query_sees(shapes: T5Gemma2, tokens: int, memory_tokens: int) -> None:
    window, stack = shapes.decoder.sliding_window, shapes.decoder
    pairs = 0
    for kind in stack.layer_types:
        back = tokens if kind == "full_attention" else window
        pairs += sum(0 <= query - key < back for query in range(tokens) for key in range(tokens))
        pairs += tokens * memory_tokens
    blocks, dense = (
        Pace(shapes, PARTS, 1, COMPUTING, Method(attention=how)).one_pass(BatchShape(1, memory_tokens, tokens)).scores
        for how in ("blocks", "dense")
    )
    encoder = 0
    for kind in shapes.encoder.layer_types:
        half = memory_tokens if kind == "full_attention" else window / 2
        encoder += sum(abs(one - two) <= half for one in range(memory_tokens) for two in range(memory_tokens))
    assert blocks == pytest.approx(4.5 * 4 * 40 * (pairs + encoder) / 1e12, rel=0.05)
    assert blocks < dense


def test_the_assumptions_name_data_sheets_and_guesses() -> None:
    line = assumptions(H100)
    for text in (
        "data sheets: 989 TFLOP/s",
        "3.35 TB/s",
        "450 GB/s",
        "50 GB/s",
        "guesses: ",
        "70%",
        "25%",
        "2 GB/s to disk",
    ):
        assert text in line


VIEWS = {
    "_unsafe_view", "alias", "as_strided", "detach", "empty", "empty_like", "expand", "new_empty", "permute", "select",
    "slice", "split", "split_with_sizes", "squeeze", "t", "transpose", "unbind", "unsqueeze", "view",
}  # fmt: skip


class Moved(TorchDispatchMode):
    """Counts calls, and the bytes that they read and write, apart from matrix products and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in VIEWS:
            return out
        self.calls += 1
        if name not in {"mm", "bmm"} and "scaled_dot_product" not in name:
            tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
            self.bytes[name] += sum(_elements(each) * each.element_size() for each in tensors)
        return out


def _elements(tensor: torch.Tensor) -> int:
    """Return the elements that are read: those of an expanded dimension once."""
    count = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        count *= size if stride else 1
    return count


def moved(config: dict[str, Any], encoder: int, labels: int, *, layers: tuple[int, int], training: bool) -> Moved:
    from transformers import T5Gemma2Config, T5Gemma2ForConditionalGeneration

    config = json.loads(json.dumps(config))
    for stack, depth in zip((config["encoder"]["text_config"], config["decoder"]), layers, strict=True):
        stack |= {"num_hidden_layers": depth, "layer_types": ["sliding_attention"] * depth, "hidden_size": 320}
        stack |= {"intermediate_size": 1024, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 128}
        stack |= {"use_cache": False}
    config.pop("model_type")
    model: Any = T5Gemma2ForConditionalGeneration(T5Gemma2Config(**config)).bfloat16().train(training)
    if training:
        recompute_activations(model, "full")
    ids, written = torch.ones(1, encoder, dtype=torch.int64), torch.ones(1, labels, dtype=torch.int64)
    mask = ids.clone()
    mask[0, -1] = 0
    with Moved() as counter, torch.set_grad_enabled(training):
        hidden = model.model(
            input_ids=ids, attention_mask=mask, decoder_input_ids=written, decoder_attention_mask=written.clone()
        ).last_hidden_state
        if training:
            hidden.sum().backward()
    return counter


@pytest.mark.parametrize("training", [False, True])
def test_the_bytes_and_calls_of_a_layer_are_those_of_the_class(converted_twin: TwinFolder, training: bool) -> None:
    config = json.loads((converted_twin("text-8") / "config.json").read_text())
    encoder, labels = 256, 128
    none, one, other = (
        moved(config, encoder, labels, layers=layers, training=training) for layers in ((1, 1), (2, 1), (1, 2))
    )
    widths = {"hidden": 320, "intermediate": 1024, "query": 512, "key_value": 128}
    token = sum(ELEMENT_BYTES[name] * width for name, width in widths.items())
    times = 2 + BACKWARD if training else 1
    assert (one.bytes - none.bytes).total() == pytest.approx(times * encoder * token, rel=0.04)
    expected = labels * token + encoder * MEMORY_BYTES * widths["key_value"]
    assert (other.bytes - none.bytes).total() == pytest.approx(times * expected, rel=0.06)
    calls = 2 + BACKWARD_CALLS if training else 1
    assert one.calls - none.calls == pytest.approx(calls * CALLS["encoder"], rel=0.02)
    assert other.calls - none.calls == pytest.approx(calls * CALLS["decoder"], rel=0.02)


def test_the_bytes_of_a_logit_are_those_of_the_loss() -> None:
    labels, vocabulary = 128, 1024
    table = torch.zeros(vocabulary, 16, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.zeros(labels, 16, dtype=torch.bfloat16, requires_grad=True)
    targets = _Targets(torch.ones(labels, dtype=torch.int64))
    with Moved() as counter:
        _SoftmaxLoss.apply(hidden, table, targets, 64, None, True)[0].backward()
    # Of each row one logit is read and one is changed; the rest are products.
    for name in ("gather", "scatter_add_", "addmm_", "mul_", "zeros_like"):
        del counter.bytes[name]
    assert counter.bytes.total() == pytest.approx(LOGIT_BYTES * labels * vocabulary, rel=0.03)


def test_an_update_is_one_kernel() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1000))
    parameter.grad = torch.zeros(1000)
    settings = Settings(lr=1e-3, steps=1, encoder_length=8, decoder_length=8, batch_tokens=64)
    optimizer = make_optimizer({"weight": parameter}, settings)
    optimizer.step()
    with Moved() as counter:
        optimizer.step()
    assert max(counter.bytes, key=lambda name: counter.bytes[name]) == "_fused_adamw_"
    # Its four tensors, of which three are written too; besides, the norm reads the gradient, which is then scaled.
    assert counter.bytes["_fused_adamw_"] / 1000 == pytest.approx(4 * 4, rel=0.02)
    assert OPTIMIZER_BYTES == 7 * 4 + 16
