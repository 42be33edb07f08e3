"""`t5g2 adapt`: continued pretraining with UL2."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from t5g2convert.adaptation.options import AdaptOptions
from t5g2convert.adaptation.run_request import Outcome, RunRequest, Watch
from t5g2convert.adaptation.train.distributed import planned_processes, require_extra
from t5g2convert.adaptation.train.evaluation_log import Evaluation
from t5g2convert.adaptation.train.forecast import Forecast, forecast
from t5g2convert.adaptation.train.metrics import Metrics
from t5g2convert.adaptation.train.preflight import Prepared, prepare
from t5g2convert.adaptation.training import check_request, check_resume, run_training
from t5g2convert.adaptation.ul2.dataset import UL2Dataset
from t5g2convert.adaptation.ul2.held_out import open_held_out
from t5g2convert.errors import DataError, UsageError


@dataclass(frozen=True, slots=True)
class Request(RunRequest[AdaptOptions]):
    """A requested run with UL2."""


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
        T5g2Error: As in `prepare` and `run_training`.
    """
    return run_training(request, lambda: _prepare(request), Watch(lambda notes, _: begun(notes), report, evaluated))


def foresee(request: Request) -> Forecast:
    """Forecast a run, after all checks that need no process group.

    Raises:
        T5g2Error: As in `prepare`.
    """
    require_extra()
    options = request.options
    devices = planned_processes(options)
    return forecast(_prepare(request), devices=devices, loop=options, shard_size=options.shard_size)


def _prepare(request: Request) -> Prepared[UL2Dataset]:
    options = request.options
    check_resume(options)
    prepared = prepare(request.model, request.data, options, rope_scaling=options.rope_scaling)
    if options.eval is not None:
        held_out = open_held_out(request.model, options.eval, options, options.eval_samples)
        if not held_out:
            raise DataError("has no text to evaluate", where=options.eval)
        prepared = replace(prepared, held_out=held_out)
    if options.kd is not None and options.image_every == 1:
        raise UsageError("--kd applies only to text, but --image-every 1 leaves no text batches")
    check_request(request, prepared)
    return prepared
