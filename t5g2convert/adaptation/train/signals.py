"""Signals during training: the current step is finished and a checkpoint written before the run ends.

SIGTERM and SIGINT end the run that way; SIGUSR1, which SLURM can send before its own SIGTERM, only writes a checkpoint.
A second SIGTERM or SIGINT ends the process at once.
"""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass


@dataclass
class Wishes:
    """The requests of the signals that this process has received.

    Attributes:
        stop: Number of the signal that ends the run after the current step; 0 for none.
        save: Whether to write a checkpoint after the current step.
    """

    stop: int = 0
    save: bool = False


@contextmanager
def signals_at_step_ends() -> Iterator[Wishes]:
    """Collect signals instead of acting on them, until the block ends; only in the main thread."""
    wishes = Wishes()

    def stop(number: int, _: object) -> None:
        wishes.stop = number
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def save(_: int, __: object) -> None:
        wishes.save = True

    if threading.current_thread() is not threading.main_thread():
        yield wishes
        return
    handlers = {signal.SIGTERM: stop, signal.SIGINT: stop, signal.SIGUSR1: save}
    before = {number: signal.signal(number, handler) for number, handler in handlers.items()}
    try:
        yield wishes
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
