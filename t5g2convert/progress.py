"""The types of callbacks with which long work shows its progress."""

from collections.abc import Callable

Progress = Callable[[int], None]
"""Called with the number of bytes, rows or documents just done."""

Steps = Callable[[str], None]
"""Called with a description of the step that starts."""


def silent(_: object) -> None:
    """Show no progress."""
