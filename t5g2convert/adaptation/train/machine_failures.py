"""Failures of the machine during training, as errors with a next step: memory that ran out, processes that died."""

import re
from typing import Final

import torch

from t5g2convert.errors import MachineError

RESUME: Final = "the same command with --resume continues from the last checkpoint"
SAVING_MEMORY: Final = "--micro-tokens, --loss-chunk, --encoder-length, --decoder-length, or more --devices"

_OUT_OF_MEMORY: Final = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory", re.IGNORECASE)
_ALLOCATION: Final = re.compile(r"tried to allocate ([\d.,]+ \w+)", re.IGNORECASE)
_WORKER: Final = re.compile(r"DataLoader worker \(pid.*?\) (?:is killed by signal: (\w+)|exited unexpectedly)")
_PEER: Final = re.compile(r"closed by peer|reset by peer|Broken pipe|\bgloo\b|\bNCCL\b|Timed out|timed out waiting")


def machine_error(error: BaseException) -> MachineError | None:
    """Return the error of a machine that failed; None for other errors.

    Args:
        error: An error that torch raised: most of its errors are RuntimeError and differ only in their text.
    """
    if isinstance(error, MachineError):
        return error
    if not isinstance(error, RuntimeError | MemoryError):
        return None
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or _OUT_OF_MEMORY.search(text):
        found = _ALLOCATION.search(text)
        needed = f": {found[1]} could not be allocated" if found else ""
        return MachineError(f"out of memory{needed}", hint=f"reduce {SAVING_MEMORY}; {RESUME}")
    if found := _WORKER.search(text):
        how = "died" if found[1] is None else f"was ended by a signal ({found[1]})"
        return MachineError(
            f"a process of --workers {how}, probably because the machine's memory ran out",
            hint=f"reduce --workers; {RESUME}",
        )
    if isinstance(error, torch.distributed.DistError) or _PEER.search(text):
        return MachineError(
            "another process of this run died, or cannot be reached", hint=f"its own output names the reason; {RESUME}"
        )
    return None
