"""SIGKILL at a chosen call of a function, in a forked process."""

import os
import signal
from collections.abc import Callable
from typing import Any


def killed_at(owner: Any, name: str, number: int, work: Callable[[], object]) -> bool:
    """Do the work in a forked process, with SIGKILL before call `number` of a function; return if it died.

    Any other failure of the work ends the process too, and fails the test.
    """
    child = os.fork()
    if not child:
        original, calls = getattr(owner, name), 0

        def counted(*arguments: object, **options: object) -> object:
            nonlocal calls
            calls += 1
            if calls == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(*arguments, **options)

        setattr(owner, name, counted)
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    _, status = os.waitpid(child, 0)
    assert status == 0 or os.WIFSIGNALED(status), "the work failed before it could be killed"
    return os.WIFSIGNALED(status)
