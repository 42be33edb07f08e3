"""The settings of fine-tuning on pairs that decide the result of a run.

See `train.run_settings` for those of every objective.
"""

from collections.abc import Collection
from typing import Annotated, Any, ClassVar, Final, Literal, Self

from pydantic import Field, model_validator

from t5g2convert.adaptation.train.lora_shape import TARGETS, LoraShape, check_targets, parse_targets
from t5g2convert.adaptation.train.run_settings import (
    CHANGEABLE,
    OBJECTIVE,
    OPTIMIZER,
    OURS,
    Kind,
    Positive,
    RunSettings,
)
from t5g2convert.command_options import CommandOptions, Option
from t5g2convert.errors import UsageError

PAIRS: Final = "pairs"
"""The name of the objective in run.json."""

TOKENS_OF_PASS: Final = 16_384
"""Default for the most encoder tokens and labels per process and forward pass; a longer pair has its own pass."""

LORA: Final = ("lora", "lora_alpha", "lora_targets")
"""The settings of an adapter."""

PARTS: Final = ("encoder", "decoder", "projector")
"""Parts of the model that may have their own learning rate; the embedding has that of the run."""


class PairObjective(CommandOptions):
    """The settings of fine-tuning on pairs; `objective` and `teacher` define the objective.

    Attributes:
        objective: The name of the objective.
        teacher: Identity of the model that is distilled; None for none. Filled in by `finetune`.
        batch_pairs: Pairs per step.
        eval_pairs: Pairs of the data that are held out: never trained, and evaluated.
        lora: Rank of the LoRA adapter that is trained; None to train the model.
        lora_alpha: Numerator of its scale; None for twice the rank.
        lora_targets: The linear layers that it changes, by name.
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
    lora: Annotated[
        int | None,
        Field(ge=1, le=4096),
        Option(
            "Train a LoRA adapter of this rank instead of the model, and write it to OUT/adapter as peft does.",
            metavar="RANK",
            default="the whole model",
            group=OBJECTIVE,
        ),
    ] = None
    lora_alpha: Annotated[
        Positive | None,
        Option(
            "With --lora: the product is scaled by ALPHA / RANK.", metavar="ALPHA", default="2 RANK", group=OBJECTIVE
        ),
    ] = None
    lora_targets: Annotated[
        tuple[str, ...],
        Field(strict=False),
        Option(
            "With --lora: the linear layers of both text stacks that it changes.",
            metavar="NAME,NAME",
            default=",".join(TARGETS),
            group=OBJECTIVE,
            parse=parse_targets,
        ),
    ] = TARGETS
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
    objective_fields: ClassVar[frozenset[str]] = frozenset({"objective", "teacher", *LORA})

    lr_floor: Annotated[
        float, Field(ge=0, le=1), Option(f"Final learning rate, as a fraction of --lr ({OURS}).", group=OPTIMIZER)
    ] = 0.0
    lr: Annotated[Positive, Option("Peak learning rate.", group=OPTIMIZER)]
    warmup: Annotated[int, Field(ge=0), Option("Steps of linear warmup.", group=OPTIMIZER)] = 100

    @model_validator(mode="after")
    def _fits_an_adapter(self) -> Self:
        if self.lora is None:
            if self.lora_alpha is not None or self.lora_targets != TARGETS:
                raise UsageError("--lora-alpha and --lora-targets need --lora")
            return self
        check_targets(self.lora_targets)
        if self.lr_projector is not None:
            raise UsageError("--lr-projector cannot be used with --lora, which leaves the projector frozen")
        return self

    @property
    def adapter(self) -> LoraShape | None:
        """The adapter that is trained instead of the model."""
        if self.lora is None:
            return None
        return LoraShape(self.lora, 2.0 * self.lora if self.lora_alpha is None else self.lora_alpha, self.lora_targets)

    def to_json(self) -> dict[str, Any]:
        """Return the settings as in run.json; those of an adapter only if one is trained."""
        document = RunSettings.to_json(self)
        if (adapter := self.adapter) is not None:
            return {**document, "lora_alpha": adapter.alpha}
        return {name: value for name, value in document.items() if name not in LORA}

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
