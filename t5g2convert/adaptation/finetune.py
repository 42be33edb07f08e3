"""`t5g2 finetune`: fine-tuning on pairs of an input and a target."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from t5g2convert.adaptation.finetune_options import FinetuneOptions
from t5g2convert.adaptation.pairs.dataset import PairDataset
from t5g2convert.adaptation.pairs.forecast import PairForecast, forecast_pairs
from t5g2convert.adaptation.pairs.generation import SCORERS, generate_and_score
from t5g2convert.adaptation.pairs.preflight import prepare_pairs
from t5g2convert.adaptation.run_request import Outcome, RunRequest, Watch
from t5g2convert.adaptation.train.distributed import planned_processes, require_extra
from t5g2convert.adaptation.train.evaluation import Policy
from t5g2convert.adaptation.train.evaluation_log import Evaluation
from t5g2convert.adaptation.train.metrics import Metrics
from t5g2convert.adaptation.train.preflight import Prepared
from t5g2convert.adaptation.training import check_request, check_resume, run_training
from t5g2convert.errors import UsageError


@dataclass(frozen=True, slots=True)
class FinetuneRequest(RunRequest[FinetuneOptions]):
    """A requested run of fine-tuning."""


def finetune(
    request: FinetuneRequest,
    *,
    begun: Callable[[Sequence[str], int], None],
    report: Callable[[Metrics], None],
    evaluated: Callable[[Evaluation], None] = lambda _: None,
) -> Outcome:
    """Fine-tune a model on packed pairs, or resume this.

    ```python
    options = FinetuneOptions(lr=1e-4, epochs=3, eval_pairs=500)
    request = FinetuneRequest(Path("t5gemma-2"), Path("packed"), Path("run"), options)
    finetune(request, begun=lambda notes, steps: print(*notes), report=lambda metrics: print(metrics.line))
    ```

    Args:
        request: The run.
        begun: Called once with notes and the steps of the whole run, on rank 0, before the first step.
        report: Called with the metrics of every step, on rank 0.
        evaluated: Called with the held-out losses, on rank 0.

    Raises:
        T5g2Error: As in `prepare_pairs` and `run_training`.
    """
    options = request.options
    policy = Policy(keep_best=options.keep_best, patience=options.patience, by=options.best)
    generate = (
        partial(generate_and_score, loop=options, pairs=options.generate_samples, model=request.model)
        if options.generate_eval
        else None
    )
    return run_training(request, lambda: prepare(request), Watch(begun, report, evaluated, policy, generate))


def foresee(request: FinetuneRequest) -> PairForecast:
    """Forecast a run, after all checks that need no process group.

    Raises:
        T5g2Error: As in `prepare`.
    """
    require_extra()
    options = request.options
    devices = planned_processes(options)
    return forecast_pairs(prepare(request), devices=devices, loop=options, shard_size=options.shard_size)


def prepare(request: FinetuneRequest) -> Prepared[PairDataset]:
    """Check a request before any process starts.

    Raises:
        T5g2Error: As in `prepare_pairs` and `check_request`.
    """
    options = request.options
    check_resume(options)
    require_extra(*(["peft"] if options.lora is not None else []), *(SCORERS if options.generate_eval else []))
    for name, wanted in (("patience", options.patience is not None), ("generate-eval", options.generate_eval)):
        if wanted and options.eval is None and not options.eval_pairs:
            raise UsageError(f"--{name} needs held-out pairs", hint="pass --eval DATA or --eval-pairs N")
    if options.generate_eval and options.attention == "blocks":
        raise UsageError("--generate-eval needs --attention dense")
    if options.best != "loss" and not options.generate_eval:
        raise UsageError(f"--best {options.best} needs --generate-eval")
    prepared = prepare_pairs(
        request.model,
        request.data,
        options,
        epochs=options.epochs,
        held_out=options.eval,
        held_out_pairs=options.eval_samples,
        rope_scaling=options.rope_scaling,
    )
    check_request(request, prepared)
    return prepared
