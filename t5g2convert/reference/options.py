"""The options of the reference passes and of `generate`, for the command line and the Python functions."""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from t5g2convert.command_options import CommandOptions, Option

PassDtype = Literal["bfloat16", "float16", "float32"]
"""A dtype that a model can be run in."""

Device = Literal["cpu", "cuda"]
"""A device that a model can be run on."""


class PassOptions(CommandOptions):
    """The options of a reference pass.

    Attributes:
        dtype: The dtype to compute in; None for the model's own dtype.
        device: The device to compute on.
    """

    dtype: Annotated[PassDtype | None, Option("Dtype to compute in.", default="the output's")] = None
    device: Annotated[Device, Option("Device to compute on; parity is exact on the CPU.")] = "cpu"


Engine = Literal["reference", "transformers"]
"""What runs a model: this package's reference pass, or transformers' class."""

SAMPLING: Final = "Sampling"
"""The section of the sampling options in the help."""

CONFIGURED: Final = "generation_config.json's"


class GenerateOptions(PassOptions):
    """The options of `generate`.

    Attributes:
        image: A picture that is put before the prompt.
        decoder_prompt: Text that the decoder continues.
        hide_encoder: Hide the encoder's output from the decoder, which is then a Gemma 3 of its own.
        chat: Put the prompt into the chat template of the folder.
        infill: Fill the masks of the prompt, `[MASK]` or sentinels.
        temperature: 0 for the most probable token; otherwise sample, with logits divided by it.
        top_k: Sample from this many of the most probable tokens; 0 for all.
        top_p: Sample from the most probable tokens whose probabilities add up to this.
        seed: The seed of the sampling.
        max_new_tokens: The largest number of tokens.
        stop: Texts that end the output; they are not part of it.
        show_special: Show special tokens.
        batch: Prompts to run at once.
        engine: What runs the model.
    """

    image: Annotated[Path | None, Option("Image file for the encoder, before the text.")] = None
    decoder_prompt: Annotated[str, Option("Text that the decoder continues.", default="nothing")] = ""
    hide_encoder: Annotated[
        bool,
        Option(
            "Hide the encoder from the decoder, which then continues --decoder-prompt as Gemma 3.", "--hide-encoder"
        ),
    ] = False
    chat: Annotated[bool, Option("Put the prompt into the folder's chat template, as a user's turn.", "--chat")] = False
    infill: Annotated[
        bool, Option("Fill the prompt's masks: [MASK], or sentinels by name, from the first downwards.", "--infill")
    ] = False
    temperature: Annotated[
        float | None,
        Field(ge=0, allow_inf_nan=False),
        Option("Sample, with logits divided by this; 0 is greedy.", metavar="X", default=CONFIGURED, group=SAMPLING),
    ] = None
    top_k: Annotated[
        int | None,
        Field(ge=0),
        Option("Sample from the K most probable tokens; 0 for all.", metavar="K", default=CONFIGURED, group=SAMPLING),
    ] = None
    top_p: Annotated[
        float | None,
        Field(ge=0, le=1, allow_inf_nan=False),
        Option(
            "Sample from the most probable tokens that add up to this probability.",
            metavar="P",
            default=CONFIGURED,
            group=SAMPLING,
        ),
    ] = None
    seed: Annotated[
        int | None, Field(ge=0), Option("Seed of the sampling.", metavar="N", default="0", group=SAMPLING)
    ] = None
    max_new_tokens: Annotated[
        int | None,
        Field(ge=1),
        Option("Maximum number of tokens to generate.", metavar="N", default=f"{CONFIGURED}, or 64"),
    ] = None
    stop: Annotated[
        tuple[str, ...],
        Field(strict=False),
        Option("End the text before this; may be repeated.", metavar="TEXT", default="none"),
    ] = ()
    show_special: Annotated[bool, Option("Show special tokens in the text.", "--show-special")] = False
    batch: Annotated[int, Field(ge=1), Option("Prompts to run at once.", metavar="N")] = 8
    engine: Annotated[Engine, Option("What runs the model; transformers comes with the extra `adapt`.")] = "reference"
