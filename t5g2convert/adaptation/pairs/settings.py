"""The settings of fine-tuning on pairs that decide the result of a run.

See `train.run_settings` for those of every objective.
"""

from collections.abc import Collection
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from t5g2convert.adaptation.train.run_settings import CHANGEABLE, OPTIMIZER, OURS, Kind, Positive, RunSettings
from t5g2convert.command_options import CommandOptions, Option

PAIRS: Final = "pairs"
"""The name of the objective in run.json."""

TOKENS_OF_PASS: Final = 16_384
"""Default for the most encoder tokens and labels per process and forward pass; a longer pair has its own pass."""

PARTS: Final = ("encoder", "decoder", "projector")
"""Parts of the model that may have their own learning rate; the embedding has that of the run."""


class PairObjective(CommandOptions):
    """The settings of fine-tuning on pairs; `objective` and `teacher` define the objective.

    Attributes:
        objective: The name of the objective.
        teacher: Identity of the model that is distilled; None for none. Filled in by `finetune`.
        batch_pairs: Pairs per step.
        eval_pairs: Pairs of the data that are held out: never trained, and evaluated.
        lr_encoder: Peak learning rate of the encoder's layers; None for that of the run.
        lr_decoder: Peak learning rate of the decoder's layers.
        lr_projector: Peak learning rate of the projector, which only pairs with images train.
    """

    objective: Literal["pairs"] = PAIRS
    teacher: str | None = None
    batch_pairs: Annotated[int, Field(ge=1), Option("Pairs per step, over all devices.", group=OPTIMIZER)] = 32
    eval_pairs: Annotated[
        int,
        Field(ge=0),
        Option(
            "Hold out N pairs of DATA, chosen by the seed: they are evaluated and never trained. For data of its own, "
            "see --eval.",
            metavar="N",
            group=OPTIMIZER,
        ),
    ] = 0
    lr_encoder: Annotated[
        Positive | None,
        Option("Peak learning rate of the encoder's layers.", default="--lr", metavar="FLOAT", group=OPTIMIZER),
    ] = None
    lr_decoder: Annotated[
        Positive | None,
        Option("Peak learning rate of the decoder's layers.", default="--lr", metavar="FLOAT", group=OPTIMIZER),
    ] = None
    lr_projector: Annotated[
        Positive | None,
        Option("Peak learning rate of the projector of images.", default="--lr", metavar="FLOAT", group=OPTIMIZER),
    ] = None


class PairSettings(RunSettings, PairObjective):
    """The settings of a run of fine-tuning that decide the result."""

    changeable: ClassVar[frozenset[str]] = CHANGEABLE | {"batch_pairs", *(f"lr_{part}" for part in PARTS)}
    objective_fields: ClassVar[frozenset[str]] = frozenset({"objective", "teacher"})

    lr_floor: Annotated[
        float, Field(ge=0, le=1), Option(f"Final learning rate, as a fraction of --lr ({OURS}).", group=OPTIMIZER)
    ] = 0.0
    lr: Annotated[Positive, Option("Peak learning rate.", group=OPTIMIZER)]
    warmup: Annotated[int, Field(ge=0), Option("Steps of linear warmup.", group=OPTIMIZER)] = 100

    @classmethod
    def recorded(cls) -> Collection[str]:
        """Return the fields of these settings."""
        return PairSettings.model_fields

    @property
    def tokens_of_pass(self) -> int:
        """Default for the most encoder tokens and labels per process and forward pass."""
        return TOKENS_OF_PASS

    def kind_of(self, step: int) -> Kind:
        """Return `pairs`: with and without images, they may be in one step."""
        return "pairs"

    def samples_of(self, step: int) -> int:
        """Return the number of pairs."""
        return self.batch_pairs

    def rate_of(self, part: str) -> float:
        """Return the peak learning rate of a part of the model."""
        own: float | None = getattr(self, f"lr_{part}") if part in PARTS else None
        return self.lr if own is None else own
