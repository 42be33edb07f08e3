"""The options of `t5g2 adapt`, in groups, and a help that shows them so."""

from functools import partial
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import typer

from t5g2convert.cli.command import Command

OURS: Final = "not established; our default"

_objective = partial(typer.Option, rich_help_panel="Objective")
_optimizer = partial(typer.Option, rich_help_panel="Optimizer")
_run = partial(typer.Option, rich_help_panel="Run")
_machines = partial(typer.Option, rich_help_panel="Machines")

LAUNCHING: Final = """\b
One machine:
  t5g2 adapt MODEL DATA OUT --lr 1e-4 --steps 10000 --devices 8
Several machines, by torchrun on each:
  torchrun --nnodes 2 --nproc-per-node 8 --rdzv-backend c10d --rdzv-endpoint HOST:29500 -m t5g2convert \\
    adapt MODEL DATA OUT --lr 1e-4 --steps 10000
Several machines, by SLURM:
  srun --nodes 2 --ntasks-per-node 8 --gpus-per-node 8 --kill-on-bad-exit t5g2 \\
    adapt MODEL DATA OUT --lr 1e-4 --steps 10000

All processes must see MODEL, DATA and OUT under the same paths. With --resume their number may be another.
"""
"""The end of the help."""

LrOption = Annotated[float, _optimizer("--lr", help="The highest learning rate; the paper's is not established.")]
StepsOption = Annotated[
    int, _optimizer("--steps", help="Steps of the whole run; the learning rate ends with them, so they stay.")
]

MixtureOption = Annotated[
    Path | None,
    _objective(
        "--mixture",
        help=f"A YAML table of tasks. Of the paper's five, sentinels and mode tokens are {OURS}.",
        show_default="the paper's, 1:1:1:1:4",
    ),
]
EncoderLengthOption = Annotated[
    int, _objective("--encoder-length", help="Tokens of the encoder's input at most; 16384 in the paper.")
]
DecoderLengthOption = Annotated[int, _objective("--decoder-length", help="Labels at most; 16384 in the paper.")]
EncoderBosOption = Annotated[
    bool, _objective("--encoder-bos/--no-encoder-bos", help=f"Begin the encoder's input with bos ({OURS}).")
]
EncoderEosOption = Annotated[
    bool, _objective("--encoder-eos/--no-encoder-eos", help=f"End the encoder's input with eos ({OURS}).")
]
ImageEveryOption = Annotated[
    int | None,
    _objective(
        "--image-every",
        min=1,
        help=f"Make every K-th step one of documents with images, and train the projector ({OURS}).",
        show_default="none",
        metavar="K",
    ),
]
TeacherOption = Annotated[
    Path | None,
    _objective(
        "--kd",
        help="Distil this Gemma 3 folder: labels that are raw tokens with a token before them are learnt from its "
        "distribution (KL), all others by cross-entropy. Image steps use cross-entropy alone.",
        metavar="PARENT",
    ),
]
RopeCheckOption = Annotated[
    str | None,
    _objective(
        "--rope-scaling",
        help="linear:F; refused unless config.json has it, since `t5g2 convert --rope-scaling` sets it.",
        metavar="SCALING",
        show_default="what config.json has",
    ),
]

BatchOption = Annotated[
    int,
    _optimizer(
        "--batch-tokens",
        help="Room for encoder tokens in a step, in all: samples of --encoder-length; 4.2M in the paper.",
    ),
]
WarmupOption = Annotated[int, _optimizer("--warmup", help="Steps in which the rate rises; 100 in the paper.")]
FloorOption = Annotated[float, _optimizer("--lr-floor", help=f"Where the cosine ends, as a part of --lr ({OURS}).")]
Beta1Option = Annotated[float, _optimizer("--beta1", help=f"AdamW's ({OURS}).")]
Beta2Option = Annotated[float, _optimizer("--beta2", help=f"AdamW's ({OURS}).")]
EpsOption = Annotated[float, _optimizer("--eps", help=f"AdamW's ({OURS}).")]
DecayOption = Annotated[float, _optimizer("--weight-decay", help=f"AdamW's, of matrices alone ({OURS}).")]
ClipOption = Annotated[float, _optimizer("--clip", help="Largest norm of the whole gradient; 1.0 in the paper.")]
FreezeOption = Annotated[
    int, _optimizer("--freeze-until", help="Until this step only what --trainable names is trained.", metavar="STEP")
]
TrainableOption = Annotated[
    list[str] | None,
    _optimizer(
        "--trainable",
        help="For --freeze-until: names on disk, as 'model.encoder.*'; may be given several times.",
        metavar="PATTERN",
    ),
]
SeedOption = Annotated[int, _optimizer("--seed", help="Of the order of the data, and of the noise.")]

ResumeOption = Annotated[
    bool, _run("--resume", help="Go on from OUT's newest complete checkpoint; the settings must be the same.")
]
SaveOption = Annotated[int, _run("--save-every", min=1, help="Steps between two checkpoints; 10000 in the paper.")]
KeepOption = Annotated[int, _run("--keep", min=1, help="Checkpoints that are kept; 5 are averaged in the paper.")]
LogOption = Annotated[int, _run("--log-every", min=1, help="Steps between two lines; OUT/metrics.jsonl has all.")]
DryRunOption = Annotated[
    bool, _run("--dry-run", help="Say what the run would do, and what it is estimated to take; nothing is written.")
]
ExportOption = Annotated[
    bool, _run("--export/--no-export", help="At the end write the model as OUT/model, and see whether it loads.")
]

AcceleratorOption = Annotated[
    Literal["auto", "cpu", "cuda"], _machines("--accelerator", help="Where it runs; auto is cuda if there is any.")
]
DevicesOption = Annotated[
    int | None,
    _machines(
        "--devices", min=1, help="Processes on each machine.", show_default="1, or what torchrun or SLURM started"
    ),
]
NodesOption = Annotated[
    int | None, _machines("--nodes", min=1, help="Machines.", show_default="1, or what torchrun or SLURM started")
]
PrecisionOption = Annotated[
    Literal["bfloat16", "float32"], _machines("--precision", help="What is computed in; weights stay float32.")
]
MicroOption = Annotated[int, _machines("--micro-batch", min=1, help="Samples that a process takes at once.")]
RecomputeOption = Annotated[
    bool,
    _machines("--gradient-checkpointing/--no-gradient-checkpointing", help="Compute activations twice, for memory."),
]
ChunkOption = Annotated[int, _machines("--loss-chunk", min=1, help="Labels whose logits exist at once.")]
WorkersOption = Annotated[int, _machines("--workers", min=0, help="Processes beside each, that make its samples.")]


class GroupedCommand(Command):
    """A command whose help lists its options in groups."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the options, a section for each group, in the order in which groups first come."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                name = getattr(parameter, "rich_help_panel", None)
                kind = "Arguments" if parameter.param_type_name == "argument" else "Options"
                groups.setdefault(name or kind, []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)
