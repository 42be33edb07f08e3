"""Devices and processes: Lightning Fabric, and errors that all processes share."""

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import torch

from t5g2convert.adaptation.options import Hardware, RunOptions
from t5g2convert.errors import T5g2Error, UsageError

if TYPE_CHECKING:
    from lightning_fabric import Fabric

EXTRA: Final = ("lightning_fabric", "matplotlib", "tensorboard", "transformers")

_RANK_VARIABLES: Final = {"torchrun": "RANK", "slurm": "SLURM_PROCID", None: "LOCAL_RANK"}
"""Environment variable with the rank, by launcher; without a launcher Fabric starts the processes."""

SRUN: Final = "start it with srun --ntasks-per-node DEVICES, also in a script for sbatch"

Result = TypeVar("Result")


class ReportedElsewhere(T5g2Error):  # noqa: N818 - the error belongs to another process
    """Raised on the ranks that do not report an error of another rank; carries its exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("reported by rank 0")
        self.exit_code = exit_code


def require_extra(*more: str) -> None:
    """Refuse to start if a library of the `adapt` extra is missing: one of every run, or one of `more`.

    Raises:
        UsageError: A library is not installed.
    """
    absent = [name for name in (*EXTRA, *more) if find_spec(name) is None]
    if absent:
        raise UsageError(
            f"training needs {', '.join(absent)}: pip install '.[adapt]' in the folder of t5g2convert's source"
        )


def early_rank() -> int:
    """Return the rank of this process from its launcher's environment, before the process group exists."""
    # Only the launcher's own variable: a SLURM shell has SLURM_PROCID too, whatever is started in it by hand.
    rank = os.environ.get(_RANK_VARIABLES[early_launcher()], "")
    return int(rank) if rank.isdigit() else 0


def launched_processes() -> int | None:
    """Return how many processes torchrun or SLURM started; None if this one was started by hand."""
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        if os.environ.get(name, "").isdigit() and early_launcher() is not None:
            return int(os.environ[name])
    return None


def early_launcher() -> Literal["torchrun", "slurm"] | None:
    """Return the launcher of this process; None if it was started by hand."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return "slurm"
    return None


def build_engine(hardware: Hardware) -> "Fabric":
    """Create Fabric, without launching it.

    Raises:
        UsageError: The devices are not available, or --shard-size does not divide their number.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    accelerator, devices, nodes = resolve(hardware)
    check_shard_size(hardware, devices * nodes)
    strategy = ModelParallelStrategy(
        # The module is sharded before: Fabric would replace its buffers, and has no groups that each hold the model.
        lambda module, _: module,
        data_parallel_size=devices * nodes,
        tensor_parallel_size=1,
        timeout=timedelta(seconds=hardware.timeout),
    )
    # Weights stay float32; FSDP2's policy sets the dtype of the computation.
    return Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=strategy, precision="32-true")


def check_shard_size(hardware: Hardware, processes: int) -> None:
    """Refuse groups that do not have all processes.

    Raises:
        UsageError: --shard-size does not divide the number of processes.
    """
    if hardware.shard_size is not None and processes % hardware.shard_size:
        raise UsageError(f"--shard-size {hardware.shard_size} does not divide the number of processes, {processes}")


def planned_processes(hardware: Hardware) -> int:
    """Return the number of processes that the options ask for, before any of them is started.

    Raises:
        UsageError: --shard-size does not divide it.
    """
    processes = (hardware.devices or 1) * (hardware.nodes or 1)
    check_shard_size(hardware, processes)
    return processes


def check_attention(options: RunOptions) -> None:
    """Refuse attention by blocks on the CPU.

    Raises:
        UsageError: It is requested there, or the devices are not available.
    """
    if options.attention == "blocks" and resolve(options)[0] == "cpu":
        raise UsageError(
            "attention by blocks needs a GPU: on the CPU, torch has no backward pass for it",
            hint="pass --attention dense",
        )


