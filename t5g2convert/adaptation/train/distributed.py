"""The engine: Lightning Fabric with its ModelParallelStrategy, and where FSDP2 cuts a model."""

import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, Final, Literal, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from t5g2convert.errors import T5g2Error, UsageError

if TYPE_CHECKING:
    from lightning_fabric import Fabric
    from torch.distributed.device_mesh import DeviceMesh

EXTRA: Final = ("lightning_fabric", "matplotlib", "tensorboard", "transformers")

Precision = Literal["bfloat16", "float32"]

_RANK_VARIABLES: Final = {"torchrun": "RANK", "slurm": "SLURM_PROCID", None: "LOCAL_RANK"}
"""Where torchrun, SLURM and, with neither, Fabric say which process this is, before there is a process group."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a run runs on; the result does not depend on it but for rounding.

    Attributes:
        accelerator: `cpu`, `cuda`, or `auto`: cuda where there is any.
        devices: Processes on each machine, one for each device; None for what torchrun or SLURM started, else 1.
        nodes: Machines; None for what torchrun or SLURM started, else 1.
        timeout: Seconds that a process waits for the others.
    """

    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    devices: int | None = None
    nodes: int | None = None
    timeout: float = 1800.0


class ReportedElsewhere(T5g2Error):  # noqa: N818 - the error is that of another process
    """Another process tells of the error; this one ends with its exit code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__("another process tells why")
        self.exit_code = exit_code


def require_extra() -> None:
    """Refuse to start without the libraries of the extra.

    Raises:
        UsageError: One is not installed.
    """
    absent = [name for name in EXTRA if find_spec(name) is None]
    if absent:
        raise UsageError(f"training needs {', '.join(absent)}: pip install 't5g2convert[adapt]'")


def early_rank() -> int:
    """The number of this process as its launcher says, before there is a process group."""
    # Only the launcher's own: a shell of SLURM has SLURM_PROCID too, for whatever is started in it by hand.
    told = os.environ.get(_RANK_VARIABLES[early_launcher()], "")
    return int(told) if told.isdigit() else 0


def launched_processes() -> int | None:
    """Processes that torchrun or SLURM started; None where this one was started by hand."""
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        if os.environ.get(name, "").isdigit() and early_launcher() is not None:
            return int(os.environ[name])
    return None


def early_launcher() -> Literal["torchrun", "slurm"] | None:
    """`torchrun` or `slurm` where one of them started this process."""
    if "TORCHELASTIC_RUN_ID" in os.environ:
        return "torchrun"
    if "SLURM_NTASKS" in os.environ and os.environ.get("SLURM_JOB_NAME") not in ("bash", "interactive"):
        return "slurm"
    return None


def build_engine(machines: Hardware, precision: Precision) -> "Fabric":
    """Fabric, not yet launched.

    Raises:
        UsageError: The devices are not there.
    """
    from lightning_fabric import Fabric
    from lightning_fabric.strategies.model_parallel import ModelParallelStrategy

    logging.getLogger("lightning_fabric").setLevel(logging.WARNING)
    accelerator, devices, nodes = resolve(machines)
    strategy = ModelParallelStrategy(
        _sharding(precision),
        data_parallel_size=devices * nodes,
        tensor_parallel_size=1,
        timeout=timedelta(seconds=machines.timeout),
    )
    # Master weights stay float32; FSDP2's own policy computes in bfloat16.
    return Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=strategy, precision="32-true")


def resolve(machines: Hardware) -> tuple[str, int, int]:
    """The accelerator, the devices of each machine, and the machines.

    Raises:
        UsageError: The devices are not there, or torchrun or SLURM started another number.
    """
    cuda = torch.cuda.device_count()
    accelerator = ("cuda" if cuda else "cpu") if machines.accelerator == "auto" else machines.accelerator
    local, total = _started()
    devices = machines.devices or local or 1
    nodes = machines.nodes or (1 if total is None else max(1, total // devices))
    if total is not None and devices * nodes != total:
        raise UsageError(
            f"{early_launcher()} started {total} processes, expected {devices * nodes}: --devices {devices} on each of "
            f"--nodes {nodes}",
            hint="leave out --devices and --nodes, or let them say the same",
        )
    if accelerator == "cuda" and devices > cuda:
        raise UsageError(f"--devices {devices} were asked for, this machine has {cuda} CUDA device(s)")
    return accelerator, devices, nodes


def _started() -> tuple[int | None, int | None]:
    """Processes on this machine and in all, that torchrun or SLURM started."""
    total = launched_processes()
    if total is None:
        return None, None
    if early_launcher() == "torchrun":
        return int(os.environ["LOCAL_WORLD_SIZE"]), total
    nodes = int(os.environ.get("SLURM_NNODES", "1"))
    return max(1, total // nodes), total


def _sharding(precision: Precision) -> "Callable[[nn.Module, DeviceMesh], nn.Module]":
    """Every layer of every stack is gathered by itself; the rest, the embedding table above all, with the root."""
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32, reduce_dtype=torch.float32
    )

    def shard(module: nn.Module, mesh: "DeviceMesh") -> nn.Module:
        mesh = mesh["data_parallel"]
        layers = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
        for layer in (layer for part in layers for layer in part):
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        fully_shard(module, mesh=mesh, mp_policy=policy)
        return module

    return shard


def run_on_all_ranks(engine: "Fabric", work: Callable[[], Result]) -> Result:
    """Do what every process must do without an error, or end all of them with the first one's exit code.

    Raises:
        T5g2Error: On the first process, the error of the first that had one; `ReportedElsewhere` on the others.
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
    """Tell the other processes of an error, or that there is none, and hear of theirs.

    Raises:
        T5g2Error: As `run_on_all_ranks`.
    """
    first = first_error(engine, error)
    if first is not None:
        raise first if engine.global_rank == 0 else ReportedElsewhere(first.exit_code)


def first_error(engine: "Fabric", error: T5g2Error | None) -> T5g2Error | None:
    """The error of the first process that has one, on all processes."""
    if engine.world_size == 1:
        return error
    # One number, and only where it says so all that there is to tell.
    any_error = torch.tensor(float(error is not None), device=engine.device)
    torch.distributed.all_reduce(any_error, torch.distributed.ReduceOp.MAX)
    if not any_error.item():
        return None
    errors: list[Any] = [None] * engine.world_size
    told = None if error is None else (error.message, error.where, error.hint, error.details, error.exit_code)
    torch.distributed.all_gather_object(errors, told)
    found = next((each for each in errors if each is not None), None)
    if found is None:
        return None
    message, where, hint, details, code = found
    shared = T5g2Error(message, where=where, hint=hint, details=details)
    shared.exit_code = code
    return shared


def end_children(engine: "Fabric") -> None:
    """End the processes that Fabric started for this one: they wait for it, and would wait for ever.

    What they hold is in checkpoints or lost, so they are not asked.
    """
    started: list[Any] = getattr(engine.strategy.launcher, "procs", [])
    children = list(started)
    # Fabric looks at this list, and kills the first process as well when it finds one in it that has ended.
    started.clear()
    for child in children:
        child.kill()
    for child in children:
        child.wait()
