"""What a run would do, from the model's headers and the table of contents of the data: no weight is read."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from t5g2convert.adaptation.train.cost import Memory, memory, operations
from t5g2convert.adaptation.train.preflight import Prepared
from t5g2convert.adaptation.ul2.corruption import lengths, spans
from t5g2convert.checkpoint.families.registry import read_trainable
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2
from t5g2convert.mapping.inspection import inspect


@dataclass(frozen=True, slots=True)
class TaskForecast:
    """A task: its samples in a block of the mixture, and the tokens and sentinels of each of its samples."""

    name: str
    weight: int
    raw: int
    encoder: int
    labels: int
    sentinels: int


@dataclass(frozen=True, slots=True)
class Forecast:
    """A run that was not started.

    Attributes:
        steps: Of the run.
        image_steps: Steps of them that are of documents with images.
        samples: Of a step.
        tasks: The tasks of text; none where all steps are of images.
        sentinels: The first and the last sentinel id that a sample may have; None where no task has any.
        corpus: Tokens of the text.
        epochs: How often the run reads it.
        operations: Of a step of text, all devices together; None where there is no such step.
        memory: What a device is estimated to hold.
        notes: What a user should know.
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
        """What `t5g2 adapt --dry-run --json` prints."""
        return {**asdict(self), "memory": {**asdict(self.memory), "total": self.memory.total}}


def forecast(prepared: Prepared, *, devices: int, micro: int, chunk: int) -> Forecast:
    """Say what a run would do.

    Args:
        prepared: The run.
        devices: All of them.
        micro: Samples that a device takes at once.
        chunk: Labels whose logits exist at once.
    """
    samples = prepared.samples
    settings, schedule = samples.settings, samples.schedule
    raw_lengths = () if schedule is None else schedule.raw_lengths
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
        epochs=0.0 if schedule is None else blocks / schedule.chunks,
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
