"""The options of the reference passes and of `generate`, for the command line and the Python functions."""

from pathlib import Path
from typing import Annotated, Literal

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


class GenerateOptions(PassOptions):
    """The options of `generate`.

    Attributes:
        image: A picture that is put before the prompt.
        max_new_tokens: The largest number of tokens.
    """

    image: Annotated[Path | None, Option("Image file for the encoder, before the text.")] = None
    max_new_tokens: Annotated[int, Field(ge=1), Option("Maximum number of tokens to generate.")] = 64
