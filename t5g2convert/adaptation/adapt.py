"""A whole run: checks, engine, weights, the loop, and what is made of its last checkpoint."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from t5g2convert.adaptation.export import Exported, check_export_place, export_checkpoint
from t5g2convert.adaptation.train import checkpoints, model
from t5g2convert.adaptation.train.checkpoint_manifest import (
    check_files,
    checkpoint_path,
    complete_checkpoints,
    read_checkpoint_manifest,
)
from t5g2convert.adaptation.train.checkpoints import State
from t5g2convert.adaptation.train.distributed import (
    Hardware,
    ReportedElsewhere,
    build_engine,
    early_launcher,
    early_rank,
    end_children,
    require_extra,
    run_on_all_ranks,
)
from t5g2convert.adaptation.train.forecast import Forecast, forecast
from t5g2convert.adaptation.train.lock import locked
from t5g2convert.adaptation.train.loop import LoopConfig, make_optimizer, train
from t5g2convert.adaptation.train.loss import ModelWithLoss
from t5g2convert.adaptation.train.metrics import Metrics, plot_losses, read_metrics
from t5g2convert.adaptation.train.preflight import Prepared, prepare
from t5g2convert.adaptation.train.run_folder import (
    METRICS_FILE,
    PLOT_FILE,
    RUN_FILE,
    check_own_files,
    check_same,
    check_vacant,
    describe,
    identity,
    newest,
    write_description,
)
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.train.teacher import Teacher, check_teacher, load_teacher
from t5g2convert.adaptation.ul2.dataset import task_names
from t5g2convert.conversion.write.output_path import check_apart
from t5g2convert.errors import T5g2Error, UsageError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

LIBRARIES = ("torch", "transformers", "lightning_fabric", "numpy")
"""Whose versions run.json has."""


@dataclass(frozen=True, slots=True)
class Request:
    """What is asked for.

    Attributes:
        model: The folder of a converted model.
        data: The folder of packed data.
        run: The folder of the run, absent or empty unless it is resumed.
        settings: What decides the result; `teacher` is filled in.
        teacher: The folder of a Gemma 3 to be distilled, if there is one.
        rope_scaling: What the config must say of RoPE; None for whatever it says.
        resume: Whether to go on from the newest checkpoint of the folder.
        hardware: What it runs on.
        loop: How it is cut into pieces.
        chunk: Labels whose logits exist at once.
        recompute: Whether activations are computed twice, to save memory.
        export: Whether a model is made of the last checkpoint.
    """

    model: Path
    data: Path
    run: Path
    settings: Settings
    teacher: Path | None = None
    rope_scaling: str | None = None
    resume: bool = False
    hardware: Hardware = field(default_factory=Hardware)
    loop: LoopConfig = field(default_factory=LoopConfig)
    chunk: int = 1024
    recompute: bool = False
    export: bool = False

    @property
    def inputs(self) -> tuple[Path, ...]:
        """All that is read, none of which may lie in the run's folder."""
        return (self.model, self.data, *([] if self.teacher is None else [self.teacher]))


@dataclass(frozen=True, slots=True)
class Outcome:
    """A run that was done.

    Attributes:
        first: Whether this is the first process, which alone tells of it.
        start: Steps that were done before.
        trained: Number of parameters that are trained.
        checkpoint: The last checkpoint.
        steps: The whole log, on the first process.
        plot: The picture of the losses.
        settings: The run's, with the teacher's identity.
        exported: The exported model, on rank 0, if --export was set.
    """

    first: bool
    start: int
    trained: int
    checkpoint: Path
    steps: tuple[Metrics, ...]
    plot: Path
    settings: Settings
    exported: Exported | None = None

    def to_json(self) -> dict[str, Any]:
        """What `t5g2 adapt --json` prints."""
        last = self.steps[-1]
        return {
            "steps": last.step,
            "resumed_from": self.start,
            "trained_parameters": self.trained,
            "checkpoint": str(self.checkpoint),
            "plot": str(self.plot),
            "model": None if self.exported is None else self.exported.to_json(),
            "loss": last.loss,
            "tasks": dict(last.tasks),
        }


