"""The micro-batches of a step: its samples, dealt to passes and processes in the order of their cost.

At the end of a pass all processes wait for the slowest, and a micro-batch is padded to its longest sample. Therefore
the samples of a step are sorted by cost, the most costly first, and every pass takes the next of them: for each process
as many as fit, padding included. The samples of a step, and the sum of their gradients, stay the same.

    >>> sizes = [SampleSize(encoder=8, labels=8, cost=4), SampleSize(8, 2, 3), SampleSize(2, 2, 1), SampleSize(2, 1, 1)]
    >>> deal(sizes, world=1, tokens=16)
    [(0,), (1,), (2, 3)]
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from t5g2convert.adaptation.train.run_settings import RunSettings
from t5g2convert.adaptation.train.schedule import Leg, first_sample


@dataclass(frozen=True, slots=True)
class SampleSize:
    """Encoder tokens, labels and images of a sample, and the operations of its training."""

    encoder: int
    labels: int
    cost: int
    images: int = 0


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """The samples of one pass of a process.

    Attributes:
        step: The step.
        samples: Numbers of the samples, counted among samples of the step's kind.
        counted: Whether each counts; one that does not only fills the pass.
        is_first: Whether the pass is the first of its step.
        is_last: Whether it is the last.
        has_images: Whether samples of the pass have images, on any process.
    """

    step: int
    samples: tuple[int, ...]
    counted: tuple[bool, ...]
    is_first: bool = True
    is_last: bool = True
    has_images: bool = False


def micro_batches(
    settings: RunSettings,
    size: Callable[[int, int], SampleSize],
    *,
    rank: int,
    world: int,
    tokens: int | None,
    samples: int | None = None,
    start: int,
    earlier: Sequence[Leg] = (),
) -> Iterator[MicroBatch]:
    """Yield all micro-batches of a process.

    Args:
        settings: The run's settings.
        size: Returns the size of a sample, by step and number.
        rank: Number of the process.
        world: Number of processes.
        tokens: Most encoder tokens and labels per micro-batch, including padding; None for no limit. A micro-batch has
            at least one sample.
        samples: Most samples per micro-batch; None for no limit.
        start: First step.
        earlier: The legs of the run before these settings.
    """
    for step in range(start, settings.steps):
        first = first_sample(settings, step, earlier)
        sizes = [size(step, first + number) for number in range(settings.samples_of(step))]
        passes = deal(sizes, world=world, tokens=tokens, samples=samples)
        # Images first: where gradients of several passes are added up, each part's sum has to begin in the first pass.
        passes.sort(key=lambda chosen: not _has_images(chosen, sizes))
        for number, chosen in enumerate(passes):
            own = chosen[rank::world]
            # All processes make passes of one shape, or nearly: the cheapest sample fills the last.
            filling = -(-len(chosen) // world) - len(own)
            yield MicroBatch(
                step,
                tuple(first + sample for sample in (*own, *[chosen[-1]] * filling)),
                (True,) * len(own) + (False,) * filling,
                is_first=number == 0,
                is_last=number == len(passes) - 1,
                has_images=_has_images(chosen, sizes),
            )


def _has_images(chosen: Sequence[int], sizes: Sequence[SampleSize]) -> bool:
    return any(sizes[number].images for number in chosen)


def deal(
    sizes: Sequence[SampleSize], *, world: int, tokens: int | None, samples: int | None = None
) -> list[tuple[int, ...]]:
    """Return the samples of each pass over all processes, the most costly first.

    Process r makes the samples at r, r + world, and so on.

    Args:
        sizes: The samples of a step.
        world: Number of processes.
        tokens: Most encoder tokens and labels per process, including padding; None for no limit.
        samples: Most samples per process; None for no limit.
    """
    order = sorted(range(len(sizes)), key=lambda number: (-sizes[number].cost, number))
    passes, start = [], 0
    while start < len(order):
        stop, count, encoder, labels = start, 0, 0, 0
        while stop < len(order) and (samples is None or count < samples):
            following = [sizes[number] for number in order[stop : stop + world]]
            encoder = max(encoder, *(size.encoder for size in following))
            labels = max(labels, *(size.labels for size in following))
            if count and tokens is not None and (count + 1) * (encoder + labels) > tokens:
                break
            stop, count = stop + world, count + 1
        passes.append(tuple(order[start:stop]))
        start = stop
    return passes
