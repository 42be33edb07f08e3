"""Micro-batches in order, made in this process or by workers ahead of time; an error of one is a value in its place."""

import signal
from collections.abc import Callable, Iterator

from torch.utils.data import DataLoader, Dataset

from t5g2convert.adaptation.ul2.dataset import Batch, Place
from t5g2convert.errors import Interrupted, T5g2Error


def loader(
    samples: Dataset[Batch], at: Callable[[], Iterator[Place]], *, workers: int
) -> Iterator[tuple[int, Batch | T5g2Error]]:
    """Micro-batches in order, each with its step; where one cannot be made, the error in its place.

    Args:
        samples: What makes them.
        at: Gives all places, from the first on.
        workers: Processes that make them ahead of time; 0 for this one, when they are needed.
    """
    if not workers:
        for place in at():
            yield place.step, _Attempts(samples)[place]
        return
    made = DataLoader(
        _Attempts(samples), batch_size=None, sampler=_Order(at), num_workers=workers, worker_init_fn=_ignore_interrupt
    )
    for place, batch in zip(at(), made, strict=True):
        yield place.step, batch


class _Attempts(Dataset["Batch | T5g2Error"]):
    """Micro-batches, or the errors of them as values: torch would make a traceback of what a worker raises."""

    def __init__(self, samples: Dataset[Batch]) -> None:
        self._samples = samples

    def __getitem__(self, place: Place) -> Batch | T5g2Error:
        try:
            return self._samples[place]
        except Interrupted:
            raise
        except T5g2Error as error:
            return error


def _ignore_interrupt(_: int) -> None:
    """The terminal sends Ctrl-C to all processes; the first ends the workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


class _Order:
    """What a data loader takes for a sampler."""

    def __init__(self, at: Callable[[], Iterator[Place]]) -> None:
        self._at = at

    def __iter__(self) -> Iterator[Place]:
        return self._at()
