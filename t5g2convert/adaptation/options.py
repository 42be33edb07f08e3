"""The options of `adapt` and `average`, for the command line and the Python API."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from t5g2convert.adaptation.train.run_settings import MACHINES, OBJECTIVE, RUN, RunSettings
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.command_options import CommandOptions, Option
from t5g2convert.conversion.option_values import KEEP
from t5g2convert.conversion.options import Dtype

LAST: Final = 5
"""Number of checkpoints that the paper averages."""

IMAGE_WORKERS: Final = 2
"""Processes that prepare batches by default, if some have images."""

REPLACE: Final = "Replace an existing t5g2 output at the very end; a folder that contains anything else is refused."


class LoopConfig(CommandOptions):
    """Settings of the training loop that do not change the result, apart from rounding and `skip_nonfinite`.

    Attributes:
        skip_nonfinite: How many steps with a gradient that is not finite are skipped, counted from each start.
        eval_every: Steps between evaluations.
        eval_samples: Held-out samples of an evaluation.
        micro_tokens: Most encoder tokens and labels per process and forward pass, including padding; a pass has at
            least one sample. None for the budget of one sample, or with `micro_batch` for no limit.
        micro_batch: Most samples per process and forward pass; None for no limit.
        recompute: Which activations are recomputed in the backward pass, to save memory: none, all but the results of
            matrix products (selective), or all but the inputs of layers (full).
        gradient_checkpointing: False is the older spelling of `recompute="none"`.
        reduce: Whether gradients are summed over processes after each pass, or once a step, which needs memory for the
            whole gradient on each device; auto for once where a quarter of the memory suffices.
        attention: Attention with dense masks, or by blocks of the scores that are seen (flex_attention).
        compile: Compile the layers with torch.compile.
        loss_chunk: Labels per chunk of logits, to limit memory.
        workers: Additional processes that prepare batches, per process; None for `IMAGE_WORKERS` if there are image
            steps, and none otherwise.
        save_every: Steps between checkpoints.
        save_minutes: Minutes after which an interim checkpoint is written.
        keep: Number of checkpoints to keep, besides the newest interim one.
        async_save: Whether checkpoints are written while training goes on, from a copy in host memory; None for each
            time that memory allows it.
    """

    save_every: Annotated[int, Field(ge=1), Option("Steps between checkpoints; 10000 in the paper.", group=RUN)] = (
        10_000
    )
    save_minutes: Annotated[
        float,
        Field(gt=0),
        Option(
            "Minutes after which a checkpoint is written in between; only the newest of these is kept, and none is "
            "averaged.",
            group=RUN,
        ),
    ] = 30.0
    keep: Annotated[
        int, Field(ge=1), Option("Checkpoints of --save-every to keep; the paper averages 5.", group=RUN)
    ] = LAST
    async_save: Annotated[
        bool | None,
        Option(
            "Write checkpoints while training goes on, from a copy of weights and moments in the host's memory.",
            flag="--async-save/--no-async-save",
            default="where memory allows",
            group=RUN,
        ),
    ] = None
    skip_nonfinite: Annotated[
        int,
        Field(ge=0),
        Option(
            "Make no update in up to N steps whose gradient is not finite, instead of ending.", metavar="N", group=RUN
        ),
    ] = 0
    eval_every: Annotated[
        int, Field(ge=1), Option("Steps between evaluations, with --eval.", metavar="STEPS", group=RUN)
    ] = 1000
    eval_samples: Annotated[
        int,
        Field(ge=1),
        Option("Held-out samples of an evaluation, in whole blocks of the mixture; of images as many.", group=RUN),
    ] = 256
    micro_tokens: Annotated[
        int | None,
        Field(ge=1),
        Option(
            "Most encoder tokens and labels per process and forward pass, padding included.",
            default="--encoder-length plus --decoder-length",
            group=MACHINES,
        ),
    ] = None
    micro_batch: Annotated[
        int | None,
        Field(ge=1),
        Option("Most samples per process and forward pass.", default="what --micro-tokens allows", group=MACHINES),
    ] = None
    recompute: Annotated[
        Literal["none", "selective", "full"],
        Option(
            "Activations to recompute in the backward pass, to save memory: none, all but the results of matrix "
            "products (selective), or all but the inputs of layers (full).",
            group=MACHINES,
        ),
    ] = "full"
    gradient_checkpointing: Annotated[
        bool, Option("An older spelling: --no-gradient-checkpointing is --recompute none.", group=MACHINES)
    ] = True
    reduce: Annotated[
        Literal["auto", "step", "pass"],
        Option(
            "Sum gradients over devices after each pass, or once a step, for which each device holds the whole "
            "gradient; auto is once if a quarter of the memory suffices.",
            group=MACHINES,
        ),
    ] = "auto"
    attention: Annotated[
        Literal["dense", "blocks"],
        Option(
            "With masks of all scores, or by blocks of 128 x 128 scores (flex_attention), of which hidden ones are "
            "skipped; needs a GPU, and its speed is not measured yet.",
            group=MACHINES,
        ),
    ] = "dense"
    compile: Annotated[
        bool, Option("Compile the layers with torch.compile.", flag="--compile/--no-compile", group=MACHINES)
    ] = False
    loss_chunk: Annotated[int, Field(ge=1), Option("Labels per chunk of logits, to limit memory.", group=MACHINES)] = (
        1024
    )
    workers: Annotated[
        int | None,
        Field(ge=0),
        Option(
            "Additional processes that prepare batches and decode their images, per process.",
            default=f"{IMAGE_WORKERS} with --image-every, else 0",
            group=MACHINES,
        ),
    ] = None

    @property
    def recomputed(self) -> Literal["none", "selective", "full"]:
        """Which activations are recomputed, in either spelling."""
        return self.recompute if self.gradient_checkpointing else "none"

    def most_tokens(self, settings: RunSettings) -> int | None:
        """Return the most encoder tokens and labels per process and forward pass; None for no limit."""
        if self.micro_tokens is None and self.micro_batch is None:
            return settings.tokens_of_pass
        return self.micro_tokens

    def workers_of(self, *, has_images: bool) -> int:
        """Return the number of additional processes that prepare batches: images are decoded by them."""
        if self.workers is not None:
            return self.workers
        return IMAGE_WORKERS if has_images else 0


class Hardware(CommandOptions):
    """The hardware to train on; apart from rounding, the result does not depend on it.

    Attributes:
        accelerator: `cpu`, `cuda`, or `auto` for cuda if available.
        devices: Processes per machine, one per device; None for the number that torchrun or SLURM started, else 1.
        nodes: Machines; None for the number that torchrun or SLURM started, else 1.
        shard_size: Processes that share one copy of the model; None for all.
        timeout: Seconds that a process waits for the others.
    """

    accelerator: Annotated[
        Literal["auto", "cpu", "cuda"], Option("Where to train; auto is cuda if available.", group=MACHINES)
    ] = "auto"
    devices: Annotated[
        int | None,
        Field(ge=1),
        Option("Processes per machine.", default="1, or what torchrun or SLURM started", group=MACHINES),
    ] = None
    nodes: Annotated[
        int | None,
        Field(ge=1),
        Option("Number of machines.", default="1, or what torchrun or SLURM started", group=MACHINES),
    ] = None
    shard_size: Annotated[
        int | None,
        Field(ge=1),
        Option(
            "Processes that share one copy of the model; with those of one machine, only gradients travel between "
            "machines.",
            default="all",
            metavar="N",
            group=MACHINES,
        ),
    ] = None
    timeout: float = 1800.0


class RunOptions(LoopConfig, Hardware, RunSettings):
    """The options of every kind of training run.

    Attributes:
        kd: A Gemma 3 folder to distil.
        eval: Held-out packed data.
        rope_scaling: RoPE scaling that the config must have; None accepts any.
        resume: Continue from the newest checkpoint of the run's folder.
        from_step: With `resume`, continue from the checkpoint of this step; newer ones are set aside.
        change: Whether settings may change when the run resumes.
        export: Write the last checkpoint as a model.
    """

    kd: Annotated[
        Path | None,
        Option(
            "Distil this Gemma 3 folder: labels that are raw tokens with a token before them are learnt from its "
            "distribution (KL), all others by cross-entropy. Image steps use cross-entropy only.",
            metavar="PARENT",
            group=OBJECTIVE,
        ),
    ] = None
    eval: Annotated[
        Path | None,
        Option(
            "Packed held-out data, or a YAML file like DATA: its losses are computed before the first step and every "
            "--eval-every steps, with the encoder visible and hidden.",
            metavar="DATA",
            group=RUN,
        ),
    ] = None
    rope_scaling: Annotated[
        str | None,
        Option(
            "linear:F that config.json must have; `t5g2 convert --rope-scaling` sets it.",
            metavar="SCALING",
            default="what config.json has",
            group=OBJECTIVE,
        ),
    ] = None
    resume: Annotated[
        bool, Option("Continue from OUT's newest complete checkpoint, with the same settings.", group=RUN)
    ] = False
    from_step: Annotated[
        int | None,
        Field(ge=1),
        Option(
            "With --resume: continue from the checkpoint of this step; newer ones are renamed to "
            "step-XXXXXXXX.abandoned. Once the run has gone back, the same command continues from the newest.",
            flag="--from",
            metavar="STEP",
            default="the newest",
            group=RUN,
        ),
    ] = None
    change: Annotated[
        bool,
        Option(
            "With --resume: settings that differ, such as --lr, hold from the checkpoint on, and run.json "
            "records both. More --steps and --skip-steps need no --change.",
            group=RUN,
        ),
    ] = False
    export: Annotated[bool, Option("At the end, write the model to OUT/model and check that it loads.", group=RUN)] = (
        True
    )


class AdaptOptions(Settings, RunOptions):
    """All options of `t5g2 adapt`."""


class AverageOptions(CommandOptions):
    """The options of averaging.

    Attributes:
        model: The model that was trained, if it was moved, or if transformers' Trainer saved the checkpoints.
        last: Number of checkpoints, counted from the last.
        dtype: `keep` for the model's own dtypes, or the dtype that all tensors are cast to.
        overwrite: Replace an existing output of this tool at the very end; nothing else is ever replaced.
        progress: Called with the number of bytes just written.
    """

    model: Annotated[
        Path | None,
        Option(
            "The model that was trained, with its frozen tensors; required for checkpoints of Trainer.",
            default="where it was",
        ),
    ] = None
    last: Annotated[int, Field(ge=1), Option("Number of checkpoints, counted from the last; 5 in the paper.")] = LAST
    dtype: Annotated[Dtype, Option("Dtype of the output: keep, bfloat16, float16 or float32.", metavar="DTYPE")] = KEEP
    overwrite: Annotated[bool, Option(REPLACE)] = False
    progress: Callable[[int], None] | None = None
