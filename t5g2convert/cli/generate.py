"""`t5g2 generate`."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from t5g2convert.cli.console import DebugOption, JsonOption, emit_json, print_notes
from t5g2convert.cli.options import with_options
from t5g2convert.errors import T5g2Error, UsageError
from t5g2convert.printable import printable
from t5g2convert.reference.options import GenerateOptions

if TYPE_CHECKING:
    from t5g2convert.reference.generation.generator import Generated, Prompt


@with_options
def generate(
    output: Annotated[Path, typer.Argument(help="A T5Gemma 2 or T5Gemma folder with a tokenizer.")],
    prompt: Annotated[
        str | None, typer.Option("--prompt", help="The text for the encoder.", show_default="none")
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            "--prompts", help="A file of prompts: a text on each line, or in *.jsonl a JSON value.", show_default="none"
        ),
    ] = None,
    *,
    options: GenerateOptions,
    as_json: JsonOption = False,
    debug: DebugOption = False,
) -> None:
    """Generate text with the reference encoder-decoder, or with transformers."""
    _check_prompts(prompt, prompts, options)
    from t5g2convert.reference.generation.generator import Generator, Prompt
    from t5g2convert.reference.generation.prompt_file import read_prompts

    given = (
        [Prompt(prompt or "", options.decoder_prompt, options.image)]
        if prompts is None
        else read_prompts(prompts, options)
    )
    generator = Generator(output, options)
    if as_json:
        emit_json({"texts": [_document(*each) for each in zip(given, generator.texts(given), strict=True)]})
    elif prompts is not None or options.infill:
        # One line for each prompt of a file: line ends in a text are escaped.
        keep = "\n" if prompts is None else ""
        for number, found in enumerate(generator.texts(given), start=1):
            sys.stdout.write(printable(found.text, keep=keep) + "\n")
            sys.stdout.flush()
            print_notes(_unfilled(number, found))
    else:
        _stream(generator.stream(given[0]))
    # After the text: it explains what was read, and an error stays one line.
    print_notes(generator.notes)


def _check_prompts(prompt: str | None, prompts: Path | None, options: GenerateOptions) -> None:
    if prompt is not None and prompts is not None:
        raise UsageError("--prompt and --prompts cannot be used together")
    if options.hide_encoder and prompt is not None:
        raise UsageError("--hide-encoder hides --prompt from the decoder", hint="pass the text with --decoder-prompt")
    if prompt is None and prompts is None and not options.hide_encoder:
        raise UsageError("a prompt is missing", hint="pass --prompt TEXT or --prompts FILE")


def _stream(pieces: Iterable[str]) -> None:
    """Write a text as it is generated."""
    began = False
    try:
        for piece in pieces:
            began = True
            sys.stdout.write(printable(piece, keep="\n"))
            sys.stdout.flush()
    except T5g2Error:
        # Start the error on a new line, but without an empty line if nothing was written.
        sys.stdout.write("\n" * began)
        raise
    sys.stdout.write("\n")


def _unfilled(number: int, found: "Generated") -> Iterator[str]:
    missing = sum(span is None for span in found.spans or ())
    if missing:
        yield f"prompt {number}: the model wrote nothing for {missing} of {len(found.spans or ())} masks"


def _document(prompt: "Prompt", found: "Generated") -> dict[str, Any]:
    return {
        "prompt": prompt.text,
        "decoder_prompt": prompt.decoder,
        "image": None if prompt.image is None else str(prompt.image),
        "text": found.text,
        "tokens": list(found.tokens),
        "finish": found.finish,
        **({} if found.spans is None else {"spans": list(found.spans)}),
    }
