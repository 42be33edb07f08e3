"""The settings of every objective that decide the result of a run; a resumed run must have the same.

The command line, the Python API and run.json all read these models. Options that only decide the speed of a run are in
`adaptation.options`.
"""

import json
import re
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Annotated, Any, ClassVar, Final, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from t5g2convert.adaptation.train.lora_shape import LoraShape
from t5g2convert.checkpoint.manifest_section import digest_of
from t5g2convert.command_options import CommandOptions, Option
from t5g2convert.errors import UsageError

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

OURS: Final = "not established; our default"
OBJECTIVE, OPTIMIZER, RUN, MACHINES = "Objective", "Optimizer", "Run", "Machines"
"""Sections of the help."""

CHANGEABLE: Final = frozenset(
    {"steps", "skip_steps", "lr", "lr_floor", "warmup", "betas", "eps", "weight_decay", "clip", "precision"}
)
"""Settings of every objective that may change when a run is resumed, by their names in run.json."""

Kind = Literal["text", "images", "pairs"]
"""What the samples of a step are made from."""


_RANGE: Final = re.compile(r"([1-9][0-9]{0,17})-([1-9][0-9]{0,17})")


def step_range(text: str) -> tuple[int, int]:
    """Return the first and the last step of `A-B`, counted from 1.

    Raises:
        UsageError: The text is something else.
    """
    found = _RANGE.fullmatch(text)
    if found is None or int(found[1]) > int(found[2]):
        raise UsageError(f"--skip-steps {text}: expected A-B, the first and the last step, counted from 1")
    return int(found[1]), int(found[2])


def _in_order(texts: tuple[str, ...]) -> tuple[str, ...]:
    ordered = sorted(texts, key=step_range)
    for one, other in pairwise(ordered):
        if step_range(one)[1] >= step_range(other)[0]:
            raise UsageError(f"--skip-steps {one} and {other} overlap")
    return tuple(ordered)