def adapt(request: Request, *, begun: Callable[[Sequence[str]], None], report: Callable[[Metrics], None]) -> Outcome:
    """Train a model, or go on training it.

    Args:
        request: What is asked for.
        begun: Told once, on the first process, of what was found.
        report: Told of every step, on the first process.

    Raises:
        DataError: The files of the data are not those that were packed; read when a run begins, not when it goes on.
        T5g2Error: As `prepare`, `train` and `checkpoints`; on other ranks than 0 `ReportedElsewhere`, with the same
            exit code.
    """
    try:
        require_extra()
        prepared = _prepare(request)
        engine = build_engine(request.hardware, request.settings.precision)
    except T5g2Error as error:
        if early_rank() == 0:
            raise
        raise ReportedElsewhere(error.exit_code) from None
    with ExitStack() as held:
        try:
            engine.launch()
            run_on_all_ranks(
                engine, lambda: held.enter_context(locked(request.run)) if engine.global_rank == 0 else None
            )
            outcome = _run(engine, request, prepared, begun, report)
        except BaseException:
            end_children(engine)
            raise
        # The others may go; what follows takes one process.
        torch.distributed.destroy_process_group()
        if not outcome.first or not request.export:
            return outcome
        exported = export_checkpoint(request.run, outcome.checkpoint, request.model)
    return replace(outcome, exported=exported)


def foresee(request: Request) -> Forecast:
    """Say what a run would do; everything that can be checked before it is started is.

    Raises:
        T5g2Error: As `prepare`.
    """
    require_extra()
    hardware = request.hardware
    devices = (hardware.devices or 1) * (hardware.nodes or 1)
    return forecast(_prepare(request), devices=devices, micro=request.loop.micro, chunk=request.chunk)


def _prepare(request: Request) -> Prepared:
    prepared = prepare(request.model, request.data, request.settings, rope_scaling=request.rope_scaling)
    check_apart(request.run, *request.inputs)
    if request.teacher is not None:
        if request.settings.image_every == 1:
            raise UsageError("--kd teaches text alone, and with --image-every 1 there is none")
        longest = prepared.samples.longest + 1
        check_teacher(request.teacher, vocabulary=prepared.tokens.vocabulary, longest=longest)
    if not _goes_on(request) and early_launcher() is None and early_rank() == 0:
        # Before other processes are started; those that torchrun or SLURM started wait to be told together.
        check_vacant(request.run)
    if request.export and _goes_on(request) and request.settings.steps not in complete_checkpoints(request.run):
        # Not after days of training; a run that is finished may have been exported, and is looked at then.
        check_export_place(request.run)
    return prepared


