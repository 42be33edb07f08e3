"""The expected speed of training on an assumed machine, from shapes; nothing here was measured on a GPU.

A pass of a device is forward, recomputation and backward over one micro-batch. Its time is the longest of three, and
what cannot overlap::

    max(computing, launching kernels, communicating) + first gather and last reduction

Computing is a roofline: a matrix product takes as long as its operations or its bytes, whichever is longer; operations
by element (norms, RoPE, activations) take as long as their bytes. The bytes are those that transformers' class moves
without torch.compile, counted from its calls of torch (tests/adaptation/train/test_throughput.py).

A device that has computed its part of a pass waits for the slowest. Text steps only; making batches, evaluations and
the start of a run are not included.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from functools import cache
from typing import Final, Literal

from t5g2convert.adaptation.train.assumed_machine import H100, Machine
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2
from t5g2convert.checkpoint.families.text_and_vision import TextConfig


@dataclass(frozen=True, slots=True)
class Method:
    """How a run computes; the defaults are those of `adapt`.

    Attributes:
        shard_size: Devices that share one copy of the model; None for all.
        recompute: Which activations of layers the backward pass computes again: none, all but the results of matrix
            products and attention (selective), or all (full).
        attention: `dense` computes all scores; `blocks` only those that a query sees.
        reduce: Whether gradients are summed over devices after each pass, or once a step.
    """

    shard_size: int | None = None
    recompute: Literal["none", "selective", "full"] = "full"
    attention: Literal["dense", "blocks"] = "dense"
    reduce: Literal["pass", "step"] = "pass"

    @property
    def forwards(self) -> int:
        """How often the matrix products and scores of a layer's forward pass are computed."""
        return 1 + (self.recompute == "full")

    @property
    def element_forwards(self) -> int:
        """The same for its operations by element."""
        return 1 + (self.recompute != "none")


@dataclass(frozen=True, slots=True, order=True)
class BatchShape:
    """A micro-batch of one device: samples, and encoder tokens and labels of each, padded."""

    samples: int
    encoder: int
    labels: int


ELEMENT_BYTES: Final = {"hidden": 180, "intermediate": 7, "query": 60, "key_value": 78}
"""Bytes that operations by element move in a layer's forward pass, per token and element of a width; within 4% of the
counts for shapes as those of the releases."""

MEMORY_BYTES: Final = 71
"""The same for keys and values of the encoder's output in a decoder layer, per element of their width."""

BACKWARD: Final = 2.39
"""Bytes of the backward pass, relative to the forward pass."""

CALLS: Final = {"encoder": 85, "decoder": 99}
"""Kernels of a layer's forward pass."""

BACKWARD_CALLS: Final = 1.64
"""Kernels of the backward pass, relative to the forward pass."""

LOGIT_BYTES: Final = 44
"""Bytes per logit, with its gradient."""

GATHERED_BYTES: Final = 24
"""Bytes per parameter and pass, to copy gathered weights and gradients from and to FSDP2's buffers (a guess)."""

OPTIMIZER_BYTES: Final = 44
"""Bytes per trained parameter and step: AdamW in one kernel, which reads four values and writes three (28), the norm
and the scale of the gradient (16)."""

CHECKPOINT_BYTES: Final = 12
"""Bytes per trained parameter of a checkpoint: float32 weight and both moments."""


@dataclass(frozen=True, slots=True)
class Seconds:
    """Where the time of a step goes, in seconds on average.

    Attributes:
        products: Matrix products.
        scores: Attention scores and their weighted sums.
        elements: Operations by element, and copies.
        launches: Waiting for kernels to be launched.
        communication: Waiting for weights and gradients of other devices.
        waiting: Waiting for the slowest device of a pass; the rest is that of the mean device.
        optimizer: AdamW.
        checkpoints: Writing them, spread over all steps.
    """

    products: float = 0.0
    scores: float = 0.0
    elements: float = 0.0
    launches: float = 0.0
    communication: float = 0.0
    waiting: float = 0.0
    optimizer: float = 0.0
    checkpoints: float = 0.0

    @property
    def total(self) -> float:
        """Sum of all."""
        return sum(getattr(self, each.name) for each in fields(self))

    def plus(self, other: "Seconds", times: float = 1.0) -> "Seconds":
        """Return the sum with some times another."""
        names = [each.name for each in fields(self)]
        return Seconds(**{name: getattr(self, name) + times * getattr(other, name) for name in names})