class RunSettings(CommandOptions):
    """The settings of every objective that decide the result.

    Attributes:
        seed: Seed of the order of the data and of the noise.
        steps: Steps of the whole run; the learning rate schedule ends with them.
        skip_steps: Steps A-B, counted from 1, whose data is passed over: from step A on, steps read what follows it,
            text steps and image steps each of their kind.
        lr: Peak learning rate.
        lr_floor: Final learning rate, as a fraction of the peak.
        warmup: Steps of linear warmup.
        beta1: AdamW's first beta.
        beta2: AdamW's second beta.
        eps: AdamW's epsilon.
        weight_decay: AdamW's weight decay, for matrices; vectors are not decayed.
        clip: Maximum norm of the whole gradient.
        precision: Dtype of the computation; weights and optimizer are float32.
        freeze_until: Before this step, only tensors that match `trainable` are trained.
        trainable: Patterns of published tensor names.
    """

    model_config = ConfigDict(allow_inf_nan=False)

    changeable: ClassVar[frozenset[str]] = CHANGEABLE
    """Settings that may change when a run is resumed, by their names in run.json."""
    objective_fields: ClassVar[frozenset[str]]
    """Settings that define the objective; weights trained for different objectives are never averaged."""

    seed: Annotated[
        int, Field(ge=0, lt=2**63), Option("Seed of the order of the data and of the noise.", group=OPTIMIZER)
    ] = 0
    steps: Annotated[
        int,
        Field(ge=1),
        Option(
            "Steps of the whole run; the learning rate ends with them. A run that resumes may have more.",
            group=OPTIMIZER,
        ),
    ]
    skip_steps: Annotated[
        tuple[str, ...],
        Field(strict=False),
        AfterValidator(_in_order),
        Option(
            "Pass over the data of steps A to B, counted from 1: from step A on, steps read the data that follows it; "
            "may be repeated. A run that resumes may add steps after its checkpoint.",
            metavar="A-B",
            group=OPTIMIZER,
        ),
    ] = ()
    lr: Annotated[Positive, Option("Peak learning rate; the paper's is not established.", group=OPTIMIZER)]
    lr_floor: Annotated[
        float, Field(ge=0, le=1), Option(f"Final learning rate, as a fraction of --lr ({OURS}).", group=OPTIMIZER)
    ] = 0.1
    warmup: Annotated[int, Field(ge=0), Option("Steps of linear warmup; 100 in the paper.", group=OPTIMIZER)] = 100
    beta1: Annotated[Share, Option(f"AdamW's ({OURS}).", group=OPTIMIZER)] = 0.9
    beta2: Annotated[Share, Option(f"AdamW's ({OURS}).", group=OPTIMIZER)] = 0.95
    eps: Annotated[Positive, Option(f"AdamW's ({OURS}).", group=OPTIMIZER)] = 1e-8
    weight_decay: Annotated[
        float,
        Field(ge=0),
        Option(f"AdamW's, for matrices only ({OURS}).", group=OPTIMIZER),
    ] = 0.0
    clip: Annotated[Positive, Option("Maximum norm of the whole gradient; 1.0 in the paper.", group=OPTIMIZER)] = 1.0
    precision: Annotated[
        Literal["bfloat16", "float32"], Option("Dtype of the computation; weights stay float32.", group=MACHINES)
    ] = "bfloat16"
    freeze_until: Annotated[
        int,
        Field(ge=0),
        Option("Before this step, train only tensors that match --trainable.", metavar="STEP", group=OPTIMIZER),
    ] = 0
    trainable: Annotated[
        tuple[str, ...],
        Field(strict=False),
        Option(
            "For --freeze-until: names on disk, for example 'model.encoder.*'; may be repeated.",
            metavar="PATTERN",
            group=OPTIMIZER,
        ),
    ] = ()

    @model_validator(mode="before")
    @classmethod
    def _split_betas(cls, values: Any) -> Any:
        # run.json and manifests have both in one list.
        if isinstance(values, dict) and isinstance(betas := values.get("betas"), list | tuple) and len(betas) == 2:
            rest = {name: value for name, value in values.items() if name != "betas"}
            return {**rest, "beta1": betas[0], "beta2": betas[1]}
        return values

    @classmethod
    def recorded(cls) -> Collection[str]:
        """Return the names of the fields that run.json has; other options of a run do not decide its result."""
        raise NotImplementedError

    @property
    def tokens_of_pass(self) -> int:
        """Default for the most encoder tokens and labels per process and forward pass."""
        raise NotImplementedError

    def kind_of(self, step: int) -> Kind:
        """Return what the samples of a step are made from."""
        raise NotImplementedError

    def samples_of(self, step: int) -> int:
        """Return the number of samples of a step."""
        raise NotImplementedError

    def steps_of_kind(self, step: int, start: int, stop: int) -> int:
        """Return how many of the steps from `start` to before `stop` are of the kind of a step."""
        return stop - start

    def rate_of(self, part: str) -> float:
        """Return the peak learning rate of a part of the model."""
        return self.lr

    @property
    def adapter(self) -> LoraShape | None:
        """The adapter that is trained instead of the model; None if the model is."""
        return None

    @property
    def skipped(self) -> tuple[tuple[int, int], ...]:
        """The first and last steps of `skip_steps`, counted from 1, in order."""
        return tuple(step_range(each) for each in self.skip_steps)

    @property
    def sha256(self) -> str:
        """sha256 of all settings, hexadecimal."""
        return digest_of(self.to_json())

    @property
    def objective_sha256(self) -> str:
        """sha256 of the settings of the objective, hexadecimal."""
        return digest_of({name: value for name, value in self.to_json().items() if name in self.objective_fields})

    def to_json(self) -> dict[str, Any]:
        """Return the settings as in run.json."""
        values = self.model_dump(mode="json", include={*self.recorded()})
        document: dict[str, Any] = {}
        for name, value in values.items():
            if name == "beta1":
                document["betas"] = [value, values["beta2"]]
            elif name != "beta2":
                document[name] = value
        return document


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Return the settings that differ between two runs, with both values."""
    names = dict.fromkeys([*one, *other])
    return [
        f"{name} {_shown(one.get(name))}, now {_shown(other.get(name))}"
        for name in names
        if one.get(name) != other.get(name)
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"sha256 {digest_of(value)[:16]}"