def _run(
    engine: "Fabric",
    request: Request,
    prepared: Prepared,
    begun: Callable[[Sequence[str]], None],
    report: Callable[[Metrics], None],
) -> Outcome:
    first = engine.global_rank == 0
    known: dict[str, Any] = engine.broadcast(
        run_on_all_ranks(engine, lambda: _identities(request, prepared) if first else {})
    )
    settings = request.settings.model_copy(update={"teacher": known["teacher"]})
    prepared.samples.settings = settings
    description = describe(
        settings,
        model=known["model"],
        model_folder=request.model,
        data=prepared.samples.packed.sha256,
        versions=known["versions"],
    )
    # As the first process sees it, before it writes anything.
    goes_on = engine.broadcast(_goes_on(request))
    if not goes_on:
        packed, rank, world = prepared.samples.packed, engine.global_rank, engine.world_size
        run_on_all_ranks(engine, lambda: packed.check_bytes(part=rank, parts=world))
    start, folder = run_on_all_ranks(engine, lambda: _start(engine, request, settings, description, goes_on=goes_on))
    module, state = run_on_all_ranks(engine, lambda: _build(engine, request, prepared, settings))
    if not goes_on:
        # Not before everything was looked at: a start that was refused leaves the folder to the next.
        run_on_all_ranks(engine, lambda: write_description(request.run, description) if first else None)
    if folder is not None:
        run_on_all_ranks(engine, lambda: checkpoints.load(folder, state))
    if first:
        begun([*prepared.notes, *([f"{start:,} steps were done before"] if start else [])])
    if start < settings.steps:
        train(engine, module, state, prepared.samples, run=request.run, start=start, loop=request.loop, report=report)
    engine.barrier()
    steps = read_metrics(request.run / METRICS_FILE) if first else []
    if first:
        plot_losses(steps, request.run / PLOT_FILE)
    return Outcome(
        first=first,
        start=start,
        trained=sum(parameter.numel() for parameter in state.parameters.values()),
        checkpoint=checkpoint_path(request.run, settings.steps),
        steps=tuple(steps),
        plot=request.run / PLOT_FILE,
        settings=settings,
    )


def _goes_on(request: Request) -> bool:
    """Whether there is a run to go on with; --resume on an absent or empty folder begins one."""
    return request.resume and (request.run / RUN_FILE).exists()


def _identities(request: Request, prepared: Prepared) -> dict[str, Any]:
    return {
        "model": identity(request.model),
        "teacher": None if request.teacher is None else identity(request.teacher),
        "versions": {name: version(name) for name in LIBRARIES},
    }


def _start(
    engine: "Fabric", request: Request, settings: Settings, description: Mapping[str, Any], *, goes_on: bool
) -> tuple[int, Path | None]:
    """The steps that were done before, and the checkpoint to go on from."""
    if not goes_on:
        if engine.global_rank == 0:
            check_vacant(request.run)
        return 0, None
    check_own_files(request.run)
    check_same(request.run, description)
    if engine.global_rank == 0:
        checkpoints.clear_partial(request.run)
    start, folder = newest(request.run, settings)
    if folder is not None:
        check_files(folder, read_checkpoint_manifest(folder), part=engine.global_rank, parts=engine.world_size)
    return start, folder


def _build(engine: "Fabric", request: Request, prepared: Prepared, settings: Settings) -> tuple[nn.Module, State]:
    """The sharded module, and what of it is trained."""
    checkpoint = prepared.checkpoint
    network = model.load_model(request.model, checkpoint.config)
    shapes = {name: tensor.entry.shape for name, tensor in checkpoint.tensors.items()}
    names = model.published_names(network, shapes, request.model)
    if engine.global_rank == 0:
        model.compare_values(network, names, checkpoint)
    model.freeze(network, names, model.parts_of(checkpoint), images=prepared.images)
    if request.recompute:
        model.recompute_activations(network)
    denoiser = ModelWithLoss(
        network,
        tasks=len(task_names(settings)),
        softcap=prepared.limits.softcap,
        chunk=request.chunk,
        teacher=_teacher(request, prepared),
    )
    module = engine.setup_module(denoiser)
    parameters = {
        names[name]: parameter for name, parameter in denoiser.model.named_parameters() if parameter.requires_grad
    }
    for pattern in settings.trainable:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise UsageError(f"--trainable {pattern} names none of the {len(parameters)} tensors that are trained")
    # Saved under published names, in their order, whatever the class calls them and in whichever order.
    parameters = dict(sorted(parameters.items()))
    return module, State(parameters, make_optimizer(parameters, settings))


def _teacher(request: Request, prepared: Prepared) -> Teacher | None:
    if request.teacher is None:
        return None
    dtype = torch.bfloat16 if request.settings.precision == "bfloat16" else torch.float32
    return load_teacher(request.teacher, vocabulary=prepared.tokens.vocabulary, dtype=dtype)
