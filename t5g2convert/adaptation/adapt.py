"""`t5g2 adapt`: a whole training run, from preflight to the exported model."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from t5g2convert.adaptation.data.corpora import folders_of
from t5g2convert.adaptation.export import Exported, check_export_place, export_checkpoint
from t5g2convert.adaptation.options import AdaptOptions
from t5g2convert.adaptation.train import checkpoints
from t5g2convert.adaptation.train.build import build
from t5g2convert.adaptation.train.checkpoint_manifest import (
    checkpoint_path,
    complete_checkpoints,
)
from t5g2convert.adaptation.train.distributed import (
    ReportedElsewhere,
    build_engine,
    check_attention,
    check_shard_size,
    early_launcher,
    early_rank,
    end_children,
    require_extra,
    run_on_all_ranks,
)
from t5g2convert.adaptation.train.evaluation import (
    Evaluation,
    Evaluator,
    open_held_out,
)
from t5g2convert.adaptation.train.forecast import Forecast, forecast
from t5g2convert.adaptation.train.history import (
    describe,
    documents_of,
    identity,
    write_description,
)
from t5g2convert.adaptation.train.loop import train
from t5g2convert.adaptation.train.machine_failures import machine_error
from t5g2convert.adaptation.train.metrics import Metrics, plot_losses, read_metrics
from t5g2convert.adaptation.train.preflight import Prepared, prepare
from t5g2convert.adaptation.train.resume import find_start, go_back
from t5g2convert.adaptation.train.run_folder import (
    EVALUATION_FILE,
    METRICS_FILE,
    PLOT_FILE,
    RUN_FILE,
    check_vacant,
    locked,
)
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.train.teacher import check_teacher
from t5g2convert.checkpoint.families.t5gemma2 import MODEL_TYPE
from t5g2convert.conversion.output.path_rules import check_apart
from t5g2convert.conversion.write.resources import check_space
from t5g2convert.errors import DataError, T5g2Error, UsageError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

LIBRARIES = ("torch", "transformers", "lightning_fabric", "numpy")
"""Libraries whose versions run.json records."""


@dataclass(frozen=True, slots=True)
class Request:
    """A requested run.

    Attributes:
        model: The folder of a converted model.
        data: The folder of packed data, or a file that lists several; see `data.corpora`.
        run: The run's folder; absent or empty, unless the run resumes.
        options: The options of `t5g2 adapt`.
    """

    model: Path
    data: Path
    run: Path
    options: AdaptOptions

    @property
    def inputs(self) -> tuple[Path, ...]:
        """All folders that are read; none may be in the run's folder."""
        teacher = () if self.options.kd is None else (self.options.kd,)
        held_out = () if self.options.eval is None else folders_of(self.options.eval)
        return (self.model, *folders_of(self.data), *teacher, *held_out)

    @property
    def resumes(self) -> bool:
        """Whether there is a run to resume; --resume on an absent or empty folder starts one."""
        return self.options.resume and (self.run / RUN_FILE).exists()


@dataclass(frozen=True, slots=True)
class Outcome:
    """A completed run.

    Attributes:
        first: Whether this process is rank 0, the only one that prints.
        start: Steps completed before.
        trained: Number of trained parameters.
        checkpoint: The last checkpoint.
        steps: The whole log, on rank 0.
        plot: The plot of the losses.
        settings: The run's settings, with the teacher's identity.
        evaluations: All held-out losses, on rank 0.
        exported: The exported model, on rank 0, if `export` is set.
    """

    first: bool
    start: int
    trained: int
    checkpoint: Path
    steps: tuple[Metrics, ...]
    plot: Path
    settings: Settings
    evaluations: tuple[Evaluation, ...] = ()
    exported: Exported | None = None

    def to_json(self) -> dict[str, Any]:
        """Return what `t5g2 adapt --json` prints."""
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
            **({"held_out": asdict(self.evaluations[-1])} if self.evaluations else {}),
        }


def adapt(
    request: Request,
    *,
    begun: Callable[[Sequence[str]], None],
    report: Callable[[Metrics], None],
    evaluated: Callable[[Evaluation], None] = lambda _: None,
) -> Outcome:
    """Train a model, or resume its training.

    ```python
    options = AdaptOptions(lr=1e-4, steps=10_000, devices=8)
    request = Request(Path("t5gemma-2"), Path("packed"), Path("run"), options)
    adapt(request, begun=print, report=lambda metrics: print(metrics.line))
    ```

    Args:
        request: The run.
        begun: Called once with notes, on rank 0, before the first step.
        report: Called with the metrics of every step, on rank 0.
        evaluated: Called with the held-out losses, on rank 0.

    Raises:
        DataError: The data was modified after packing; checked when a run starts, not when it resumes.
        MachineError: Memory ran out, or another process died.
        T5g2Error: As in `prepare`, `train` and `checkpoints`; on other ranks than 0 `ReportedElsewhere`, with the same
            exit code.
    """
    try:
        require_extra()
        check_attention(request.options)
        prepared = _prepare(request)
        engine = build_engine(request.options)
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
            outcome = _run(engine, request, prepared, begun, report, evaluated)
        except BaseException as error:
            end_children(engine)
            if (failure := machine_error(error)) is not None:
                raise failure from error
            raise
        # The export needs one process only.
        torch.distributed.destroy_process_group()
        if not outcome.first or not request.options.export:
            return outcome
        return replace(outcome, exported=export_checkpoint(request.run, outcome.checkpoint, request.model))


