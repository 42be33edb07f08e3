"""How a model was trained further, as its card tells it from the manifest's `adaptation`."""

import shlex
from collections.abc import Iterator, Sequence
from typing import Final

from t5g2convert.checkpoint.manifest import AdaptationRecord, TaskRecord, TrainingSettings
from t5g2convert.publish.markdown import code, fenced, table

NOT_ESTABLISHED: Final = (
    "learning rate", "weight decay", "optimizer", "sentinel and mode tokens", "packing",
    "begin and end tokens of what the encoder reads",
)  # fmt: skip
"""What is not known of Google's training of T5Gemma 2: a run has its user's choice or this tool's default."""


def training(told: AdaptationRecord, dtype: str | None, *, source: str) -> Iterator[str]:
    """The training, in Markdown, a paragraph or block at a time.

    Args:
        told: The manifest's `adaptation`.
        dtype: The dtype that the model was cast to, if it was.
        source: What a command calls the model that was trained.
    """
    averaged: Sequence[int] = told.checkpoints
    settings = told.settings
    average = [f"$ t5g2 average RUN --last {len(averaged)}"] if len(averaged) > 1 else []
    options_given = [*_options(settings), *([f"--save-every {averaged[-1] - averaged[-2]}"] if average else [])]
    yield fenced("console", [f"$ t5g2 adapt {source} DATA RUN {' '.join(options_given)}", *average])
    values = f"those of step {told.steps:,}"
    if len(averaged) > 1:
        values = f"the mean of {len(averaged)} checkpoints, of steps {', '.join(f'{step:,}' for step in averaged)}"
    teacher = settings.teacher
    low, high = settings.betas
    rows = [
        ["values", values + ("" if dtype is None else f", in {code(dtype)}")],
        ["tokens read", f"{told.tokens:,}"],
        [
            "learnt from",
            "the data alone" if teacher is None else f"the data, and the teacher {code(teacher)}",
        ],
        ["trained", f"{len(told.trained)} names of tensors in `t5g2.json`"],
        ["left as they were", ", ".join(map(code, told.frozen)) or "no part"],
        [
            "learning rate",
            f"{settings.lr:g} after {settings.warmup:,} steps, along a cosine to {settings.lr_floor:g} of "
            f"that at step {settings.steps:,}",
        ],
        [
            "optimizer",
            f"AdamW, betas {low:g} and {high:g}, weight decay {settings.weight_decay:g}, gradients clipped at "
            f"{settings.clip:g}",
        ],
        ["settings", f"in `t5g2.json`, sha256 {code(told.settings_sha256)}"],
        ["data", f"sha256 {code(told.data_sha256)}"],
    ]
    yield table(["training", "which"], rows)
    yield "The tasks, and how often each comes:"
    tasks = [
        [code(task.name), task.kind, f"{task.rate:g}", _span(task), str(task.weight), _marks(task)]
        for task in settings.mixture.tasks
    ]
    header = ["task", "kind", "rate", "mean span", "weight", "marks"]
    yield table(header, tasks, right=(2, 3, 4))
    yield (
        f"Not established of Google's own training, and so the choice of this run or a default of t5g2: "
        f"{', '.join(NOT_ESTABLISHED)}."
    )


def _options(settings: TrainingSettings) -> Iterator[str]:
    """The options of the command that say most of the result."""
    for name in ("lr", "steps", "batch_tokens", "encoder_length", "decoder_length", "image_every", "warmup", "seed"):
        if (value := getattr(settings, name)) is not None:
            yield f"--{name.replace('_', '-')} {value}"
    if settings.teacher is not None:
        yield "--kd PARENT"
    if settings.freeze_until:
        yield f"--freeze-until {settings.freeze_until}"
        yield from (f"--trainable {shlex.quote(pattern)}" for pattern in settings.trainable)


def _span(task: TaskRecord) -> str:
    return "one" if task.mean_span is None else f"{task.mean_span:g}"


def _marks(task: TaskRecord) -> str:
    """The tokens that tell the model of a task."""
    mode = [] if task.mode_token is None else [f"mode token {task.mode_token}"]
    return ", ".join([*mode, *(["sentinels"] if task.sentinel else [])]) or "none"
