"""A training run, whatever its objective: from the checks to the exported model."""

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from t5g2convert.adaptation.adapter_export import check_adapter_place, export_adapter
from t5g2convert.adaptation.export import check_export_place, export_checkpoint
from t5g2convert.adaptation.options import RunOptions
from t5g2convert.adaptation.run_request import Outcome, RunRequest, Watch
from t5g2convert.adaptation.train import checkpoints
from t5g2convert.adaptation.train.build import build
from t5g2convert.adaptation.train.checkpoint_manifest import (
    checkpoint_path,
    complete_checkpoints,
)
from t5g2convert.adaptation.train.checkpoints import State
from t5g2convert.adaptation.train.distributed import (
    ReportedElsewhere,
    build_engine,
    check_attention,
    early_launcher,
    early_rank,
    end_children,
    require_extra,
    run_on_all_ranks,
)
from t5g2convert.adaptation.train.evaluation import Evaluator
from t5g2convert.adaptation.train.evaluation_log import Scores
from t5g2convert.adaptation.train.history import (
    describe,
    documents_of,
    identity,
    write_description,
)
from t5g2convert.adaptation.train.loop import train
from t5g2convert.adaptation.train.machine_failures import machine_error
from t5g2convert.adaptation.train.metrics import plot_losses, read_metrics
from t5g2convert.adaptation.train.preflight import Prepared
from t5g2convert.adaptation.train.resume import Start, find_start, go_back
from t5g2convert.adaptation.train.run_folder import (
    EVALUATION_FILE,
    METRICS_FILE,
    PLOT_FILE,
    check_vacant,
    locked,
)
from t5g2convert.adaptation.train.run_settings import RunSettings
from t5g2convert.adaptation.train.teacher import check_teacher
from t5g2convert.checkpoint.families.t5gemma2 import MODEL_TYPE
from t5g2convert.conversion.output.path_rules import check_apart
from t5g2convert.conversion.write.resources import check_space
from t5g2convert.errors import T5g2Error, UsageError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

LIBRARIES = ("torch", "transformers", "lightning_fabric", "numpy")
"""Libraries whose versions run.json records."""


def run_training(request: RunRequest[RunOptions], prepare: Callable[[], Prepared[Any]], watch: Watch) -> Outcome:
    """Train a model or an adapter, or resume its training, and export it.

    Args:
        request: The run.
        prepare: Checks the request before any process starts.
        watch: What is done while it trains.

    Raises:
        DataError: The data was modified after packing; checked when a run starts, not when it resumes.
        MachineError: Memory ran out, or another process died.
        T5g2Error: As in `prepare`, `train` and `checkpoints`; on other ranks than 0 `ReportedElsewhere`, with the same
            exit code.
    """
    try:
        require_extra()
        check_attention(request.options)
        prepared = prepare()
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
            outcome = _run(engine, request, prepared, watch)
        except BaseException as error:
            end_children(engine)
            if (failure := machine_error(error)) is not None:
                raise failure from error
            raise
        # The export needs one process only.
        torch.distributed.destroy_process_group()
        if not outcome.first or not request.options.export:
            return outcome
        if outcome.settings.adapter is not None:
            return replace(outcome, adapter=export_adapter(request.run, outcome.checkpoint, request.model))
        return replace(outcome, exported=export_checkpoint(request.run, outcome.checkpoint, request.model))


def check_request(request: RunRequest[RunOptions], prepared: Prepared[Any]) -> None:
    """Refuse a run that cannot be exported or distilled, or whose folder is taken; before other processes start.

    Raises:
        CheckpointError: The teacher does not fit.
        OutputError: The run's folder is taken, or contains an input or lies in one.
        UsageError: The options do not fit the model or each other.
    """
    options = request.options
    if options.export and prepared.checkpoint.config.get("model_type") != MODEL_TYPE:
        raise UsageError("only T5Gemma 2 can be exported", hint="--no-export leaves the checkpoints alone")
    check_apart(request.run, *request.inputs)
    if options.kd is not None:
        longest = prepared.samples.longest_raw + 1
        check_teacher(options.kd, vocabulary=prepared.tokens.vocabulary, longest=longest)
    if not request.resumes and early_launcher() is None and early_rank() == 0:
        # Before other processes start; those that torchrun or SLURM started check this together.
        check_vacant(request.run)
    if (
        options.export
        and request.resumes
        and options.from_step is None
        and prepared.samples.settings.steps not in complete_checkpoints(request.run)
    ):
        # Now, not after days of training; a completed run may have been exported, which is checked later.
        if prepared.samples.settings.adapter is None:
            check_export_place(request.run)
        else:
            check_adapter_place(request.run)


