import pytest
import torch

from t5g2convert.adaptation.train.machine_failures import machine_error
from t5g2convert.errors import DataError, MachineError

CPU = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "7340032 bytes. Error code 12 (Cannot allocate memory)"
)
CUDA = "CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 79.11 GiB of which 1 MiB is free"


@pytest.mark.parametrize(
    ("error", "message", "options"),
    [
        (RuntimeError(CPU), "out of memory: 7340032 bytes could not be allocated", "--micro-tokens"),
        (torch.OutOfMemoryError(CUDA), "out of memory: 20.00 MiB could not be allocated", "--loss-chunk"),
        (MemoryError(), "out of memory", "--encoder-length"),
        (
            RuntimeError("DataLoader worker (pid 16868) is killed by signal: Killed. "),
            "a process of --workers was ended by a signal (Killed), probably because the machine's memory ran out",
            "reduce --workers",
        ),
        (
            RuntimeError("DataLoader worker (pid(s) 12, 13) exited unexpectedly"),
            "a process of --workers died, probably because the machine's memory ran out",
            "reduce --workers",
        ),
        (
            RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:553] Connection closed by peer [10.0.0.1]:9"),
            "another process of this run died, or cannot be reached",
            "its own output",
        ),
        (torch.distributed.DistBackendError("NCCL error"), "another process of this run died", "--resume"),
    ],
)
def test_a_machine_failure_is_one_line_with_a_next_step(error: BaseException, message: str, options: str) -> None:
    found = machine_error(error)
    assert found is not None
    assert found.exit_code == 8
    assert found.message.startswith(message)
    assert found.hint is not None
    assert options in found.hint
    assert "--resume" in found.hint


@pytest.mark.parametrize(
    "error", [RuntimeError("shapes do not match"), ValueError("x"), DataError("Broken pipe"), KeyboardInterrupt()]
)
def test_other_errors_are_not_machine_errors(error: BaseException) -> None:
    assert machine_error(error) is None


def test_a_machine_error_is_not_wrapped_again() -> None:
    error = MachineError("out of memory")
    assert machine_error(error) is error
