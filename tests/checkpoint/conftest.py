import signal
from collections.abc import Iterator
from types import FrameType

import pytest


@pytest.fixture
def soon() -> Iterator[None]:
    """A test that waits for ten seconds has met a file that never answers."""

    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
