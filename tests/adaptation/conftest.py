import signal
from collections.abc import Iterator

import pytest

from tests.cli.commandline import CommandLine


@pytest.fixture
def t5g2(capsys: pytest.CaptureFixture[str]) -> Iterator[CommandLine]:
    """The command line, in this process, whose handlers of signals are given back."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield CommandLine(capsys)
    for number, handler in handlers.items():
        signal.signal(number, handler)
