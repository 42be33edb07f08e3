"""The signal that stops the work, remembered: libraries catch what its handler raises, and raise their own errors."""

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
