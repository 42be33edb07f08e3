"""The settings of UL2 that decide the result of a run.

See `run_settings` for those of every objective.
"""

from collections.abc import Collection
from pathlib import Path
from typing import Annotated, ClassVar, Final, Literal

from pydantic import Field

from t5g2convert.adaptation.train.run_settings import CHANGEABLE, OBJECTIVE, OPTIMIZER, OURS, Kind, RunSettings
from t5g2convert.adaptation.ul2.mixture import Mixture, read_mixture
from t5g2convert.command_options import CommandOptions, Option

PAPER_MIXTURE: Final = "the paper's, 1:1:1:1:4"


def _mixture(text: str) -> Mixture:
    return read_mixture() if text == PAPER_MIXTURE else read_mixture(Path(text))


class UL2Objective(CommandOptions):
    """The settings of UL2; `mixture` to `teacher` define the objective.

    Attributes:
        mixture: The UL2 tasks.
        encoder_length: Longest encoder input in tokens, including bos and eos.
        decoder_length: Most labels per sample, including the final eos.
        encoder_bos: Whether the encoder's input starts with bos.
        encoder_eos: Whether it ends with eos.
        documents: Whether a sample's text runs on across documents (`packed`), or stays in one (`single`).
        image_every: Every how many steps one uses documents with images; None for never.
        teacher: Identity of the model that is distilled; None for none. Filled in by `adapt`.
        batch_tokens: Encoder tokens per step, including padding.
        text_samples: Samples of a text step; None for samples of `encoder_length`. Filled in by `adapt` for single
            documents, from the batch and their mean size, and so is `image_samples`.
        image_samples: Documents of an image step; None without image steps.
    """

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


class Settings(RunSettings, UL2Objective):
    """The settings of a run of UL2 that decide the result."""

    changeable: ClassVar[frozenset[str]] = CHANGEABLE | {"batch_tokens", "text_samples", "image_samples"}
    objective_fields: ClassVar[frozenset[str]] = frozenset(
        {"mixture", "encoder_length", "decoder_length", "encoder_bos", "encoder_eos", "documents", "teacher"}
    )

    @classmethod
    def recorded(cls) -> Collection[str]:
        """Return the fields of these settings."""
        return Settings.model_fields

    @property
    def samples(self) -> int:
        """Samples per text step; 0 if a batch is smaller than one sample."""
        return self.text_samples or self.batch_tokens // self.encoder_length

    @property
    def tokens_of_pass(self) -> int:
        """The longest sample."""
        return self.encoder_length + self.decoder_length

    def kind_of(self, step: int) -> Kind:
        """Return `images` for the last of every `image_every` steps."""
        return "images" if self.image_every is not None and (step + 1) % self.image_every == 0 else "text"

    def samples_of(self, step: int) -> int:
        """Return the number of texts, or of documents with images."""
        if self.kind_of(step) == "text":
            return self.samples
        assert self.image_samples is not None, "`prepare` sets it"
        return self.image_samples

    def steps_of_kind(self, step: int, start: int, stop: int) -> int:
        """Return how many of these steps are image steps, or text steps."""
        images = 0 if self.image_every is None else stop // self.image_every - start // self.image_every
        return images if self.kind_of(step) == "images" else stop - start - images
