"""The plan and estimated cost of a training run, from the model's headers and the index of the data.

Operations and memory are estimates from shapes. Operations are those of matrix products, two per multiply-add; masked
attention scores count in full, since the class computes them, and a sliding layer as much as a full one.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from t5g2convert.adaptation.train.preflight import Prepared
from t5g2convert.adaptation.ul2.corruption import lengths, spans
from t5g2convert.checkpoint.families.registry import read_trainable
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2
from t5g2convert.checkpoint.families.text_and_vision import SiglipConfig, TextConfig
from t5g2convert.mapping.inspection import inspect

TRAINED_BYTES: Final = 16
"""Per trained parameter: float32 weight, gradient and both AdamW moments."""

FROZEN_BYTES: Final = 4
"""Per frozen parameter: a float32 weight."""

GATHERED_BYTES: Final = 8
"""Per gathered parameter: a bfloat16 weight and gradient, and the float32 gradient that is reduced over devices."""

STATE_BYTES: Final = 2
"""Per element of a layer's input, kept for the backward pass: bfloat16."""

LOGIT_BYTES: Final = 12
"""Per logit of a chunk: the logit and its gradient, in bfloat16 and in float32."""

PASSES: Final = 4
"""Forward; forward again in the backward pass (gradient checkpointing); and twice that for the gradients."""


