"""Robust stdout and stderr: they may be closed, on a full disk, or without a reader.

Closed descriptors 0 to 2 are opened on the null device, so that no other file gets their numbers. stderr never raises.
stdout raises until `keep_working` is called, because the work matters more than its printed result.
"""

import errno
import io
import os
import sys
from typing import Any, BinaryIO, Final, TextIO, cast

_NAMES: Final = ("stdin", "stdout", "stderr")


class _Stream(io.FileIO):
    """A descriptor that remembers its first failed write.

    Attributes:
        survives: Whether to drop output that cannot be written instead of raising an error.
        lost: The first error; None if there was none.
    """

    survives: bool
    lost: OSError | None = None

    def write(self, data: Any, /) -> int:
        """Write like `FileIO`."""
        size = memoryview(data).nbytes
        if self.lost is not None and self.survives:
            return size
        try:
            return super().write(data)
        except OSError as error:
            self.lost = self.lost or error
            if self.survives:
                return size
            raise


_raw: Final[dict[str, _Stream]] = {}
"""The prepared streams, by their names in `sys`."""


def prepare_streams() -> None:
    """Open closed standard descriptors, and replace the streams in `sys`.

    Call this before any other file is opened. Streams that other code has put into `sys` are left alone.
    """
    _raw.clear()
    for number, name in enumerate(_NAMES):
        descriptor = _opened(number, taken=getattr(sys, name) is None)
        if number:
            _prepare(name, descriptor)
        elif sys.stdin is None:
            sys.stdin = open(descriptor, encoding="utf-8", closefd=False)  # noqa: SIM115 - as long as the process


def _opened(number: int, *, taken: bool) -> int:
    """Return the descriptor of a standard stream, opened on the null device if it was closed.

    Args:
        number: The stream's descriptor.
        taken: Whether that descriptor, if it is open, belongs to another file.
    """
    try:
        os.fstat(number)
    except OSError:
        null = os.open(os.devnull, os.O_RDWR)
        if null == number:
            os.set_inheritable(null, True)
        else:
            os.dup2(null, number)
            os.close(null)
        return number
    return os.open(os.devnull, os.O_RDWR) if taken else number


def _prepare(name: str, descriptor: int) -> None:
    found: TextIO | None = getattr(sys, name)
    if found is not None and (found is not getattr(sys, f"__{name}__") or not isinstance(found, io.TextIOWrapper)):
        if isinstance(found, io.TextIOWrapper):
            found.reconfigure(errors="replace")
        return
    if found is not None:
        found.flush()
    raw = _Stream(descriptor, "wb", closefd=False)
    raw.name = f"<{name}>"
    raw.survives = name == "stderr"
    unbuffered = found is not None and found.write_through
    stream = io.TextIOWrapper(
        # As Python itself does with -u.
        cast(BinaryIO, raw) if unbuffered else io.BufferedWriter(raw),
        encoding="utf-8" if found is None else found.encoding,
        errors="replace",
        line_buffering=found is not None and found.line_buffering,
        write_through=unbuffered,
    )
    _raw[name] = raw
    setattr(sys, name, stream)


def keep_working() -> None:
    """Ignore failures of stdout from now on: the exit code then reports the work."""
    if "stdout" in _raw:
        _raw["stdout"].survives = True


def reader_left() -> bool:
    """Return whether the reader of stdout has left."""
    lost = _raw["stdout"].lost if "stdout" in _raw else None
    return lost is not None and lost.errno == errno.EPIPE


def finish_streams() -> OSError | None:
    """Flush both streams, so that Python's own flush on exit cannot fail; return the first error of stdout.

    A reader that has left is not an error.
    """
    failed: OSError | None = None
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            failed = failed or (error if stream is sys.stdout else None)
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if "stdout" in _raw:
        failed = _raw["stdout"].lost or failed
    return None if isinstance(failed, BrokenPipeError) else failed
