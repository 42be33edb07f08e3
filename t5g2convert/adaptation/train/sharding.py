"""Sharding: a model is built without values, divided among the processes, and each process reads only its part.

FSDP2 divides each layer of each stack separately, and the rest, mainly the embedding, as the root. With `--shard-size`
the processes form groups that each hold the whole model (HSDP): values are gathered inside a group, and only gradients
travel between groups. Fabric's strategy knows one group of all processes, so the mesh is made here.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from t5g2convert.adaptation.train.host_memory import free_memory

if TYPE_CHECKING:
    from lightning_fabric import Fabric

READ_ELEMENTS: Final = 1 << 24
"""Values read at once; at least one row."""

GRADIENT_SHARE: Final = 4
"""With `--reduce auto`, the whole gradient takes at most one in so many bytes of a device's memory."""


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Within the block, parameters of new modules have shapes but no memory; buffers are computed as usual.

    Buffers, such as RoPE's frequencies and the scale of embeddings, are not on disk, so they must be computed.
    """
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def shard(engine: "Fabric", module: nn.Module, *, precision: str, shard_size: int | None) -> None:
    """Divide a module's parameters among the processes, in place.

    Args:
        engine: Fabric, launched.
        module: The module, on the meta device.
        precision: Dtype of the computation; weights and the sum of gradients are float32.
        shard_size: Processes that share a copy of the model; it divides their number. None for all processes.
    """
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if precision == "bfloat16" else torch.float32, reduce_dtype=torch.float32
    )
    mesh = _mesh(engine, shard_size)
    layers = [part for part in module.modules() if isinstance(part, nn.ModuleList)]
    for layer in (layer for part in layers for layer in part):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)


def _mesh(engine: "Fabric", shard_size: int | None) -> DeviceMesh:
    world, kind = engine.world_size, engine.device.type
    if shard_size is None or shard_size == world:
        return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    return init_device_mesh(kind, (world // shard_size, shard_size), mesh_dim_names=("replicate", "shard"))


def reduces_once(engine: "Fabric", choice: Literal["auto", "step", "pass"], trained: int) -> bool:
    """Return whether gradients are summed over processes once a step, the same on all processes.

    Args:
        engine: Fabric, launched.
        choice: `--reduce`.
        trained: Number of trained parameters.
    """
    if choice != "auto":
        return choice == "step"
    if engine.device.type == "cuda":
        memory = torch.cuda.mem_get_info(engine.device)[1]
    else:
        # Processes on other machines are counted too, which is on the safe side.
        memory = (free_memory() or 0) // engine.world_size
    fits: bool = engine.broadcast(gradient_fits(trained, memory))
    return fits


def gradient_fits(trained: int, memory: float) -> bool:
    """Return whether the whole gradient, float32, takes at most one byte in `GRADIENT_SHARE` of a device's memory."""
    return GRADIENT_SHARE * trained * torch.float32.itemsize <= memory


def trained_parts(module: nn.Module) -> tuple[FSDPModule, ...]:
    """Return the sharded parts of a module that have trained parameters; the first is the root."""
    parts = [part for part in module.modules() if isinstance(part, FSDPModule)]
    return tuple(part for part in parts if any(each.requires_grad for each in part.parameters()))


def before_pass(parts: Sequence[FSDPModule], *, is_last: bool, sums: bool) -> None:
    """Choose what the next backward pass does with gradients, and with the values of the root.

    Args:
        parts: From `trained_parts`: in frozen parts torch expects values that a pass without images never gathers.
        is_last: Whether it is the last of its step. The values of the root, mainly the embedding, stay gathered until
            then: the next pass begins and ends with them.
        sums: Whether it sums gradients over processes, or adds them to those of this process.
    """
    for part in parts:
        part.set_requires_gradient_sync(sums, recurse=False)
    parts[0].set_reshard_after_backward(is_last, recurse=False)


class Rows(Protocol):
    """Tensors that are read by rows, for example those of a checkpoint (`Weights`)."""

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of a tensor."""


def load_values(module: nn.Module, names: Mapping[str, str], weights: Rows, device: torch.device) -> None:
    """Give a sharded module on the meta device its values: each process reads only the rows that it holds.

    Args:
        module: The module; its parameters are replaced.
        names: The name of each parameter's tensor; tied parameters appear once, under their first name.
        weights: The checkpoint, or other values.
        device: The device of the parameters.

    Raises:
        CheckpointError: A file cannot be read.
    """
    values: dict[int, nn.Parameter] = {}
    state: dict[str, nn.Parameter] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        if id(parameter) not in values:
            held = _read(names[name], parameter, weights, device)
            values[id(parameter)] = nn.Parameter(held, parameter.requires_grad)
        state[name] = values[id(parameter)]
    # Buffers are not in the state.
    module.load_state_dict(state, strict=False, assign=True)


def _read(name: str, parameter: nn.Parameter, weights: Rows, device: torch.device) -> Tensor:
    """Return a parameter's values; of a DTensor, the rows that this process holds."""
    held = torch.empty_like(parameter, device=device, requires_grad=False)
    local, first = held, 0
    if isinstance(held, DTensor):
        chunks: Any = held.__create_chunk_list__()  # type: ignore[no-untyped-call]
        local, first = held.to_local(), chunks[0].offsets[0]
    step = max(1, READ_ELEMENTS // max(1, local[:1].numel()))
    for start in range(0, len(local), step):
        piece = local[start : start + step]
        piece.copy_(weights.rows(name, first + start, first + start + len(piece)))
    return held
