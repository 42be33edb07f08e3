import signal
from collections.abc import Iterator
from types import FrameType

import pytest


@pytest.fixture
def soon() -> Iterator[None]:
    """Fail a test after ten seconds: it is blocked on a file."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
