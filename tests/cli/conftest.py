import signal
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def restored_signals() -> Iterator[None]:
    """`main` takes the process's handlers; give them back to pytest."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
