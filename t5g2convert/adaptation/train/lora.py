"""LoRA: peft's layers in a network that is built without values; their matrices alone are trained.

The targets are linear layers of attention and MLP in both text stacks, by their own names (`q_proj`): never those of
the vision tower, which has layers of the same names, and never the embedding, which encoder, decoder and softmax share.
"""

import hashlib
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import torch
from torch import Tensor, nn

from t5g2convert.adaptation.train.lora_shape import LoraShape
from t5g2convert.adaptation.train.sharding import Rows, parameters_on_meta
from t5g2convert.reference.weights import Weights

if TYPE_CHECKING:
    from peft import LoraConfig

ADAPTER_NAME: Final = "default"
"""peft's name of the adapter in a network; saved names lack it."""

BASE: Final = ".base_layer"
"""The part of a parameter's name that peft adds to the frozen weight of a target."""

_MATRIX: Final = re.compile(rf"(.+)\.lora_([AB])\.{ADAPTER_NAME}\.weight")


def config_of(shape: LoraShape, base: Path | None = None) -> "LoraConfig":
    """Return peft's settings of an adapter."""
    from peft import LoraConfig

    alpha = int(shape.alpha) if float(shape.alpha).is_integer() else shape.alpha
    options: dict[str, Any] = {"r": shape.rank, "lora_alpha": alpha, "target_modules": shape.pattern}
    return LoraConfig(**options, task_type="SEQ_2_SEQ_LM", base_model_name_or_path=None if base is None else str(base))


def add_adapter(network: nn.Module, names: Mapping[str, str], shape: LoraShape) -> dict[str, str]:
    """Put an adapter into a network on the meta device, and leave nothing else to train.

    peft's `get_peft_model` would wrap the network, and expects its values. Sharding needs every parameter to exist, but
    none to have values, so peft's layers are put in here, before it.

    Args:
        network: The network, on the meta device.
        names: Names on disk, by parameter name.
        shape: The adapter.

    Returns:
        Names by parameter name: on disk for the network's own, `MODULE.lora_A.weight` for a matrix of the module whose
        weight is `MODULE.weight` on disk.
    """
    from peft import inject_adapter_in_model

    with parameters_on_meta():
        inject_adapter_in_model(config_of(shape), network, adapter_name=ADAPTER_NAME, low_cpu_mem_usage=True)
    found: dict[str, str] = {}
    for name, parameter in network.named_parameters():
        matrix = _MATRIX.fullmatch(name)
        parameter.requires_grad_(matrix is not None)
        if matrix is None:
            found[name] = names[name.replace(BASE, "")]
        else:
            found[name] = names[f"{matrix[1]}.weight"].removesuffix("weight") + f"lora_{matrix[2]}.weight"
    return found


def is_matrix(name: str) -> bool:
    """Return whether a name is that of an adapter's matrix."""
    return name.endswith((".lora_A.weight", ".lora_B.weight"))


def weight_of(name: str) -> str:
    """Return the tensor that a matrix changes, by their names on disk.

    >>> weight_of("model.decoder.layers.0.mlp.up_proj.lora_A.weight")
    'model.decoder.layers.0.mlp.up_proj.weight'
    """
    return re.sub(r"\.lora_[AB]\.weight$", ".weight", name)


class AdapterStart(Rows):
    """The values with which an adapter starts: those of the model, and matrices made from a seed.

    B is zero, so that the network starts as the model. A is uniform between -1/sqrt(in) and 1/sqrt(in), as in peft. It
    is a function of the seed and of its name, whatever process holds which rows.

    Args:
        weights: The model.
        shape: The adapter.
        seed: The run's seed.
    """

    def __init__(self, weights: Weights, shape: LoraShape, *, seed: int) -> None:
        self._weights, self._shape, self._seed = weights, shape, seed

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor or a matrix."""
        if not is_matrix(name):
            return self._weights.rows(name, start, stop)
        _, columns = self._weights.shape(weight_of(name))
        if name.endswith(".lora_B.weight"):
            return torch.zeros(stop - start, self._shape.rank)
        digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big", signed=True))
        bound = 1 / math.sqrt(columns)
        return torch.empty(self._shape.rank, columns).uniform_(-bound, bound, generator=generator)[start:stop]
