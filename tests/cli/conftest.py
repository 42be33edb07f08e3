import signal
from collections.abc import Iterator

import pytest

from tests.cli.commandline import CommandLine


@pytest.fixture(autouse=True)
def restored_signals() -> Iterator[None]:
    """`Restore pytest's signal handlers, which `main` replaces."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.fixture
def t5g2(capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(capsys)