def foresee(request: Request) -> Forecast:
    """Forecast a run, after all checks that need no process group.

    Raises:
        T5g2Error: As in `prepare`.
    """
    require_extra()
    options = request.options
    devices = (options.devices or 1) * (options.nodes or 1)
    check_shard_size(options, devices)
    return forecast(_prepare(request), devices=devices, loop=options, shard_size=options.shard_size)


def _prepare(request: Request) -> Prepared:
    options = request.options
    if options.from_step is not None and not options.resume:
        raise UsageError("--from needs --resume")
    prepared = prepare(request.model, request.data, options, rope_scaling=options.rope_scaling)
    if options.export and prepared.checkpoint.config.get("model_type") != MODEL_TYPE:
        raise UsageError("only T5Gemma 2 can be exported", hint="--no-export leaves the checkpoints alone")
    check_apart(request.run, *request.inputs)
    if options.eval is not None:
        held_out = open_held_out(request.model, options.eval, options, options.eval_samples)
        if not held_out:
            raise DataError("has no text to evaluate", where=options.eval)
        prepared = replace(prepared, held_out=held_out)
    if options.kd is not None:
        if options.image_every == 1:
            raise UsageError("--kd applies only to text, but --image-every 1 leaves no text batches")
        longest = prepared.samples.longest + 1
        check_teacher(options.kd, vocabulary=prepared.tokens.vocabulary, longest=longest)
    if not request.resumes and early_launcher() is None and early_rank() == 0:
        # Before other processes start; those that torchrun or SLURM started check this together.
        check_vacant(request.run)
    if (
        options.export
        and request.resumes
        and options.from_step is None
        and options.steps not in complete_checkpoints(request.run)
    ):
        # Now, not after days of training; a completed run may have been exported, which is checked later.
        check_export_place(request.run)
    return prepared


def _run(
    engine: "Fabric",
    request: Request,
    prepared: Prepared,
    begun: Callable[[Sequence[str]], None],
    report: Callable[[Metrics], None],
    evaluated: Callable[[Evaluation], None],
) -> Outcome:
    on_rank_0 = engine.global_rank == 0
    known: dict[str, Any] = engine.broadcast(
        run_on_all_ranks(engine, lambda: _identities(request, prepared) if on_rank_0 else {})
    )
    settings = prepared.samples.settings.model_copy(update={"teacher": known["teacher"]})
    prepared.samples.settings = settings
    description = describe(
        settings,
        model=known["model"],
        model_folder=request.model,
        corpora=prepared.samples.corpora,
        versions=known["versions"],
    )
    # As rank 0 sees it, before it writes anything.
    resumes = engine.broadcast(request.resumes)
    if not resumes:
        corpora, rank, world = prepared.samples.corpora, engine.global_rank, engine.world_size
        run_on_all_ranks(engine, lambda: corpora.check_bytes(part=rank, parts=world))
    change, back_to = request.options.change, request.options.from_step
    find = partial(
        find_start, engine, request.run, settings, description, resumes=resumes, change=change, back_to=back_to
    )
    place = run_on_all_ranks(engine, find)
    start, prepared.samples.earlier = place.step, place.earlier
    description |= {"earlier": documents_of(place.earlier)} if place.earlier else {}
    description |= {} if place.returned is None else {"returned": place.returned}
    module, state = run_on_all_ranks(engine, lambda: build(engine, request.model, prepared, request.options, settings))
    if not resumes:
        space = checkpoints.bytes_of(state)
        run_on_all_ranks(engine, lambda: check_space(request.run, space) if on_rank_0 else None)
    if place.goes_back:
        # Before run.json says so: a run that dies in between can go back again.
        run_on_all_ranks(engine, lambda: go_back(request.run, start) if on_rank_0 else None)
    if not resumes or place.is_new_leg:
        # After all checks: a refused start leaves the folder free for the next.
        run_on_all_ranks(engine, lambda: write_description(request.run, description) if on_rank_0 else None)
    if (folder := place.folder) is not None:
        run_on_all_ranks(engine, lambda: checkpoints.load(folder, state))
    if on_rank_0:
        resuming = [f"resuming after {start:,} steps"] if start else []
        begun([*prepared.notes, *resuming, *(f"from step {start + 1} on: {text}" for text in place.changes)])
    loop, path = request.options, request.run / EVALUATION_FILE
    evaluator = Evaluator(engine, module, prepared.held_out, loop, path, start=start, report=evaluated)
    if start < settings.steps:
        train(
            engine,
            module,
            state,
            prepared.samples,
            run=request.run,
            start=start,
            loop=loop,
            report=report,
            evaluation=evaluator,
        )
    else:
        # It may have died after its last checkpoint.
        evaluator(start)
    engine.barrier()
    steps = read_metrics(request.run / METRICS_FILE) if on_rank_0 else []
    if on_rank_0:
        plot_losses(steps, request.run / PLOT_FILE, held_out=[(each.step, each.loss) for each in evaluator.evaluations])
    return Outcome(
        first=on_rank_0,
        start=start,
        trained=sum(parameter.numel() for parameter in state.parameters.values()),
        checkpoint=checkpoint_path(request.run, settings.steps),
        steps=tuple(steps),
        plot=request.run / PLOT_FILE,
        settings=settings,
        evaluations=tuple(evaluator.evaluations),
    )


def _identities(request: Request, prepared: Prepared) -> dict[str, Any]:
    teacher = request.options.kd
    return {
        "model": identity(request.model),
        "teacher": None if teacher is None else identity(teacher),
        "versions": {name: version(name) for name in LIBRARIES},
    }
