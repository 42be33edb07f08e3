"""The settings that decide the result of a run; a resumed run must have the same.

The command line, the Python API and run.json all read this model. Options that only decide the speed of a run are in
`adaptation.options`.
"""

import json
import re
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, ConfigDict, Field, model_validator

from t5g2convert.adaptation.ul2.mixture import Mixture, read_mixture
from t5g2convert.checkpoint.manifest import digest_of
from t5g2convert.command_options import CommandOptions, Option
from t5g2convert.errors import UsageError

Positive = Annotated[float, Field(gt=0)]
Share = Annotated[float, Field(ge=0, lt=1)]

OURS: Final = "not established; our default"
PAPER_MIXTURE: Final = "the paper's, 1:1:1:1:4"
OBJECTIVE, OPTIMIZER, RUN, MACHINES = "Objective", "Optimizer", "Run", "Machines"
"""Sections of the help."""

_OBJECTIVE_FIELDS: Final = frozenset(
    {"mixture", "encoder_length", "decoder_length", "encoder_bos", "encoder_eos", "documents", "teacher"}
)
"""Settings that define the objective; weights trained for different objectives are never averaged."""


CHANGEABLE: Final = frozenset(
    {
        "steps", "skip_steps", "batch_tokens", "text_samples", "image_samples", "lr", "lr_floor", "warmup", "betas",
        "eps", "weight_decay", "clip", "precision",
    }
)  # fmt: skip
"""Settings that may change when a run is resumed, by their names in run.json."""


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


def _mixture(text: str) -> Mixture:
    return read_mixture() if text == PAPER_MIXTURE else read_mixture(Path(text))


class Settings(CommandOptions):
    """The settings that decide the result; `mixture` to `teacher` define the objective.

    Attributes:
        mixture: The UL2 tasks.
        encoder_length: Longest encoder input in tokens, including bos and eos.
        decoder_length: Most labels per sample, including the final eos.
        encoder_bos: Whether the encoder's input starts with bos.
        encoder_eos: Whether it ends with eos.
        documents: Whether a sample's text runs on across documents (`packed`), or stays in one (`single`).
        image_every: Every how many steps one uses documents with images; None for never.
        teacher: Identity of the model that is distilled; None for none. Filled in by `adapt`.
        seed: Seed of the order of the data and of the noise.
        steps: Steps of the whole run; the learning rate schedule ends with them.
        skip_steps: Steps A-B, counted from 1, whose data is passed over: from step A on, steps read what follows it,
            text steps and image steps each of their kind.
        batch_tokens: Encoder tokens per step, including padding.
        text_samples: Samples of a text step; None for samples of `encoder_length`. Filled in by `adapt` for single
            documents, from the batch and their mean size, and so is `image_samples`.
        image_samples: Documents of an image step; None without image steps.
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

    mixture: Annotated[
        Mixture,
        Option(
            "A YAML table of tasks and the first sentinel, `<unused6237>` as in Google's models.",
            metavar="PATH",
            default=PAPER_MIXTURE,
            group=OBJECTIVE,
            parse=_mixture,
        ),
    ] = Field(default_factory=read_mixture)
    encoder_length: Annotated[
        int, Field(ge=2), Option("Longest encoder input in tokens; 16384 in the paper.", group=OBJECTIVE)
    ] = 16_384
    decoder_length: Annotated[
        int, Field(ge=2), Option("Most labels per sample; 16384 in the paper.", group=OBJECTIVE)
    ] = 16_384
    encoder_bos: Annotated[
        bool, Option("Start the encoder's input with bos, as Google's notebook does.", group=OBJECTIVE)
    ] = True
    encoder_eos: Annotated[
        bool,
        Option(
            "End the encoder's input with eos; Google's notebook does not.",
            flag="--encoder-eos/--no-encoder-eos",
            group=OBJECTIVE,
        ),
    ] = False
    documents: Annotated[
        Literal["packed", "single"],
        Option(
            "packed: texts fill the lengths and run on across documents. single: a text is one document, or an equal "
            f"piece of a long one ({OURS}).",
            group=OBJECTIVE,
        ),
    ] = "packed"
    image_every: Annotated[
        int | None,
        Field(ge=1),
        Option(
            "Use documents with images in every K-th step, as many as fill --batch-tokens, and train the projector "
            f"({OURS}).",
            default="none",
            metavar="K",
            group=OBJECTIVE,
        ),
    ] = None
    teacher: str | None = None
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
    batch_tokens: Annotated[
        int,
        Field(ge=1),
        Option(
            "Encoder tokens per step, over all devices: samples of --encoder-length; documents, with images or single, "
            "by their mean. 4.2M in the paper.",
            group=OPTIMIZER,
        ),
    ] = 256 * 16_384
    text_samples: Annotated[int | None, Field(ge=1)] = None
    image_samples: Annotated[int | None, Field(ge=1)] = None
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

    @property
    def samples(self) -> int:
        """Samples per text step; 0 if a batch is smaller than one sample."""
        return self.text_samples or self.batch_tokens // self.encoder_length

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
        return digest_of({name: value for name, value in self.to_json().items() if name in _OBJECTIVE_FIELDS})

    def to_json(self) -> dict[str, Any]:
        """Return the settings as in run.json."""
        values = self.model_dump(mode="json", include=set(Settings.model_fields))
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
