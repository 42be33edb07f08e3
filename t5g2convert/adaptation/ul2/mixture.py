"""The UL2 mixture: its tasks and their weights, from a YAML table."""

from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, NonNegativeInt, field_validator, model_validator

from t5g2convert.adaptation.declarations import read_declaration
from t5g2convert.mapping.schema import Declaration

DEFAULT_MIXTURE: Final = Path(__file__).with_name("ul2.yaml")
"""The paper's mixture."""

MAX_WEIGHT: Final = 1000
"""A block of samples is permuted in memory; finer shares are not needed."""


class Task(Declaration):
    """One way to corrupt a text.

    `spans` replaces spans of `mean_span` tokens on average, `rate` of all tokens, by one sentinel each. `prefix` leaves
    the last `rate` of the text to the decoder: one span, with or without a sentinel.
    """

    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]*$", description="Name in logs.")
    kind: Literal["spans", "prefix"]
    rate: float = Field(gt=0, lt=1, description="Share of the raw tokens that the decoder writes.")
    mean_span: float | None = Field(
        default=None, ge=1, description="Mean length of a span in tokens; only for kind: spans."
    )
    weight: int = Field(ge=1, le=MAX_WEIGHT, description="Samples of this task per block of the mixture.")
    mode_token: NonNegativeInt | None = Field(
        default=None, description="Token id at the start of the encoder's input, after bos."
    )
    sentinel: bool = Field(default=True, description="Whether a sentinel marks the position of a span.")

    @model_validator(mode="after")
    def _fits_its_kind(self) -> Self:
        if self.kind == "prefix":
            if self.mean_span is not None:
                raise ValueError("a prefix task has one span; mean_span is only for spans")
            return self
        if self.mean_span is None:
            raise ValueError("spans need a mean_span")
        if not self.sentinel:
            raise ValueError("spans need sentinels; expected sentinel: true")
        if self.rate / self.mean_span > 1 - self.rate:
            raise ValueError(
                f"spans of {self.mean_span:g} tokens at rate {self.rate:g} leave too few tokens between them"
            )
        return self


class Mixture(Declaration):
    """All tasks. In every block of `block` consecutive samples, each task occurs `weight` times."""

    format: Literal[1] = 1
    first_sentinel: Annotated[str, Field(min_length=1)] | NonNegativeInt | None = Field(
        default=None,
        description="The first sentinel, a token's name or id; the others descend from it. Without it `<unused6237>`, "
        "as in Google's models, or in a tokenizer without that token the highest unused id.",
    )
    tasks: Annotated[tuple[Task, ...], Field(min_length=1, strict=False)]

    @field_validator("tasks")
    @classmethod
    def _named_apart(cls, tasks: tuple[Task, ...]) -> tuple[Task, ...]:
        names = [task.name for task in tasks]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two tasks have the name {name!r}")
        return tasks

    @property
    def block(self) -> int:
        """Samples per block: the sum of the weights."""
        return sum(task.weight for task in self.tasks)

    @property
    def cycle(self) -> tuple[int, ...]:
        """The task numbers of a block, each as often as its weight, in order."""
        return tuple(number for number, task in enumerate(self.tasks) for _ in range(task.weight))

    @property
    def mode_tokens(self) -> frozenset[int]:
        """The mode tokens of all tasks."""
        return frozenset(task.mode_token for task in self.tasks if task.mode_token is not None)


def read_mixture(path: Path | None = None) -> Mixture:
    """Read a mixture; without a path, the paper's, 1:1:1:1:4.

    Raises:
        MappingError: The file is not valid; shows `file:line:column` and a caret at the first fault.
    """
    return read_declaration(DEFAULT_MIXTURE if path is None else path, Mixture, Task)
