"""`t5g2 adapt`."""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from t5g2convert.cli.adapt_options import (
    AcceleratorOption,
    BatchOption,
    Beta1Option,
    Beta2Option,
    ChunkOption,
    ClipOption,
    DecayOption,
    DecoderLengthOption,
    DevicesOption,
    DryRunOption,
    EncoderBosOption,
    EncoderEosOption,
    EncoderLengthOption,
    EpsOption,
    ExportOption,
    FloorOption,
    FreezeOption,
    ImageEveryOption,
    KeepOption,
    LogOption,
    LrOption,
    MicroOption,
    MixtureOption,
    NodesOption,
    PrecisionOption,
    RecomputeOption,
    ResumeOption,
    RopeCheckOption,
    SaveOption,
    SeedOption,
    StepsOption,
    TeacherOption,
    TrainableOption,
    WarmupOption,
    WorkersOption,
)
from t5g2convert.cli.console import DebugOption, JsonOption, console, emit_json, parameter_table, print_notes
from t5g2convert.errors import Interrupted
from t5g2convert.interrupts import interruption, raise_interruption

if TYPE_CHECKING:
    from t5g2convert.adaptation.adapt import Outcome, Request
    from t5g2convert.adaptation.train.metrics import Metrics


def adapt(
    model: Annotated[Path, typer.Argument(help="The converted folder to train.")],
    data: Annotated[Path, typer.Argument(help="The folder that `t5g2 pack` wrote with MODEL's tokenizer.")],
    out: Annotated[Path, typer.Argument(help="The run's folder: checkpoints, logs, and the model that comes of it.")],
    lr: LrOption,
    steps: StepsOption,
    mixture: MixtureOption = None,
    encoder_length: EncoderLengthOption = 16_384,
    decoder_length: DecoderLengthOption = 16_384,
    encoder_bos: EncoderBosOption = True,
    encoder_eos: EncoderEosOption = False,
    image_every: ImageEveryOption = None,
    kd: TeacherOption = None,
    rope_scaling: RopeCheckOption = None,
    batch_tokens: BatchOption = 256 * 16_384,
    warmup: WarmupOption = 100,
    lr_floor: FloorOption = 0.1,
    beta1: Beta1Option = 0.9,
    beta2: Beta2Option = 0.95,
    eps: EpsOption = 1e-8,
    weight_decay: DecayOption = 0.0,
    clip: ClipOption = 1.0,
    freeze_until: FreezeOption = 0,
    trainable: TrainableOption = None,
    seed: SeedOption = 0,
    resume: ResumeOption = False,
    save_every: SaveOption = 10_000,
    keep: KeepOption = 5,
    log_every: LogOption = 1,
    dry_run: DryRunOption = False,
    export: ExportOption = True,
    accelerator: AcceleratorOption = "auto",
    devices: DevicesOption = None,
    nodes: NodesOption = None,
    precision: PrecisionOption = "bfloat16",
    micro_batch: MicroOption = 1,
    gradient_checkpointing: RecomputeOption = True,
    loss_chunk: ChunkOption = 1024,
    workers: WorkersOption = 0,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Train a converted model further with UL2, on one device or many.

    AdamW on float32 weights; the learning rate rises in a line and falls along a cosine; the loss is summed over all
    labels of a step, and divided by their number. SigLIP is never trained.
    """
    from t5g2convert.adaptation.adapt import Request
    from t5g2convert.adaptation.train.distributed import Hardware
    from t5g2convert.adaptation.train.loop import LoopConfig
    from t5g2convert.adaptation.train.settings import make_settings
    from t5g2convert.adaptation.ul2.mixture import read_mixture

    settings = make_settings(
        mixture=read_mixture(mixture),
        encoder_length=encoder_length,
        decoder_length=decoder_length,
        encoder_bos=encoder_bos,
        encoder_eos=encoder_eos,
        image_every=image_every,
        seed=seed,
        steps=steps,
        batch_tokens=batch_tokens,
        lr=lr,
        lr_floor=lr_floor,
        warmup=warmup,
        betas=(beta1, beta2),
        eps=eps,
        weight_decay=weight_decay,
        clip=clip,
        precision=precision,
        freeze_until=freeze_until,
        trainable=tuple(trainable or ()),
    )
    request = Request(
        model=model,
        data=data,
        run=out,
        settings=settings,
        teacher=kd,
        rope_scaling=rope_scaling,
        resume=resume,
        hardware=Hardware(accelerator, devices, nodes),
        loop=LoopConfig(micro=micro_batch, workers=workers, save_every=save_every, keep=keep),
        chunk=loss_chunk,
        recompute=gradient_checkpointing,
        export=export,
    )
    if dry_run:
        _foresee(request, as_json=as_json)
    else:
        _run(request, every=log_every, as_json=as_json)


def _foresee(request: "Request", *, as_json: bool) -> None:
    """Say what would be done."""
    from t5g2convert.adaptation.adapt import foresee
    from t5g2convert.cli.forecast import print_forecast

    found = foresee(request)
    if as_json:
        emit_json(found.to_json())
    else:
        print_forecast(found)


def _run(request: "Request", *, every: int, as_json: bool) -> None:
    """Do it, and tell of it on the first process alone."""
    from t5g2convert.adaptation.adapt import adapt as run
    from t5g2convert.adaptation.train.distributed import ReportedElsewhere, early_rank

    steps = request.settings.steps
    try:
        with _progress(steps) as advance:

            def report(step: "Metrics") -> None:
                if not as_json and (step.step % every == 0 or step.step == steps):
                    typer.echo(step.line)
                advance(step.step)
                # A signal whose error was lost, in a destructor for example, stops the run here.
                raise_interruption()

            outcome = run(request, begun=print_notes, report=report)
    except ReportedElsewhere as error:
        raise typer.Exit(error.exit_code) from None
    except Exception as error:
        # Torch and the libraries around it make other errors of what a signal's handler raises.
        stopped = error if isinstance(error, Interrupted) else interruption()
        if stopped is None:
            raise
        if early_rank():
            raise typer.Exit(stopped.exit_code) from None
        stopped.hint = "the same command with --resume goes on from the last checkpoint, if there is one"
        raise stopped from None
    if not outcome.first:
        return
    if as_json:
        emit_json(outcome.to_json())
    else:
        _print(outcome)


def _print(outcome: "Outcome") -> None:
    out = console()
    out.print(f"{outcome.steps[-1].step:,} steps of {outcome.trained:,} trained parameters")
    out.print(f"checkpoint  {outcome.checkpoint}", soft_wrap=True)
    out.print(f"losses      {outcome.plot}", soft_wrap=True)
    if outcome.exported is not None:
        how = "exported before, and left as it is" if outcome.exported.before else "which transformers loads whole"
        out.print(f"model       {outcome.exported.output}, {how}", soft_wrap=True)
        out.print(parameter_table(outcome.exported.inspection.parameters))


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[int], None]]:
    """A bar on stderr, if that is a terminal and this is the first process."""
    from t5g2convert.adaptation.train.distributed import early_rank

    if not sys.stderr.isatty() or early_rank():
        yield lambda done: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("adapt"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    # Lines go above the bar where both are on the terminal, and to stdout as they are where that is elsewhere.
    redirect = sys.stdout.isatty()
    with Progress(*columns, console=console(stderr=True), transient=True, redirect_stdout=redirect) as bar:
        task = bar.add_task("adapt", total=steps)
        yield lambda done: bar.update(task, completed=done)
