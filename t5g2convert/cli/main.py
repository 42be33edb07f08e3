"""The application `t5g2`: its commands, its exit codes, and the only place where errors become text."""

import os
import signal
import sys
import traceback
from collections.abc import Mapping, Sequence
from contextlib import suppress
from types import FrameType
from typing import Annotated, Any, Final, NoReturn

import typer

from t5g2convert.cli.command import Commands, LazyCommand
from t5g2convert.cli.console import emit_json
from t5g2convert.cli.streams import finish_streams, keep_working, prepare_streams, reader_left
from t5g2convert.errors import HubError, Interrupted, MappingError, OutputError, T5g2Error, UsageError
from t5g2convert.interrupts import forget, interruption, note
from t5g2convert.printable import printable
from t5g2convert.version import __version__

SHOWN_DETAILS: Final = 20
"""Maximum number of an error's details to print; `--json` lists all."""

# The base class of typer's errors for a wrong command line: from click, or from the click inside newer typer.
CommandLineError: Final[type[Exception]] = next(
    base for base in typer.BadParameter.__mro__ if base.__name__ == "ClickException"
)

PRINTING: Final = frozenset({"card", "generate", "inspect", "mappings", "plan", "probe-sentinels"})
"""Commands that only print: they stop if stdout cannot be written. Other commands continue."""

COMMANDS: Final[Mapping[str, str]] = {
    "demo": "Build a tiny Gemma 3 with images, convert it, verify it, generate with it.",
    "inspect": "Show what a checkpoint is: family, layout, parameters by part, dtypes, RoPE, windows.",
    "plan": (
        "Show what convert would do, from headers and small files; a tokenizer.json on the Hub is downloaded if needed."
    ),
    "convert": "Convert a Gemma 3 checkpoint into a T5Gemma 2 folder, or a Gemma 2 into a T5Gemma.",
    "extract": "Take the encoder out of a T5Gemma 2 folder, or its decoder as the Gemma 3 that it is without memory.",
    "verify": "Judge a conversion: files, bytes, settings, and what both models compute.",
    "compare": "Measure how far a trained T5Gemma 2 has moved from its Gemma 3; the options make it a gate for CI.",
    "generate": "Generate text with the reference encoder-decoder, or with transformers.",
    "pack": "Tokenize text, images and pairs into the files that `t5g2 adapt` and `t5g2 finetune` train on.",
    "adapt": "Continue the training of a converted model with UL2, on one device or many.",
    "finetune": "Fine-tune a model on pairs of an input and a target, on one device or many.",
    "average": "Average the last checkpoints of a training run into a model, as T5Gemma 2 was finished.",
    "merge": "Merge a LoRA adapter of peft into the weights of a T5Gemma 2.",
    "probe-sentinels": (
        "Find the unused rows of the embedding that moved between two checkpoints: the sentinels of a training."
    ),
    "card": (
        "Print the model card of a folder, made from its t5g2.json: what it is, how it was made, which checks it "
        "passed."
    ),
    "upload": "Upload a folder to the Hub in one commit, and compare the checksums before and after.",
    "doctor": (
        "Check the installation: library versions, the Hub's cache and free disk, where the token is, CUDA, the maps."
    ),
    "mappings": "List, show and check weight maps, and print their JSON Schema.",
}
"""The commands in the order of `--help`, each with the first sentence of its help."""

SECTIONS: Final[Mapping[str, tuple[str, ...]]] = {
    "Convert": ("demo", "inspect", "plan", "convert", "extract", "mappings"),
    "Prove": ("verify", "compare"),
    "Run": ("generate",),
    "Train": ("pack", "adapt", "finetune", "average", "merge", "probe-sentinels"),
    "Publish": ("card", "upload"),
    "Installation": ("doctor",),
}
"""The sections of `--help`; each command is in one."""


class Application(Commands):
    """The commands of t5g2, in sections."""

    sections = SECTIONS


ABOUT: Final = "Convert Gemma 3 checkpoints to T5Gemma 2 encoder-decoders, exactly, and train them."