def check_resume(options: RunOptions) -> None:
    """Refuse to go back in a run that is not resumed.

    Raises:
        UsageError: --from was given without --resume.
    """
    if options.from_step is not None and not options.resume:
        raise UsageError("--from needs --resume")


def _run(engine: "Fabric", request: RunRequest[RunOptions], prepared: Prepared[Any], watch: Watch) -> Outcome:
    on_rank_0 = engine.global_rank == 0
    known: dict[str, Any] = engine.broadcast(
        run_on_all_ranks(engine, lambda: _identities(request) if on_rank_0 else {})
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
    module, state = _build(engine, request, prepared, settings, description, place, resumes=resumes)
    made = engine.broadcast(run_on_all_ranks(engine, lambda: [*complete_checkpoints(request.run)] if on_rank_0 else []))
    loop, path = request.options, request.run / EVALUATION_FILE
    evaluator = Evaluator(
        engine,
        module,
        prepared.held_out,
        loop,
        path,
        start=start,
        made=made,
        report=watch.evaluated,
        policy=watch.policy,
        generate=_generating(engine, prepared, watch),
    )
    if on_rank_0:
        resuming = [f"resuming after {start:,} steps"] if start else []
        changes = [f"from step {start + 1} on: {text}" for text in place.changes]
        watch.begun([*prepared.notes, *resuming, *changes, *evaluator.notes], settings.steps)
    if start < settings.steps and not evaluator.is_over:
        train(
            engine,
            module,
            state,
            prepared.samples,
            run=request.run,
            start=start,
            loop=loop,
            report=watch.report,
            evaluation=evaluator,
        )
    else:
        # It may have died after its last checkpoint.
        evaluator(start)
    engine.barrier()
    steps = read_metrics(request.run / METRICS_FILE) if on_rank_0 else []
    if on_rank_0:
        plot_losses(steps, request.run / PLOT_FILE, held_out=[(each.step, each.loss) for each in evaluator.evaluations])
    best, last = evaluator.best, engine.broadcast(max(complete_checkpoints(request.run), default=0))
    return Outcome(
        first=on_rank_0,
        start=start,
        trained=sum(parameter.numel() for parameter in state.parameters.values()),
        checkpoint=checkpoint_path(request.run, last if best is None else best),
        steps=tuple(steps),
        plot=request.run / PLOT_FILE,
        settings=settings,
        evaluations=tuple(evaluator.evaluations),
        best=best,
        stopped=last if evaluator.is_over and last < settings.steps else None,
    )


def _generating(engine: "Fabric", prepared: Prepared[Any], watch: Watch) -> Callable[[nn.Module], Scores] | None:
    generate = watch.generate
    return None if generate is None else lambda module: generate(engine, module, prepared.held_out)


def _build(
    engine: "Fabric",
    request: RunRequest[RunOptions],
    prepared: Prepared[Any],
    settings: RunSettings,
    description: dict[str, Any],
    place: Start,
    *,
    resumes: bool,
) -> tuple[nn.Module, State]:
    """Build the model with the values of its checkpoint; write run.json once nothing can refuse the run any more."""
    on_rank_0 = engine.global_rank == 0
    module, state = run_on_all_ranks(engine, lambda: build(engine, request.model, prepared, request.options, settings))
    if not resumes:
        space = checkpoints.bytes_of(state)
        run_on_all_ranks(engine, lambda: check_space(request.run, space) if on_rank_0 else None)
    if place.goes_back:
        # Before run.json says so: a run that dies in between can go back again.
        run_on_all_ranks(engine, lambda: go_back(request.run, place.step) if on_rank_0 else None)
    if not resumes or place.is_new_leg:
        # After all checks: a refused start leaves the folder free for the next.
        run_on_all_ranks(engine, lambda: write_description(request.run, description) if on_rank_0 else None)
    if (folder := place.folder) is not None:
        run_on_all_ranks(engine, lambda: checkpoints.load(folder, state))
    return module, state


def _identities(request: RunRequest[RunOptions]) -> dict[str, Any]:
    teacher = request.options.kd
    return {
        "model": identity(request.model),
        "teacher": None if teacher is None else identity(teacher),
        "versions": {name: version(name) for name in LIBRARIES},
    }
