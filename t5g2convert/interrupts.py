"""The signal that stops the work: remembered, as libraries make errors of their own of it; and put off."""

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
    """Forget all signals: other work begins."""
    _came.clear()


def interruption() -> Interrupted | None:
    """Return the error for the first signal that came; None if none did."""
    return Interrupted(_came[0]) if _came else None


def raise_interruption() -> None:
    """Stop if a signal came, whatever was made of it.

    To be called where the error of a library is turned into one of ours: the signal may be what is behind it.

    Raises:
        Interrupted: A signal came.
    """
    stopped = interruption()
    if stopped is not None:
        raise stopped from None


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Put off SIGINT and SIGTERM: what the block does to the disk and what it notes of it belong together.

    A mask would not do: other threads, of numpy or of a progress bar, take the signal then, and Python's handler still
    runs in the main thread.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # handlers run in the main thread only
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
