import os
import signal
import threading

import pytest

from t5g2convert.adaptation.train.signals import Wishes, signals_at_step_ends


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_waits_and_a_second_one_ends_the_process(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with signals_at_step_ends() as wishes:
        assert wishes == Wishes()
        os.kill(os.getpid(), number)
        assert wishes == Wishes(stop=number)
        assert signal.getsignal(signal.SIGTERM) == signal.getsignal(signal.SIGINT) == signal.SIG_DFL
    assert signal.getsignal(number) == before


def test_sigusr1_requests_a_checkpoint_each_time() -> None:
    with signals_at_step_ends() as wishes:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGUSR1)
            assert wishes == Wishes(save=True)
            wishes.save = False


def test_a_thread_leaves_signals_alone() -> None:
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def look() -> None:
        with signals_at_step_ends() as wishes:
            found.append((wishes, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert found == [(Wishes(), before)]