@dataclass(frozen=True, slots=True)
class Pace:
    """The times of passes and steps of one model on one machine.

    Attributes:
        model: The model's shapes.
        parameters: Parameters by part, from `inspect`; all but the vision tower are trained.
        devices: Number of devices, over all machines.
        machine: The assumed machine.
        method: How the run computes.
    """

    model: T5Gemma2
    parameters: Mapping[str, int]
    devices: int
    machine: Machine = H100
    method: Method = Method()

    @property
    def group(self) -> int:
        """Devices that share one copy of the model."""
        return self.method.shard_size or self.devices

    def step(self, passes: Mapping[tuple[BatchShape, ...], int], *, steps: int, save_every: int) -> Seconds:
        """Return the seconds of a step, on average.

        Args:
            passes: How often the devices make micro-batches of these shapes together.
            steps: Steps of all these passes.
            save_every: Steps between checkpoints.
        """
        seconds = cache(self.one_pass)
        found = Seconds()
        for shapes, count in passes.items():
            each = [seconds(shape) for shape in shapes]
            mean = Seconds()
            for one in each:
                mean = mean.plus(one, 1 / len(each))
            waiting = max(0.0, max(one.total for one in each) - mean.total)
            found = found.plus(mean.plus(Seconds(waiting=waiting)), count / steps)
        trained = self._trained
        once = self._reduction(trained) if self.method.reduce == "step" else 0.0
        return found.plus(
            Seconds(
                communication=once,
                optimizer=OPTIMIZER_BYTES * trained / self.group / self._memory_rate,
                checkpoints=CHECKPOINT_BYTES * trained / self.machine.disk / save_every,
            )
        )

    def one_pass(self, shape: BatchShape) -> Seconds:
        """Return the seconds of a device's pass, without waiting for other devices' passes."""
        products, scores, elements = self._computing(shape)
        computing = products + scores + elements
        launches = max(0.0, self._launching() - computing)
        overlapped, exposed = self._communicating()
        communication = max(0.0, overlapped - computing - launches) + exposed
        return Seconds(products, scores, elements, launches, communication)

    @property
    def _trained(self) -> int:
        return self.parameters["total"] - self.parameters["vision"]

    @property
    def _memory_rate(self) -> float:
        return self.machine.memory_rate * self.machine.memory_share

    def _computing(self, shape: BatchShape) -> tuple[float, float, float]:
        """Return the seconds of matrix products, of attention scores, and of operations by element."""
        encoder, decoder, how = self.model.encoder, self.model.decoder, self.method
        read, written = shape.samples * shape.encoder, shape.samples * shape.labels
        layers = ((encoder, read, 0), (decoder, written, read))
        forward = sum(
            stack.num_hidden_layers * sum(self.product(*each) for each in _products(stack, tokens, memory))
            for stack, tokens, memory in layers
        )
        softmax = self.product(written, decoder.hidden_size, decoder.vocab_size)
        wanted = shape.samples * (
            _scores(encoder, shape.encoder, 0, how.attention)
            + _scores(decoder, shape.labels, shape.encoder, how.attention)
        )
        # The backward pass of fused attention computes the scores again: 5 products instead of 2.
        scored = wanted * (how.forwards + 2.5) / (self.machine.peak * self.machine.score_share)
        moved = sum(stack.num_hidden_layers * _element_bytes(stack, tokens, memory) for stack, tokens, memory in layers)
        elements = (how.element_forwards + BACKWARD) * moved + LOGIT_BYTES * written * decoder.vocab_size
        elements += GATHERED_BYTES * self._trained
        return (
            (how.forwards + 2) * forward + 3 * softmax,
            scored,
            elements / self._memory_rate,
        )

    def product(self, rows: int, inner: int, columns: int) -> float:
        """Return the seconds of a product of bfloat16 matrices [rows, inner] and [inner, columns]."""
        moved = 2 * (rows * inner + inner * columns + rows * columns)
        operations = 2 * rows * inner * columns / (self.machine.peak * self.machine.product_share)
        return max(operations, moved / self._memory_rate)

    def _launching(self) -> float:
        """Return the seconds in which a process launches all kernels of a pass."""
        depth = {"encoder": self.model.encoder.num_hidden_layers, "decoder": self.model.decoder.num_hidden_layers}
        calls = sum(CALLS[part] * count for part, count in depth.items())
        return calls * (self.method.element_forwards + BACKWARD_CALLS) * self.machine.launch

    def _communicating(self) -> tuple[float, float]:
        """Return the seconds of a pass's collectives: those that overlap with computing, and the others.

        Layers are gathered forward and backward. The embedding is gathered before all, and its gradient reduced last.
        """
        each_pass = self.method.reduce == "pass"
        overlapped = 0.0
        for stack, part in ((self.model.encoder, "encoder"), (self.model.decoder, "decoder")):
            layer = self.parameters[part] / stack.num_hidden_layers
            seconds = 2 * self.collective(2 * layer, self.group) + each_pass * self._reduction(layer)
            overlapped += stack.num_hidden_layers * seconds
        embedding = self.parameters["embedding"]
        return overlapped, self.collective(2 * embedding, self.group) + each_pass * self._reduction(embedding)

    def _reduction(self, parameters: float) -> float:
        """Return the seconds in which float32 gradients are reduced within the group, then between groups."""
        seconds = self.collective(4 * parameters, self.group)
        copies = self.devices // self.group
        if copies == 1:
            return seconds
        inside = self.devices <= self.machine.devices
        rate = (self.machine.link if inside else self.machine.network) * self.machine.link_share
        return seconds + 2 * (4 * parameters / self.group * (copies - 1) / copies / rate + copies * self.machine.hop)

    def collective(self, size: float, group: int) -> float:
        """Return the seconds in which a group gathers or reduces so many bytes.

        Each machine receives what it lacks once, over the networks of all its devices; inside a machine the devices
        pass it on by NVLink.
        """
        if group == 1:
            return 0.0
        local = min(group, self.machine.devices)
        machines = -(-group // local)
        inside = size * (group - 1) / group / self.machine.link
        between = size * (machines - 1) / machines / (local * self.machine.network)
        return max(inside, between) / self.machine.link_share + (group - 1) * self.machine.hop


def _products(stack: TextConfig, tokens: int, memory: int) -> Iterator[tuple[int, int, int]]:
    """Yield rows, inner size and columns of a layer's matrix products; keys and values also of the memory."""
    hidden, middle = stack.hidden_size, stack.intermediate_size
    query, key_value = stack.dims["query"], stack.dims["key_value"]
    yield tokens, hidden, query
    for rows in filter(None, (tokens, memory)):
        yield from [(rows, hidden, key_value)] * 2
    yield tokens, query, hidden
    yield from [(tokens, hidden, middle)] * 2
    yield tokens, middle, hidden


def _element_bytes(stack: TextConfig, tokens: int, memory: int) -> float:
    widths = {"hidden": stack.hidden_size, "intermediate": stack.intermediate_size}
    widths |= {name: stack.dims[name] for name in ("query", "key_value")}
    each = sum(ELEMENT_BYTES[name] * width for name, width in widths.items())
    return tokens * each + memory * MEMORY_BYTES * widths["key_value"]


def _scores(stack: TextConfig, tokens: int, memory: int, attention: Literal["dense", "blocks"]) -> float:
    """Return the operations of one sample's scores and weighted sums, in all layers of a stack.

    Args:
        stack: The stack.
        tokens: Its own tokens, which are queries and keys.
        memory: Keys of the encoder's output; 0 in the encoder, which sees both sides.
        attention: As in `Method`.
    """
    pairs = 0
    for kind in stack.layer_types:
        window = tokens if kind == "full_attention" else min(tokens, stack.sliding_window)
        if attention == "dense":
            seen = tokens * tokens
        elif memory:
            seen = window * (window + 1) // 2 + (tokens - window) * window
        else:
            # Half the window to either side; the ends of the text see less.
            seen = tokens * tokens if window == tokens else tokens * window - window * window // 4
        pairs += seen + tokens * memory
    return 4 * pairs * stack.dims["query"]
