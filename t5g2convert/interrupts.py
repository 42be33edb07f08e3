"""Signals that stop the work: remembered, because libraries turn them into their own errors, and delayed if needed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from t5g2convert.errors import Interrupted

_came: Final[list[int]] = []


def note(number: int) -> None:
    """Remember a signal that stops the work."""
    _came.append(number)


def forget() -> None:
    """Forget all signals before other work starts."""
    _came.clear()


def interruption() -> Interrupted | None:
    """Return the error for the first signal; None if there was none."""
    return Interrupted(_came[0]) if _came else None


def raise_interruption() -> None:
    """Raise if there was a signal.

    Call this where a library's error is turned into ours: the signal may have caused it.

    Raises:
        Interrupted: There was a signal.
    """
    stopped = interruption()
    if stopped is not None:
        raise stopped from None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Delay SIGINT and SIGTERM until the block ends, so that a change on disk and its record stay together.

    Blocking the signals in this thread is not enough: another thread, of numpy or a progress bar, would receive them,
    and Python's handler would still run in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run only in the main thread
        return
    came: list[int] = []
    before = {
        number: signal.signal(number, lambda number, _: came.append(number))
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        if came:
            signal.raise_signal(came[0])
