"""The exceptions of this package, and their exit codes.

::

    T5g2Error                 1   never raised itself
    ├── UsageError            2   wrong usage of a command or function
    ├── CheckpointError       3   the input checkpoint is damaged, incomplete or not supported
    ├── MappingError          4   the weight map is wrong, or does not fit this model
    ├── OutputError           5   the output folder or the disk cannot be written
    ├── DataError             3   the training data is missing, damaged, or does not fit the model
    ├── VerificationError     6   a conversion does not compute what its source computes
    ├── HubError              7   the Hub: not found, not allowed, not reachable
    ├── MachineError          8   training ran out of memory, or training or packing lost a process
    └── Interrupted      130/143  SIGINT or SIGTERM

Library code deliberately raises only these; only `t5g2convert.cli` turns them into text and exit codes.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from t5g2convert.printable import printable


class T5g2Error(Exception):
    """A failure that a user can understand and fix.

    Args:
        message: The expected and the found value, in one line.
        where: The file, tensor or position in a map.
        hint: The next step for the user.
        details: All problems, one per line, if there are several.

    Example:
        >>> str(CheckpointError("is missing", where="model.safetensors", hint="download again"))
        'model.safetensors: is missing (download again)'
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
        # Exceptions are pickled only by their arguments, but other processes need the other fields too.
        return _restored, (type(self), self.args, self.__dict__)

    def __str__(self) -> str:
        # Tracebacks show this text too. Only errors in maps have line ends, before the excerpt and the caret.
        reason, *excerpt = self.message.rsplit("\n  ", 2) if isinstance(self, MappingError) else [self.message]
        text = printable(reason if self.where is None else f"{self.where}: {reason}")
        text = "\n  ".join([text, *excerpt])
        return text if self.hint is None else f"{text} ({printable(self.hint)})"


class UsageError(T5g2Error):
    """A command or function was used wrongly."""

    exit_code = 2


class CheckpointError(T5g2Error):
    """The input checkpoint is damaged, incomplete, or not supported."""

    exit_code = 3


class MappingError(T5g2Error):
    """The weight map is wrong, or does not fit this model."""

    exit_code = 4


class OutputError(T5g2Error):
    """The output folder cannot be written."""

    exit_code = 5


class DataError(T5g2Error):
    """The training data is missing, damaged, or does not fit the model or the objective."""

    exit_code = 3


class VerificationError(T5g2Error):
    """A conversion failed its verification; `details` lists every failed check."""

    exit_code = 6


class HubError(T5g2Error):
    """The model does not exist, access is denied, or the Hub cannot be reached."""

    exit_code = 7


class MachineError(T5g2Error):
    """Training ran out of memory, or a process of training or packing died; training can be resumed."""

    exit_code = 8


class Interrupted(T5g2Error):  # noqa: N818 - a signal is not an error
    """A signal stopped the work; staged files are removed, or kept for `--resume`."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number


def _restored(kind: type[T5g2Error], arguments: tuple[object, ...], fields: dict[str, object]) -> T5g2Error:
    """Return an unpickled error."""
    error = kind.__new__(kind, *arguments)
    error.__dict__.update(fields)
    return error
