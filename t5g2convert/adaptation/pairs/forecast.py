"""The plan of a run of fine-tuning and its estimated cost, from the model's headers and the tables of the data."""

from dataclasses import asdict, dataclass
from typing import Any

from t5g2convert.adaptation.options import LoopConfig
from t5g2convert.adaptation.pairs.dataset import PairDataset
from t5g2convert.adaptation.train.forecast import RunCost, cost_of
from t5g2convert.adaptation.train.preflight import Prepared


@dataclass(frozen=True, slots=True)
class PairForecast:
    """The forecast of a run of fine-tuning.

    Attributes:
        steps: Number of steps.
        batch_pairs: Pairs per step.
        pairs: Pairs that are trained.
        held_out: Pairs that are evaluated.
        epochs: How many times the run reads the pairs, on average.
        cost: The cost of its steps.
        notes: Notes for the user.
    """

    steps: int
    batch_pairs: int
    pairs: int
    held_out: int
    epochs: float
    cost: RunCost
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Return what `t5g2 finetune --dry-run --json` prints."""
        document = asdict(self)
        cost = document.pop("cost")
        return {**document, **cost, "memory": {**asdict(self.cost.memory), "total": self.cost.memory.total}}


def forecast_pairs(
    prepared: Prepared[PairDataset], *, devices: int, loop: LoopConfig, shard_size: int | None = None
) -> PairForecast:
    """Forecast a run.

    Args:
        prepared: The run.
        devices: Number of devices, over all machines.
        loop: Settings of the loop.
        shard_size: Devices that share one copy of the model; None for all.
    """
    settings, pairs = prepared.samples.settings, prepared.samples.pairs
    return PairForecast(
        steps=settings.steps,
        batch_pairs=settings.batch_pairs,
        pairs=pairs,
        held_out=sum(part.settings.batch_pairs for part in prepared.held_out),
        epochs=settings.steps * settings.batch_pairs / pairs,
        cost=cost_of(prepared, devices=devices, loop=loop, shard_size=shard_size),
        notes=prepared.notes,
    )