app = typer.Typer(
    name="t5g2",
    cls=Application,
    context_settings={"help_option_names": ["-h", "--help"]},
    help=ABOUT,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _options(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Convert, verify, train and publish."""
    if context.invoked_subcommand not in PRINTING:
        keep_working()


for name, summary in COMMANDS.items():
    app.command(name, cls=LazyCommand, help=summary)(lambda: None)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    prepare_streams()
    forget()
    signal.signal(signal.SIGTERM, _stop)
    signal.signal(signal.SIGINT, _stop)
    # Silence warnings about problems that the Hub's client overcomes; it reads this variable when it is imported.
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    try:
        code = app(arguments, prog_name="t5g2", standalone_mode=False)
    except BaseException as error:  # noqa: BLE001 - the one place where every error ends
        code = report(error, as_json="--json" in arguments, debug="--debug" in arguments)
    lost = finish_streams()
    command = next((argument for argument in arguments if not argument.startswith("-")), None)
    if lost is not None and command is not None and command not in PRINTING:
        # Only the printed result is lost: keep the exit code of the work.
        report(OutputError(f"cannot print the result: {lost.strerror}"), as_json=False, debug=False)
        finish_streams()
    elif lost is not None and not code:
        code = report(lost, as_json=False, debug="--debug" in arguments)
        finish_streams()
    sys.exit(code if isinstance(code, int) else 0)


def report(error: BaseException, *, as_json: bool, debug: bool) -> int:
    """Print an error, on one line unless it has details, and return its exit code."""
    # Typer and rich exit if the reader of a pipe has left, which is not an error.
    left = isinstance(error, BrokenPipeError) or isinstance(error.__context__, BrokenPipeError)
    if left and reader_left() and not isinstance(error, T5g2Error):
        return 0
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 1
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, typer.Abort):
        error = Interrupted(signal.SIGINT)
    if debug:
        with suppress(OSError):
            sys.stderr.write(printable("".join(traceback.format_exception(error)), keep="\n"))
    if isinstance(error, CommandLineError):
        if type(error).__name__ == "NoArgsIsHelpError":
            sys.stderr.write(f"{error}\n")
            return UsageError.exit_code
        known: T5g2Error = _usage_error(error)
    elif (stopped := interruption()) is not None and not isinstance(error, Interrupted):
        # A signal while a class is being built becomes another error, like RuntimeError; libraries do the same.
        if isinstance(error, OutputError | HubError):
            stopped.hint = str(error)
        known = stopped
    elif isinstance(error, T5g2Error):
        known = error
    elif isinstance(error, OSError):
        # Code that reads and writes checkpoints reports its own failures; this one comes from streams or the system.
        known = OutputError(f"the operating system reports: {error.strerror or error}", where=error.filename)
    else:
        known = T5g2Error(
            f"a bug in t5g2: {type(error).__name__}: {error}", hint="run again with --debug and report the output"
        )
    if as_json:
        document = {"code": known.exit_code, "message": known.message, "where": known.where, "hint": known.hint}
        with suppress(OSError):
            emit_json({"error": {**document, "details": list(known.details)}})
    with suppress(OSError):
        sys.stderr.write(_text(known) + "\n")
    return known.exit_code


def _usage_error(error: Any) -> UsageError:
    context = getattr(error, "ctx", None)
    hint = None if context is None else f"see {context.command_path} --help"
    # Newer versions of typer validate choices with pydantic, and show pydantic's prefix.
    message = error.format_message().replace("Value error, ", "")
    return UsageError(" ".join(message.split()), hint=hint)


def _text(error: T5g2Error) -> str:
    # Only errors in maps have several lines: the position in the file, with a caret.
    first = printable(f"t5g2: {error}", keep="\n" if isinstance(error, MappingError) else "")
    lines = [first, *(f"  {printable(detail)}" for detail in error.details[:SHOWN_DETAILS])]
    if len(error.details) > SHOWN_DETAILS:
        lines.append(f"  and {len(error.details) - SHOWN_DETAILS} more; --json lists all")
    return "\n".join(lines)


def _stop(number: int, frame: FrameType | None) -> NoReturn:
    """Let the work clean up after the first signal; a second signal ends the process at once."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Python complains about another signal that arrived with this one and lost its handler.
    sys.unraisablehook = lambda _: None
    note(number)
    raise Interrupted(number)
