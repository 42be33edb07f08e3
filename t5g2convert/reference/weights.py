"""Tensors of a checkpoint, read when they are needed and freed when they are no longer referenced.

Files are read, not memory-mapped: mapped pages would count as this process's memory until the kernel reclaims them, and
a file that shrinks would kill the process. Every tensor starts at memory aligned by torch, so that a kernel cannot
choose another order of additions for one model than for the other.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Final, TypedDict, TypeVar, Unpack, cast

import torch
from torch import Tensor, nn

from t5g2convert.checkpoint.folder import Checkpoint, StoredTensor
from t5g2convert.checkpoint.header import BY_CONFIG_NAME
from t5g2convert.errors import CheckpointError, UsageError

DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
"""torch dtype by safetensors dtype, for the dtypes that a model can run in."""


def check_device(dtype: str | None, device: str) -> None:
    """Refuse a dtype that models cannot run in, and a device that is not available.

    Raises:
        UsageError: The dtype or the device is refused.
    """
    if dtype is not None and dtype not in BY_CONFIG_NAME:
        raise UsageError(f"unknown dtype {dtype!r}", hint=f"expected {', '.join(BY_CONFIG_NAME)}")
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"the device {device!r} cannot be used: {str(error).splitlines()[0]}") from None


Module = TypeVar("Module", bound=nn.Module)


class ReadOptions(TypedDict, total=False):
    """Options for reading tensors.

    Attributes:
        dtype: The dtype that every tensor is cast to (default: its own).
        device: The device of the tensors (default: the CPU).
        resident: Keep tensors in memory, for a model that runs many times; otherwise they are read for each use.
        rounded_to: A dtype that every tensor is cast to before `dtype`, to round a model as a conversion did.
    """

    dtype: torch.dtype | None
    device: torch.device | str
    resident: bool
    rounded_to: torch.dtype | None


class Weights:
    """The tensors of one checkpoint, in one dtype, on one device."""

    def __init__(self, checkpoint: Checkpoint, **reading: Unpack[ReadOptions]) -> None:
        self.checkpoint = checkpoint
        self.dtype = reading.get("dtype")
        self.device = torch.device(reading.get("device", "cpu"))
        self.resident = reading.get("resident", False)
        self.rounded_to = reading.get("rounded_to")
        self._tensors: dict[str, Tensor] = {}
        self._modules: dict[str, nn.Module] = {}

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor, from the header."""
        return self._stored(name).entry.shape

    def tensor(self, name: str) -> Tensor:
        """Return a whole tensor.

        Raises:
            CheckpointError: The tensor does not exist, does not have a floating dtype, or its file has become shorter.
        """
        if name in self._tensors:
            return self._tensors[name]
        stored = self._stored(name)
        tensor = self._read(stored, 0, stored.entry.nbytes).view(stored.entry.shape)
        if self.resident:
            self._tensors[name] = tensor
        return tensor

    def like(self, name: str, value: float) -> Tensor:
        """Return one value in the shape of a tensor, rounded to float32 and then to the dtype that was converted to."""
        stored = self._stored(name)
        return self._cast(torch.full(stored.entry.shape, value).to(self.rounded_to or DTYPES[stored.entry.dtype]))

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows `start` to `stop` of a table, [stop - start, width].

        Raises:
            CheckpointError: The table has fewer rows.
        """
        if self.resident:
            return self.tensor(name)[start:stop]
        stored = self._stored(name)
        if not 0 <= start <= stop <= stored.entry.shape[0]:
            raise CheckpointError(
                f"tensor {name!r} has {stored.entry.shape[0]} rows, expected at least {stop}",
                where=self.checkpoint.path,
            )
        width = stored.entry.nbytes // stored.entry.shape[0]
        return self._read(stored, start * width, stop * width).view(stop - start, *stored.entry.shape[1:])

    def pieces(self, name: str, elements: int) -> Iterator[Tensor]:
        """Yield a tensor in flat pieces of at most `elements` elements, to bound the memory."""
        stored = self._stored(name)
        step = elements * DTYPES[stored.entry.dtype].itemsize
        for start in range(0, stored.entry.nbytes, step):
            yield self._read(stored, start, min(start + step, stored.entry.nbytes))

    def gather(self, name: str, ids: Tensor) -> Tensor:
        """Return rows of a table by number, [*ids.shape, width]; each distinct row is read once.

        Raises:
            IndexError: The table does not have a row.
        """
        if self.resident:
            return self.tensor(name)[ids]
        distinct, inverse = torch.unique(ids, return_inverse=True)
        if not 0 <= int(distinct[0]) <= int(distinct[-1]) < self.shape(name)[0]:
            raise IndexError(f"ids from {distinct[0]} to {distinct[-1]} in a table of {self.shape(name)[0]} rows")
        rows = [self.rows(name, number, number + 1) for number in distinct.tolist()]
        return torch.cat(rows)[inverse]

    def module(self, make: Callable[[], Module], prefix: str) -> Module:
        """Return a module with each parameter read from the tensor of the same name after `prefix`.

        Raises:
            CheckpointError: A tensor is missing or has another shape than the module's parameter.
        """
        if prefix in self._modules:
            return cast(Module, self._modules[prefix])
        with torch.device("meta"):
            module = make()
        for name, parameter in list(module.named_parameters()):
            found, expected = self.shape(prefix + name), tuple(parameter.shape)
            if found != expected:
                raise CheckpointError(
                    f"tensor {prefix + name!r} has shape {list(found)}, but its config implies {list(expected)}",
                    where=self.checkpoint.path,
                )
            owner, _, attribute = name.rpartition(".")
            value = nn.Parameter(self.tensor(prefix + name), requires_grad=False)
            setattr(module.get_submodule(owner), attribute, value)
        module.eval()
        if self.resident:
            self._modules[prefix] = module
        return module

    def _stored(self, name: str) -> StoredTensor:
        stored = self.checkpoint.tensors.get(name)
        if stored is None:
            raise CheckpointError(f"has no tensor {name!r}", where=self.checkpoint.path)
        if stored.entry.dtype not in DTYPES:
            raise CheckpointError(
                f"tensor {name!r} has dtype {stored.entry.dtype}, expected one of {', '.join(DTYPES)}",
                where=self.checkpoint.path,
            )
        return stored

    def _read(self, stored: StoredTensor, start: int, end: int) -> Tensor:
        """Return bytes `start` to `end` of a tensor, flat, in the dtype and on the device of these weights."""
        buffer = torch.empty(end - start, dtype=torch.uint8)
        read_exactly(self.checkpoint, stored, start, buffer)
        return self._cast(buffer.view(DTYPES[stored.entry.dtype]))

    def _cast(self, tensor: Tensor) -> Tensor:
        return tensor.to(device=self.device, dtype=self.rounded_to).to(self.dtype)


def read_exactly(checkpoint: Checkpoint, stored: StoredTensor, start: int, buffer: Tensor) -> None:
    """Fill a byte tensor from a stored tensor, starting at its byte `start`.

    Raises:
        CheckpointError: The file cannot be read, or has become shorter than its header says.
    """
    path = checkpoint.path / stored.file
    todo = memoryview(buffer.numpy().data)
    try:
        with path.open("rb", buffering=0) as file:
            file.seek(stored.entry.start + start)
            while todo:
                count = file.readinto(todo)
                if not count:
                    raise CheckpointError("was truncated while it was read", where=path)
                todo = todo[count:]
    except OSError as error:
        raise CheckpointError(f"cannot be read: {error.strerror}", where=path) from None


def only_prefix(names: Sequence[str], anchor: str, checkpoint: Checkpoint) -> str:
    """Return the prefix of the only tensor name that ends with `anchor`.

    Raises:
        CheckpointError: No name, or more than one, ends with it.
    """
    found = [name for name in names if name == anchor or name.endswith(f".{anchor}")]
    if len(found) != 1:
        raise CheckpointError(f"has {len(found)} tensors named ...{anchor}, expected one", where=checkpoint.path)
    return found[0].removesuffix(anchor)


PIECE_ELEMENTS = 1 << 24
"""Elements to check at once: 64 MiB in float32."""


def not_finite(what: str, weights: Weights) -> UsageError | CheckpointError:
    """Return the error for values that are not finite: it names the dtype if it overflowed, otherwise the checkpoint.

    The activations of a real Gemma 3 exceed 65,504, the largest float16; the same weights work in bfloat16 and float32.

    Args:
        what: The values.
        weights: The weights with which the values were computed.
    """
    return overflow(what, weights) or CheckpointError(
        f"{what} are not finite in {_dtype_name(weights)}",
        where=weights.checkpoint.path,
        hint="the weights contain NaN, infinity or values that are too large",
    )


def overflow(what: str, weights: Weights) -> UsageError | None:
    """Return the error for a float16 pass over a checkpoint of finite weights; None for any other pass."""
    if _dtype(weights) != torch.float16 or not _all_finite(weights):
        return None
    return UsageError(
        f"float16 overflows at 65504: {what} are not finite, though all weights are",
        hint="compute with --dtype float32",
    )


def _dtype(weights: Weights) -> torch.dtype:
    return weights.dtype or DTYPES.get(weights.checkpoint.dtype, torch.float32)


def _dtype_name(weights: Weights) -> str:
    return str(_dtype(weights)).removeprefix("torch.")


def _all_finite(weights: Weights) -> bool:
    """Return whether all stored values that a pass may read are finite."""
    stored = Weights(weights.checkpoint, device=weights.device)
    return all(
        bool(torch.isfinite(piece).all())
        for name, tensor in weights.checkpoint.tensors.items()
        if tensor.entry.dtype in DTYPES
        for piece in stored.pieces(name, PIECE_ELEMENTS)
    )