def resolve(hardware: Hardware) -> tuple[str, int, int]:
    """Return the accelerator, the devices per machine, and the number of machines.

    Raises:
        UsageError: The devices are not available, or torchrun or SLURM started another number of processes.
    """
    cuda = torch.cuda.device_count()
    accelerator = ("cuda" if cuda else "cpu") if hardware.accelerator == "auto" else hardware.accelerator
    local, total = _started()
    devices = hardware.devices or local or 1
    nodes = hardware.nodes or (1 if total is None else max(1, total // devices))
    if total is not None and devices * nodes != total:
        raise UsageError(
            f"{early_launcher()} started {total} process(es), but --devices {devices} and --nodes {nodes} need "
            f"{devices * nodes}",
            hint=SRUN if early_launcher() == "slurm" else "omit --devices and --nodes, or make them match",
        )
    if accelerator == "cuda":
        _check_visible(cuda, devices, by_slurm=early_launcher() == "slurm", named=hardware.devices is not None)
    return accelerator, devices, nodes


def _check_visible(visible: int, devices: int, *, by_slurm: bool, named: bool) -> None:
    """Refuse more processes than CUDA devices that they can see, and a SLURM script that would use one of several.

    Raises:
        UsageError: Either.
    """
    if by_slurm and devices > visible:
        raise UsageError(
            f"{devices} processes run on this machine, but each sees {visible} CUDA device(s): all must see all",
            hint="ask SLURM for gpus-per-node instead of gpus-per-task",
        )
    if devices > visible:
        raise UsageError(f"--devices is {devices}, but this machine has {visible} CUDA device(s)")
    if by_slurm and not named and devices == 1 < visible:
        raise UsageError(f"slurm started 1 process, but it sees {visible} CUDA devices", hint=f"{SRUN}, or --devices 1")


def _started() -> tuple[int | None, int | None]:
    """Return the number of processes on this machine and in total that torchrun or SLURM started."""
    total = launched_processes()
    if total is None:
        return None, None
    if early_launcher() == "torchrun":
        return int(os.environ["LOCAL_WORLD_SIZE"]), total
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    return max(1, total // nodes), total


def run_on_all_ranks(engine: "Fabric", work: Callable[[], Result]) -> Result:
    """Run work on every rank, and raise on every rank if it fails on one.

    Raises:
        T5g2Error: On rank 0, the error of the lowest rank that failed; `ReportedElsewhere` on the others.
    """
    error: T5g2Error | None = None
    result: Any = None
    try:
        result = work()
    except T5g2Error as raised:
        error = raised
    raise_first_error(engine, error)
    return result


def raise_first_error(engine: "Fabric", error: T5g2Error | None) -> None:
    """Share errors between ranks, and raise the first.

    Raises:
        T5g2Error: As in `run_on_all_ranks`.
    """
    first = first_error(engine, error)
    if first is not None:
        raise first if engine.global_rank == 0 else ReportedElsewhere(first.exit_code)


def first_error(engine: "Fabric", error: T5g2Error | None) -> T5g2Error | None:
    """Return the error of the lowest rank that has one, on all ranks."""
    if engine.world_size == 1:
        return error
    # One number first; the errors themselves only if there is one.
    any_error = torch.tensor(float(error is not None), device=engine.device)
    torch.distributed.all_reduce(any_error, torch.distributed.ReduceOp.MAX)
    if not any_error.item():
        return None
    errors: list[Any] = [None] * engine.world_size
    own = None if error is None else (error.message, error.where, error.hint, error.details, error.exit_code)
    torch.distributed.all_gather_object(errors, own)
    found = next((each for each in errors if each is not None), None)
    if found is None:
        return None
    message, where, hint, details, code = found
    shared = T5g2Error(message, where=where, hint=hint, details=details)
    shared.exit_code = code
    return shared


def end_children(engine: "Fabric") -> None:
    """Kill the processes that Fabric started: they would wait for this one forever.

    Their state is in checkpoints or lost, so they need no clean exit.
    """
    started: list[Any] = getattr(engine.strategy.launcher, "procs", [])
    children = list(started)
    # Fabric watches this list, and would kill this process when one in the list ends.
    started.clear()
    for child in children:
        child.kill()
    for child in children:
        child.wait()
