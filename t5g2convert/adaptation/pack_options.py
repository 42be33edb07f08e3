"""The options of `pack`, for the command line and the Python API."""

from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from t5g2convert.adaptation.options import REPLACE
from t5g2convert.command_options import CommandOptions, Option

SHARD_TOKENS: Final = 1 << 28
"""Tokens per shard: 1 GiB."""


class PackOptions(CommandOptions):
    """The options of packing.

    Attributes:
        bos: Start each document with the model's bos; each ends with its eos.
        all_turns: Make a pair of each turn of an assistant in a conversation, not only of the last.
        max_input: Most tokens of a pair's input; None for the positions of the model's encoder.
        max_target: Most tokens of a pair's target; None for the positions of the model's decoder.
        truncate: Cut the beginning of an input that is too long, or skip a pair that is too long; None to refuse it.
        skip_bad: How many documents that cannot be packed are skipped; one more ends the packing.
        workers: Additional processes that tokenize and decode images; the output does not depend on it.
        shard_tokens: Most tokens per file.
        flush: Wait until all bytes are on disk before the output appears.
        overwrite: Replace existing packed data at the very end; nothing else is ever replaced.
        append: Add the documents to existing packed data, which is replaced at the very end.
        resume: Continue an interrupted pack of the same documents into the same output, if there is one.
        sources: Files and folders that the documents come from; the output must not be among them.
    """

    bos: Annotated[
        bool,
        Option(
            "Start each document with `<bos>`. Whether the releases did is not established; our default is not to. "
            "Each document ends with `<eos>`.",
            flag="--bos/--no-bos",
        ),
    ] = False
    all_turns: Annotated[
        bool, Option("Make a pair of each turn of the assistant in a conversation, not only of the last.")
    ] = False
    max_input: Annotated[
        int | None, Field(ge=2), Option("Most tokens of a pair's input.", metavar="N", default="what the model reads")
    ] = None
    max_target: Annotated[
        int | None, Field(ge=2), Option("Most tokens of a pair's target.", metavar="N", default="what the model reads")
    ] = None
    truncate: Annotated[
        Literal["input", "skip"] | None,
        Option(
            "Of pairs that are too long, leave out the beginning of the input, after `<bos>`, or skip and count them.",
            default="refuse them",
        ),
    ] = None
    skip_bad: Annotated[
        int,
        Field(ge=0),
        Option("Skip up to N documents that cannot be packed, and list them in OUTPUT/skipped.jsonl.", metavar="N"),
    ] = 0
    workers: Annotated[
        int, Field(ge=0), Option("Processes that tokenize and decode images; the output is the same for any number.")
    ] = 0
    shard_tokens: Annotated[int, Field(ge=1), Option("Tokens per file, 4 bytes each.")] = SHARD_TOKENS
    flush: Annotated[bool, Option("Flush all bytes to disk, to survive power loss.")] = True
    overwrite: Annotated[bool, Option(REPLACE)] = False
    append: Annotated[
        bool,
        Option(
            "Add the documents to the packed data in OUTPUT, of the same tokenizer, tokens and --bos. Its shards are "
            "linked, not rewritten; the data changes at once, when all new files are complete."
        ),
    ] = False
    resume: Annotated[
        bool,
        Option("Continue an interrupted pack of the same input, options and OUTPUT; without one, begin."),
    ] = False
    sources: Annotated[tuple[Path, ...], Field(strict=False)] = ()
