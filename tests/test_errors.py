"""Errors as other processes get them."""

import pickle
import signal
from collections.abc import Iterator

import pytest

from t5g2convert.adaptation.train.distributed import ReportedElsewhere
from t5g2convert.errors import CheckpointError, Interrupted, T5g2Error


def kinds(base: type[T5g2Error]) -> Iterator[type[T5g2Error]]:
    for kind in base.__subclasses__():
        yield kind
        yield from kinds(kind)


@pytest.mark.parametrize(
    "error",
    [
        CheckpointError("is damaged", where="here", hint="copy it again", details=["one", "two"]),
        Interrupted(signal.SIGTERM),
        ReportedElsewhere(5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_error_comes_out_of_another_process_as_it_was(error: T5g2Error) -> None:
    """While writing a checkpoint, torch pickles errors to gather them from all processes."""
    found = pickle.loads(pickle.dumps(error))
    assert type(found) is type(error)
    assert str(found) == str(error)
    assert vars(found) == vars(error)


def test_every_kind_of_error_can_be_pickled() -> None:
    for kind in kinds(T5g2Error):
        error = kind.__new__(kind, "argument")
        T5g2Error.__init__(error, "is damaged", hint="copy it again")
        assert str(pickle.loads(pickle.dumps(error))) == "is damaged (copy it again)"
