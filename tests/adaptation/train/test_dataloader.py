import signal
from collections.abc import Iterator

import pytest
import torch
from torch.utils.data import Dataset

from t5g2convert.adaptation.train.dataloader import loader
from t5g2convert.adaptation.ul2.dataset import Batch, Place
from t5g2convert.errors import DataError, Interrupted

PLACES = [Place(step, (step,), (True,)) for step in range(3)]


class Made(Dataset[Batch]):
    """The number of a step, and whether its process minds SIGINT; step 1 cannot be made."""

    def __getitem__(self, place: Place) -> Batch:
        if place.step == 1:
            raise DataError("no such file", where="1.png", hint="look for it", details=["1.png"])
        ignored = signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        return {"step": torch.tensor([place.step]), "ignored": torch.tensor([ignored])}


class Stopped(Dataset[Batch]):
    def __getitem__(self, place: Place) -> Batch:
        raise Interrupted(signal.SIGTERM)


def at() -> Iterator[Place]:
    return iter(PLACES)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_made_is_an_error_in_its_place(workers: int) -> None:
    made = list(loader(Made(), at, workers=workers))
    assert [step for step, _ in made] == [0, 1, 2]
    error = made[1][1]
    assert isinstance(error, DataError)
    assert (str(error), error.details, error.exit_code) == ("1.png: no such file (look for it)", ("1.png",), 3)
    for step in (0, 2):
        batch = made[step][1]
        assert isinstance(batch, dict)
        assert batch["step"].item() == step
        # Ctrl-C goes to workers too, which leave it to this process.
        assert batch["ignored"].item() == (workers > 0)


def test_a_signal_is_no_error_of_a_sample() -> None:
    with pytest.raises(Interrupted):
        list(loader(Stopped(), at, workers=0))
