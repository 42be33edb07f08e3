"""Everything that can go wrong, and the exit code that it gets.

::

    T5g2Error                 1   never raised itself
    ├── UsageError            2   the command was called wrongly
    ├── CheckpointError       3   the input checkpoint is damaged, incomplete or of another kind
    ├── MappingError          4   the weight map is wrong, or it does not describe this model
    ├── OutputError           5   the output folder or the disk
    ├── DataError             3   the training data is missing, damaged, or does not fit the model
    ├── VerificationError     6   a conversion does not compute what its source computes
    ├── HubError              7   the Hub: not found, not allowed, not reached
    └── Interrupted      130/143  SIGINT or SIGTERM

Library code raises these and nothing else on purpose; only `t5g2convert.cli` turns them into text and exit codes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5g2convert.printable import printable


class T5g2Error(Exception):
    """A failure that the user can understand and act on.

    Args:
        message: What was expected and what was found, in one line.
        where: The file, tensor or map position concerned.
        hint: What to do next.
        details: All offenders, a line each, where there are several.
    """

    exit_code = 1

    def __init__(
        self,
        message: str,
        *,
        where: str | Path | None = None,
        hint: str | None = None,
        details: Sequence[str] = (),
    ) -> None:
        super().__init__(message)
        self.message = message
        self.where = None if where is None else str(where)
        self.hint = hint
        self.details = tuple(details)

    def __reduce__(self) -> tuple[Any, ...]:
        # Other processes get it as it is: exceptions are pickled by their arguments, of which ours have more.
        return _restored, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        # A traceback shows it too: the only line ends are those of a map's error, in front of its line and its caret.
        reason, *excerpt = self.message.rsplit("\n  ", 2) if isinstance(self, MappingError) else [self.message]
        text = printable(reason if self.where is None else f"{self.where}: {reason}")
        text = "\n  ".join([text, *excerpt])
        return text if self.hint is None else f"{text} ({printable(self.hint)})"


class UsageError(T5g2Error):
    """The command or function was called wrongly."""

    exit_code = 2


class CheckpointError(T5g2Error):
    """The input checkpoint is damaged, incomplete, or not what the tool converts."""

    exit_code = 3


class MappingError(T5g2Error):
    """The weight map is wrong, or does not describe this model."""

    exit_code = 4


class OutputError(T5g2Error):
    """The output folder cannot be written."""

    exit_code = 5


class DataError(T5g2Error):
    """The training data is missing, damaged, or does not fit the model or the objective."""

    exit_code = 3


class VerificationError(T5g2Error):
    """A conversion was judged and found wrong; `details` has every check that failed."""

    exit_code = 6


class HubError(T5g2Error):
    """The Hub has no such model, does not give it out, or cannot be reached."""

    exit_code = 7


class Interrupted(T5g2Error):  # noqa: N818 - a signal is no error
    """A signal stopped the work; what was staged is removed on the way out, or kept to be taken up again."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number


def _restored(kind: type[T5g2Error], arguments: tuple[object, ...], fields: dict[str, object]) -> T5g2Error:
    """An error that was pickled."""
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(fields)
    return error