@dataclass(frozen=True, slots=True)
class TaskForecast:
    """A task: its samples per block of the mixture, and the tokens and sentinels of each sample."""

    name: str
    weight: int
    raw: int
    encoder: int
    labels: int
    sentinels: int


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one device holds in training, besides the activations of the layer being computed.

    Attributes:
        states: Its shard of weights, gradients and moments, float32.
        gathered: The embedding matrix and two layers, in bfloat16, with gradients.
        inputs: Inputs of all layers for a micro-batch.
        softmax: Logits of one chunk of labels.
    """

    states: int
    gathered: int
    inputs: int
    softmax: int

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.states + self.gathered + self.inputs + self.softmax


@dataclass(frozen=True, slots=True)
class Forecast:
    """The forecast of a run.

    Attributes:
        steps: Number of steps.
        image_steps: Steps on documents with images, among them.
        samples: Samples per step.
        tasks: The text tasks; empty if all steps are image steps.
        sentinels: The first and the last sentinel id in use; None if no task uses any.
        corpus: Text tokens in the data.
        epochs: How many times the run reads the text.
        operations: Operations of a text step, over all devices; None if there is no such step.
        memory: Estimated memory of a device.
        notes: Notes for the user.
    """

    steps: int
    image_steps: int
    samples: int
    tasks: tuple[TaskForecast, ...]
    sentinels: tuple[int, int] | None
    corpus: int
    epochs: float
    operations: float | None
    memory: Memory
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what `t5g2 adapt --dry-run --json` prints."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def forecast(prepared: Prepared, *, devices: int, micro: int, chunk: int) -> Forecast:
    """Forecast a run.

    Args:
        prepared: The run.
        devices: Number of devices, over all machines.
        micro: Samples per device and pass.
        chunk: Labels per chunk of logits, to limit memory.
    """
    samples = prepared.samples
    settings, sampler = samples.settings, samples.sampler
    raw_lengths = () if sampler is None else sampler.raw_lengths
    tasks = tuple(
        TaskForecast(
            task.name,
            task.weight,
            raw,
            *lengths(raw, task, samples.frame),
            spans(raw, task)[1] if task.sentinel else 0,
        )
        for task, raw in zip(settings.mixture.tasks if raw_lengths else (), raw_lengths, strict=True)
    )
    image_steps = 0 if settings.image_every is None else settings.steps // settings.image_every
    blocks = (settings.steps - image_steps) * settings.samples / settings.mixture.block
    ids = samples.sentinels
    model = read_trainable(prepared.checkpoint.config, Path("config.json"))
    return Forecast(
        steps=settings.steps,
        image_steps=image_steps,
        samples=settings.samples,
        tasks=tasks,
        sentinels=(ids.first, ids.last) if ids.count else None,
        corpus=samples.packed.tokens,
        epochs=0.0 if sampler is None else blocks / sampler.chunks,
        operations=_operations(model, tasks, settings.samples) if tasks else None,
        memory=_memory(prepared, model, devices=devices, micro=micro, chunk=chunk),
        notes=prepared.notes,
    )


def _operations(model: T5Gemma2, tasks: tuple[TaskForecast, ...], samples: int) -> float:
    each = [operations(model, encoder=task.encoder, decoder=task.labels).training * task.weight for task in tasks]
    return samples * sum(each) / sum(task.weight for task in tasks)


def _memory(prepared: Prepared, model: T5Gemma2, *, devices: int, micro: int, chunk: int) -> Memory:
    settings = prepared.samples.settings
    return memory(
        model,
        inspect(prepared.checkpoint.path).parameters,
        devices=devices,
        samples=micro,
        encoder=settings.encoder_length,
        decoder=settings.decoder_length,
        chunk=chunk,
    )


@dataclass(frozen=True, slots=True)
class Operations:
    """Operations of one forward pass over one sample.

    Attributes:
        encoder: Encoder layers.
        decoder: Decoder layers, including keys and values of the encoder's output.
        softmax: Product with the embedding matrix.
        vision: Vision tower, for all images of the sample.
        projector: Projection to the encoder's width.
    """

    encoder: int
    decoder: int
    softmax: int
    vision: int = 0
    projector: int = 0

    @property
    def training(self) -> int:
        """Operations in training: the frozen tower only runs forward, and nothing of images is recomputed."""
        return PASSES * (self.encoder + self.decoder + self.softmax) + self.vision + 3 * self.projector


def operations(model: T5Gemma2, *, encoder: int, decoder: int, images: int = 0) -> Operations:
    """Estimate the operations of one forward pass over one sample.

    Args:
        model: The model's shapes.
        encoder: Encoder tokens, including those of images.
        decoder: Labels.
        images: Images in the encoder's input.
    """
    tower, hidden = model.vision, model.encoder.hidden_size
    return Operations(
        encoder=encoder * model.encoder.num_hidden_layers * (_layer(model.encoder) + _scores(model.encoder, encoder)),
        decoder=model.decoder.num_hidden_layers
        * (
            decoder * (_layer(model.decoder) + _scores(model.decoder, decoder + encoder))
            + encoder * _keys_and_values(model.decoder)
        ),
        softmax=decoder * 2 * hidden * model.decoder.vocab_size,
        vision=images * _tower(tower),
        projector=images * model.tokens.mm_tokens_per_image * 2 * tower.hidden_size * hidden,
    )


def _layer(stack: TextConfig) -> int:
    """Projections and feed-forward of one layer, per token."""
    queries_and_output = 2 * 2 * stack.hidden_size * stack.dims["query"]
    return queries_and_output + _keys_and_values(stack) + 3 * 2 * stack.hidden_size * stack.intermediate_size


def _keys_and_values(stack: TextConfig) -> int:
    return 2 * 2 * stack.hidden_size * stack.dims["key_value"]


def _scores(stack: TextConfig, keys: int) -> int:
    """Scores of one query with `keys` keys, and the weighted sum of their values."""
    return 2 * 2 * keys * stack.dims["query"]


def _tower(tower: SiglipConfig) -> int:
    """One image through the tower."""
    patches, hidden = tower.dims["vision_positions"], tower.hidden_size
    embedding = 2 * tower.num_channels * tower.patch_size**2 * hidden
    layer = 4 * 2 * hidden**2 + 2 * 2 * hidden * tower.intermediate_size + 2 * 2 * patches * hidden
    return patches * (embedding + tower.num_hidden_layers * layer)


def memory(
    model: T5Gemma2,
    parameters: Mapping[str, int],
    *,
    devices: int,
    samples: int,
    encoder: int,
    decoder: int,
    chunk: int,
) -> Memory:
    """Estimate the memory of a device: all but the vision tower trained, gradient checkpointing, bfloat16.

    Args:
        model: The model's shapes.
        parameters: Number of parameters by part, from `inspect`.
        devices: Number of devices that share the model.
        samples: Samples per micro-batch.
        encoder: Encoder tokens per sample.
        decoder: Labels per sample.
        chunk: Labels per chunk of logits, to limit memory.
    """
    frozen = parameters["vision"]
    states = TRAINED_BYTES * (parameters["total"] - frozen) + FROZEN_BYTES * frozen
    stacks = ((model.encoder, "encoder", encoder), (model.decoder, "decoder", decoder))
    layer = max(parameters[part] // stack.num_hidden_layers for stack, part, _ in stacks)
    inputs = sum(tokens * stack.num_hidden_layers * stack.hidden_size for stack, _, tokens in stacks)
    return Memory(
        states=states // devices,
        gathered=GATHERED_BYTES * (parameters["embedding"] + 2 * layer),
        inputs=STATE_BYTES * samples * inputs,
        softmax=LOGIT_BYTES * min(chunk, samples * decoder) * model.decoder.vocab_size,
    )
