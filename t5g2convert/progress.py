"""Functions that long work calls to show its progress."""

from collections.abc import Callable

Progress = Callable[[int], None]
"""Called with the number of bytes, rows or documents that were just done."""

Steps = Callable[[str], None]
"""Called with what is being done from now on."""


def silent(_: object) -> None:
    """Show no progress."""
