"""What decides the result of a run: every setting that a resumed run must share, in one frozen value.

What only decides how fast it comes, the devices, the size of a micro-batch, recomputed activations, is not among them.
"""

import json
import math
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from t5g2convert.adaptation.ul2.mixture import Mixture
from t5g2convert.checkpoint.manifest import digest_of
from t5g2convert.errors import UsageError

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, lt=1)]

_OBJECTIVE: Final = frozenset({"mixture", "encoder_length", "decoder_length", "encoder_bos", "encoder_eos", "teacher"})
"""Settings that say what is learnt; weights that learnt different things are never averaged."""


class Settings(BaseModel):
    """All of them; `mixture` to `teacher` say what is learnt, the others how.

    Attributes:
        mixture: The tasks.
        encoder_length: Tokens of the encoder's input at most, its frame included.
        decoder_length: Labels at most, the final eos included.
        encoder_bos: Whether the encoder's input starts with bos.
        encoder_eos: Whether it ends with eos.
        image_every: Every so many steps one is of documents with images; None for never.
        teacher: The identity of the model that is distilled; None for none.
        seed: Of the order of the data and of the noise.
        steps: Of the whole run; the learning rate ends with them.
        batch_tokens: Encoder tokens of a step, padding included.
        lr: The highest learning rate.
        lr_floor: Where the cosine ends, as a part of the highest rate.
        warmup: Steps in which it rises.
        betas: AdamW's.
        eps: AdamW's.
        weight_decay: AdamW's, of matrices; vectors are not decayed.
        clip: The largest norm of the whole gradient.
        precision: What is computed in; weights and optimizer are float32.
        freeze_until: Until this step only what `trainable` names is trained.
        trainable: Patterns of names in the published layout.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)

    mixture: Mixture
    encoder_length: Annotated[int, Field(gt=1)]
    decoder_length: Annotated[int, Field(gt=1)]
    encoder_bos: bool = True
    encoder_eos: bool = False
    image_every: Annotated[int, Field(gt=0)] | None = None
    teacher: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    steps: Annotated[int, Field(gt=0)]
    batch_tokens: Annotated[int, Field(gt=0)]
    lr: Positive
    lr_floor: Annotated[float, Field(ge=0, le=1)] = 0.1
    warmup: Annotated[int, Field(ge=0)] = 100
    betas: Annotated[tuple[Share, Share], Field(strict=False)] = (0.9, 0.95)
    eps: Positive = 1e-8
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    clip: Positive = 1.0
    precision: Literal["bfloat16", "float32"] = "bfloat16"
    freeze_until: Annotated[int, Field(ge=0)] = 0
    trainable: Annotated[tuple[str, ...], Field(strict=False)] = ()

    @property
    def samples(self) -> int:
        """Samples of a step: 0 where a batch is smaller than one."""
        return self.batch_tokens // self.encoder_length

    @property
    def sha256(self) -> str:
        """Of all settings, hexadecimal."""
        return digest_of(self.to_json())

    @property
    def objective_sha256(self) -> str:
        """Of those that say what is learnt, hexadecimal."""
        return digest_of({name: value for name, value in self.to_json().items() if name in _OBJECTIVE})

    def to_json(self) -> dict[str, Any]:
        """As run.json has them."""
        return self.model_dump(mode="json")

    def rate(self, step: int) -> float:
        """The learning rate of a step, counted from 0: up in a line, then down along half a cosine to the floor."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * (self.lr_floor + (1 - self.lr_floor) * (1 + math.cos(math.pi * min(done, 1.0))) / 2)

    def is_image_step(self, step: int) -> bool:
        """Whether a step is of documents with images: the last of every `image_every`."""
        return self.image_every is not None and (step + 1) % self.image_every == 0

    def first_sample(self, step: int) -> int:
        """The first sample of a step, counted among the samples of its own kind."""
        images = 0 if self.image_every is None else step // self.image_every
        return (images if self.is_image_step(step) else step - images) * self.samples


def make_settings(**values: Any) -> Settings:
    """Settings of these values.

    Raises:
        UsageError: One is out of its range; told by the name of its option.
    """
    try:
        return Settings(**values)
    except ValidationError as error:
        first = error.errors()[0]
        option = str(first["loc"][0]).replace("_", "-")
        raise UsageError(f"--{option}: {first['msg']}, found {first['input']!r}") from None


def differences(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Each setting in which two runs differ, with both values: of the first, and of the second."""
    names = dict.fromkeys([*one, *other])
    return [
        f"{name} {_shown(one.get(name))}, now {_shown(other.get(name))}"
        for name in names
        if one.get(name) != other.get(name)
    ]


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"sha256 {digest_of(value)[:16]}"
