"""The plan of a training run and its estimated cost, from the model's headers and the index of the data."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Final

from t5g2convert.adaptation.data.corpora import Corpora
from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.train.assumed_machine import H100, Machine
from t5g2convert.adaptation.train.cost import Memory, memory
from t5g2convert.adaptation.train.dataset import Samples
from t5g2convert.adaptation.train.micro_batches import SampleSize, deal
from t5g2convert.adaptation.train.preflight import Prepared
from t5g2convert.adaptation.train.samples import text_steps_of
from t5g2convert.adaptation.train.schedule import first_sample
from t5g2convert.adaptation.train.sharding import gradient_fits
from t5g2convert.adaptation.train.throughput import BatchShape, Method, Pace, Seconds
from t5g2convert.adaptation.ul2.corruption import spans
from t5g2convert.adaptation.ul2.dataset import UL2Dataset
from t5g2convert.adaptation.ul2.sampler import Sampler
from t5g2convert.mapping.inspection import inspect


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
class Throughput:
    """The expected speed of text steps on an assumed machine.

    Attributes:
        machine: What is assumed.
        devices: Number of devices.
        fits: Whether the estimated memory is within that of a device.
        tokens_per_second: Tokens that encoder and decoder read, without padding, as in the log.
        seconds: Where the time of a step goes.
        step: Seconds of a step.
        peak_share: Share of the peak of all devices that the operations of the samples are.
    """

    machine: Machine
    devices: int
    fits: bool
    tokens_per_second: float
    seconds: Seconds
    step: float
    peak_share: float


@dataclass(frozen=True, slots=True)
class CorpusForecast:
    """A corpus: its text tokens, its share of the text that is read, and how many times the run reads it."""

    name: str
    tokens: int
    share: float
    epochs: float


@dataclass(frozen=True, slots=True)
class Forecast:
    """The forecast of a run.

    Attributes:
        steps: Number of steps.
        image_steps: Steps on documents with images, among them.
        samples: Samples per text step.
        image_samples: Documents per image step; None without image steps.
        documents: `packed` or `single`.
        tasks: The text tasks; empty if all steps are image steps.
        sentinels: The first and the last sentinel id in use; None if no task uses any.
        corpus: Text tokens in the data.
        epochs: How many times the run reads the text, on average.
        corpora: The corpora that have text; empty if all steps are image steps.
        operations: Operations of a text step, over all devices; None if there are no text steps.
        passes: Passes of a step, on average.
        useful: Share of the devices' work that is not padding or waiting for the slowest device of a pass, by the
            schedule of the first steps.
        recompute: Which activations are recomputed.
        memory: Estimated memory of a device.
        throughput: Expected speed; None if there are no text steps.
        notes: Notes for the user.
    """

    steps: int
    image_steps: int
    samples: int
    image_samples: int | None
    documents: str
    tasks: tuple[TaskForecast, ...]
    sentinels: tuple[int, int] | None
    corpus: int
    epochs: float
    corpora: tuple[CorpusForecast, ...]
    operations: float | None
    passes: float
    useful: float
    memory: Memory
    recompute: str
    throughput: Throughput | None
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what `t5g2 adapt --dry-run --json` prints."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


@dataclass(frozen=True, slots=True)
class RunCost:
    """What the steps of a run cost; the fields are those of `Forecast`."""

    operations: float | None
    passes: float
    useful: float
    padding: float
    memory: Memory
    recompute: str
    throughput: Throughput | None


def cost_of(
    prepared: Prepared[Samples[Any]], *, devices: int, loop: LoopConfig, shard_size: int | None = None
) -> RunCost:
    """Estimate the cost of a run, whatever its objective; the arguments are those of `forecast`."""
    samples = prepared.samples
    schedule = simulate(samples, devices=devices, loop=loop)
    parameters = inspect(prepared.checkpoint.path).parameters
    shapes = {name: stored.entry.shape for name, stored in prepared.checkpoint.tensors.items()}
    adapter = None if (shape := samples.settings.adapter) is None else shape.parameters(shapes)
    trained = parameters["total"] - parameters["vision"] if adapter is None else adapter
    once = loop.reduce == "step" or (loop.reduce == "auto" and gradient_fits(trained, H100.memory))
    held = memory(
        samples.shapes,
        parameters,
        devices=shard_size or devices,
        encoder=schedule.encoder,
        decoder=schedule.labels,
        chunk=loop.loss_chunk,
        reduces_once=once and devices > 1,
        adapter=adapter,
        images=schedule.images,
    )
    method = Method(shard_size, loop.recomputed, loop.attention, "step" if once else "pass")
    pace = Pace(samples.shapes, parameters, devices, method=method)
    return RunCost(
        # Both are those of training the model: an adapter has no gradients of the frozen weights.
        operations=schedule.operations if adapter is None else None,
        passes=schedule.passes / schedule.steps,
        useful=schedule.useful,
        padding=schedule.padding,
        memory=held,
        recompute=loop.recomputed,
        throughput=throughput(schedule, pace, held, save_every=loop.save_every)
        if schedule.text_steps and adapter is None
        else None,
    )


def forecast(
    prepared: Prepared[UL2Dataset], *, devices: int, loop: LoopConfig, shard_size: int | None = None
) -> Forecast:
    """Forecast a run.

    Args:
        prepared: The run.
        devices: Number of devices, over all machines.
        loop: Settings of the loop.
        shard_size: Devices that share one copy of the model; None for all.
    """
    samples = prepared.samples
    settings, sampler = samples.settings, samples.sampler
    raw_lengths = () if sampler is None else sampler.raw_lengths
    tasks = tuple(
        TaskForecast(
            task.name,
            task.weight,
            raw,
            size.encoder,
            size.labels,
            spans(raw, task)[1] if task.sentinel else 0,
        )
        # Without text there are no lengths and no sizes.
        for task, raw, size in zip(settings.mixture.tasks, raw_lengths, samples.text_sizes, strict=False)
    )
    text_steps = text_steps_of(settings)
    corpora = () if sampler is None else _corpora(samples.corpora, sampler, text_steps * settings.samples)
    tokens = samples.corpora.tokens
    ids = samples.sentinels
    cost = cost_of(prepared, devices=devices, loop=loop, shard_size=shard_size)
    return Forecast(
        steps=settings.steps,
        image_steps=settings.steps - text_steps,
        samples=settings.samples,
        image_samples=settings.image_samples,
        documents=settings.documents,
        tasks=tasks,
        sentinels=(ids.first, ids.last) if ids.count else None,
        corpus=tokens,
        epochs=sum(corpus.epochs * corpus.tokens for corpus in corpora) / max(1, tokens),
        corpora=corpora,
        operations=cost.operations,
        passes=cost.passes,
        useful=cost.useful,
        memory=cost.memory,
        recompute=cost.recompute,
        throughput=cost.throughput,
        notes=prepared.notes,
    )


def _corpora(corpora: Corpora, sampler: Sampler, samples: int) -> tuple[CorpusForecast, ...]:
    return tuple(
        CorpusForecast(corpora[texts.corpus].name, corpora[texts.corpus].packed.tokens, float(share), float(epochs))
        for texts, share, epochs in zip(sampler.texts, sampler.shares, sampler.epochs(samples), strict=True)
    )


def throughput(schedule: "Schedule", pace: Pace, held: Memory, *, save_every: int) -> Throughput:
    """Estimate the speed of text steps.

    Args:
        schedule: Text steps, as they are dealt to the devices.
        pace: The times of passes.
        held: Estimated memory of a device.
        save_every: Steps between checkpoints.
    """
    machine, devices = pace.machine, pace.devices
    seconds = pace.step(schedule.text_passes, steps=schedule.text_steps, save_every=save_every)
    work = schedule.text_operations / schedule.text_steps
    return Throughput(
        machine=machine,
        devices=devices,
        fits=held.total <= machine.memory,
        tokens_per_second=schedule.text_tokens / schedule.text_steps / seconds.total,
        seconds=seconds,
        step=seconds.total,
        peak_share=work / seconds.total / machine.peak / devices,
    )


SIMULATED: Final = 20_000
"""About how many samples are simulated: every block has the same tasks, so that steps are alike."""


@dataclass(frozen=True, slots=True)
class Schedule:
    """Steps of a run as they are dealt to the devices.

    Attributes:
        steps: Number of steps.
        passes: Passes of all these steps.
        useful: Share of the devices' operations that is not padding or waiting for the slowest device of a pass.
        encoder: Most encoder tokens of a micro-batch, including padding.
        labels: Most labels of a micro-batch, including padding.
        text_steps: Steps on text or pairs.
        text_passes: How often the devices make micro-batches of these shapes together, one for each device that has
            samples.
        text_tokens: Tokens that encoder and decoder read in text steps, without padding.
        text_operations: Operations of the samples of text steps.
        padding: Share of the tokens of micro-batches that is padding.
        images: Most images of a micro-batch.
    """

    steps: int
    passes: int
    useful: float
    encoder: int
    labels: int
    text_steps: int
    text_passes: Mapping[tuple[BatchShape, ...], int]
    text_tokens: int
    text_operations: int
    padding: float
    images: int = 0

    @property
    def operations(self) -> float | None:
        """Operations of a text step, on average, without padding; None if there are no text steps."""
        return self.text_operations / self.text_steps if self.text_steps else None


def simulate(samples: Samples[Any], *, devices: int, loop: LoopConfig, steps: int | None = None) -> Schedule:
    """Deal the first steps of a run, without reading any text.

    Args:
        samples: The samples of the run.
        devices: Number of devices, over all machines.
        loop: Settings of the loop.
        steps: Number of steps (default: enough for an estimate).
    """
    settings = samples.settings
    if steps is None:
        steps = min(max(1, SIMULATED // settings.samples_of(0)), settings.steps)
    useful, paid, passes, encoder, labels, read, padded_to = 0, 0, 0, 0, 0, 0, 0
    shapes: Counter[tuple[BatchShape, ...]] = Counter()
    text_steps, text_tokens, text_operations, images = 0, 0, 0, 0
    for step in range(steps):
        first = first_sample(settings, step)
        sizes = [samples.size(step, first + number) for number in range(settings.samples_of(step))]
        dealt = deal(sizes, world=devices, tokens=loop.most_tokens(settings), samples=loop.micro_batch)
        passes += len(dealt)
        useful += sum(size.cost for size in sizes)
        read += sum(size.encoder + size.labels for size in sizes)
        is_text = settings.kind_of(step) != "images"
        if is_text:
            text_steps += 1
            text_tokens += sum(size.encoder + size.labels for size in sizes)
            text_operations += sum(size.cost for size in sizes)
        for chosen in dealt:
            each = [[sizes[number] for number in chosen[rank::devices]] for rank in range(devices)]
            padded = [samples.padded(own) for own in each]
            paid += devices * max(size.cost for size in padded)
            padded_to += sum(size.encoder + size.labels for size in padded)
            encoder = max(encoder, *(size.encoder for size in padded))
            labels = max(labels, *(size.labels for size in padded))
            images = max(images, *(sum(size.images for size in own) for own in each))
            if is_text:
                shapes[tuple(sorted(_shape(own) for own in each if own))] += 1
    return Schedule(
        steps,
        passes,
        useful / paid,
        encoder,
        labels,
        text_steps,
        shapes,
        text_tokens,
        text_operations,
        1 - read / padded_to,
        images,
    )


def _shape(sizes: list[SampleSize]) -> BatchShape:
    return BatchShape(len(sizes), max(size.encoder for size in sizes), max(size.labels for size in sizes))
