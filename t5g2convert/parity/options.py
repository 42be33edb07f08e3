"""The options of `verify` and `compare`, for the command line and the Python functions."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from t5g2convert.checkpoint.hub.open_and_fetch import Origin
from t5g2convert.command_options import Option
from t5g2convert.progress import Steps
from t5g2convert.reference.options import PassOptions


class VerifyOptions(PassOptions):
    """The options of `verify` and of the reference passes.

    Attributes:
        decoder_from: The folder or model that the decoder came from, if not the source.
        vision_from: The folder or model that the vision tower came from, if not the source.
        mapping: The map of the conversion, if not the shipped one for the source's model type.
        tolerance: Largest difference that passes, as a fraction of the largest value; 0 is exact.
        text: A text file to read instead of seeded tokens, with the output's tokenizer.
        image: A picture to read instead of seeded pixels.
        adapter: For a folder that `t5g2 merge` wrote: the adapter that was merged into the source.
        frozen: For a folder trained elsewhere: parts, or layers like `encoder.layers.0`, that were frozen on purpose
            in addition to the vision tower; `none` if that was trained too.
        record: Write the result into the output's t5g2.json.
        progress: Called with a few words at every step.
    """

    decoder_from: Annotated[Origin | None, Option("The checkpoint its decoder was made from, if not SOURCE.")] = None
    vision_from: Annotated[Origin | None, Option("The checkpoint its vision tower was taken from, if not SOURCE.")] = (
        None
    )
    mapping: Annotated[
        str | None, Option("The weight map it was made with.", default="the shipped map for the source's model_type")
    ] = None
    tolerance: Annotated[float, Option("Largest difference allowed, as a fraction of the largest value.")] = 0.0
    text: Annotated[Path | None, Option("Text file to use instead of seeded tokens, with OUTPUT's tokenizer.")] = None
    image: Annotated[Path | None, Option("Image file to use instead of seeded pixels.")] = None
    adapter: Annotated[
        Path | None,
        Option("For a folder that t5g2 merge wrote: the adapter that was merged into SOURCE.", metavar="ADAPTER"),
    ] = None
    frozen: Annotated[
        tuple[str, ...],
        Option(
            "For a folder trained elsewhere: a part or layer that was frozen on purpose (encoder, decoder, "
            "embedding, projector, encoder.layers.0), or none where the vision tower was trained too. May be repeated.",
            metavar="PART",
            default="vision",
        ),
    ] = ()
    record: Annotated[bool, Option("Write the result into t5g2.json.")] = True
    progress: Steps | None = None

    @field_validator("frozen", mode="before")
    @classmethod
    def _from_any_list(cls, frozen: Any) -> Any:
        return tuple(frozen) if isinstance(frozen, list) else frozen


class CompareOptions(PassOptions):
    """The options of `compare` and of the reference passes.

    Attributes:
        max_tokens: Maximum number of tokens of the text to use.
        progress: Called with a few words at every step.
    """

    max_tokens: Annotated[int, Field(ge=8), Option("Maximum number of tokens of the text to use.")] = 1024
    progress: Steps | None = None
