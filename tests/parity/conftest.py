"""What the mutants of a test were caught by is handed to the summary of the run (tests/conftest.py)."""

from collections.abc import Callable, Iterator

import pytest

from tests.parity.mutations import CLOSED


@pytest.fixture(autouse=True)
def counted(record_property: Callable[[str, object], None]) -> Iterator[None]:
    """Hand what a test tallied to the summary, from whichever worker runs it."""
    CLOSED.clear()
    yield
    for tally in CLOSED:
        record_property("mutants", {"tried": tally.tried, "survived": len(tally.survivors), **tally.caught})
