"""Building a model for training, and the published names of its parameters.

Parameters of transformers' modules have other names than tensors on disk (`encoder.text_model.layers`,
`vision_tower.encoder`), and these names change between versions. Values are read, and checkpoints and exports written,
by the names on disk alone. Every parameter matches exactly one tensor of MODEL by name and shape, and every tensor is
matched.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final, Literal

import torch
from torch import nn
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from t5g2convert.adaptation.train.sharding import load_values, parameters_on_meta
from t5g2convert.checkpoint.families.config_section import describe_model_type
from t5g2convert.checkpoint.families.registry import expected_tensors
from t5g2convert.checkpoint.families.t5gemma2 import MODEL_TYPE
from t5g2convert.checkpoint.folder import Checkpoint, some
from t5g2convert.conversion.trained_model import FROZEN
from t5g2convert.errors import CheckpointError, UsageError
from t5g2convert.reference.weights import Weights

OPTIONAL_PARTS: Final = ("text_model.", "vision_model.")
"""Parts of module names that only some versions have."""

PROJECTOR: Final = "projector"
"""The part that only image steps train."""

_ATEN: Final[Any] = torch.ops.aten
KEPT_OPERATIONS: Final = [
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN._scaled_dot_product_flash_attention.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_efficient_attention.default,
    _ATEN._scaled_dot_product_cudnn_attention.default,
    torch.ops.higher_order.flex_attention,
]
"""Operations whose results selective recomputation keeps."""


def build_model(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """Build a model for training, float32, with its parameters on the meta device.

    Args:
        folder: A converted model.
        config: Its config.json.

    Raises:
        CheckpointError: The model is of another kind.
    """
    build = MODEL_BUILDERS.get(str(config.get("model_type")))
    if build is None:
        raise CheckpointError(
            f"cannot be trained: expected a T5Gemma 2 checkpoint, found {describe_model_type(config)}", where=folder
        )
    with parameters_on_meta():
        return build(folder)


def load_model(checkpoint: Checkpoint) -> nn.Module:
    """Return a whole model on the CPU, float32.

    Raises:
        CheckpointError: The model is of another kind, or its tensors do not fit the class.
    """
    model = build_model(checkpoint.path, checkpoint.config)
    load_values(model, names_on_disk(model, checkpoint), Weights(checkpoint), torch.device("cpu"))
    return model


def _build_t5gemma2(folder: Path) -> nn.Module:
    transformers = quiet_transformers()
    config = transformers.T5Gemma2Config.from_pretrained(folder, local_files_only=True)
    for part in (config, config.encoder.text_config, config.decoder):
        # Training generates nothing, and the class warns about a cache with recomputation.
        part.use_cache = False
    model: nn.Module = transformers.AutoModelForSeq2SeqLM.from_config(config, dtype=torch.float32)
    return model


MODEL_BUILDERS: Final[dict[str, Callable[[Path], nn.Module]]] = {MODEL_TYPE: _build_t5gemma2}
"""How the models of a `model_type` are built; a family added to `TARGETS` needs an entry here too."""


def quiet_transformers() -> Any:
    """Import transformers, without its progress bars."""
    transformers: Any = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


def published_names(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], where: Path) -> dict[str, str]:
    """Map the names of a model's parameters to the names of their tensors on disk; tied parameters appear once.

    Args:
        model: The model.
        shapes: Shapes of all tensors on disk, by name.
        where: Its folder, for errors.

    Raises:
        CheckpointError: A parameter matches no tensor, several, or one with another shape; or a tensor is left over.
    """
    aliases: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(parameter), []).append(name)
    names: dict[str, str] = {}
    wrong: list[str] = []
    for name, parameter in model.named_parameters():
        spellings = {spelling for alias in aliases[id(parameter)] for spelling in _spellings(alias)}
        candidates = sorted(spellings & shapes.keys())
        if len(candidates) != 1:
            wrong.append(f"{name}: expected one tensor, found {some(candidates) if candidates else 'none'}")
        elif shapes[candidates[0]] != tuple(parameter.shape):
            wrong.append(f"{name} is {tuple(parameter.shape)}, {candidates[0]} is {shapes[candidates[0]]}")
        else:
            names[name] = candidates[0]
    taken = list(names.values())
    wrong += [f"{tensor}: matches two parameters" for tensor in sorted(set(taken)) if taken.count(tensor) > 1]
    wrong += [f"{tensor}: matches no parameter" for tensor in sorted(shapes.keys() - set(taken))]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensor(s) do not match the parameters of the class, first {wrong[0]}",
            where=where,
            details=wrong,
        )
    return names


def names_on_disk(model: nn.Module, checkpoint: Checkpoint) -> dict[str, str]:
    """Map the names of a model's parameters to the names of its checkpoint's tensors, as `published_names`."""
    shapes = {name: tensor.entry.shape for name, tensor in checkpoint.tensors.items()}
    return published_names(model, shapes, checkpoint.path)


def _spellings(name: str) -> Iterator[str]:
    """Yield the possible names of a parameter on disk: with and without the parts that vary between versions."""
    yield name
    for part in OPTIONAL_PARTS:
        yield name.replace(part, "")
    yield name.replace("text_model.", "").replace("vision_tower.", "vision_tower.vision_model.")


def parts_of(checkpoint: Checkpoint) -> Mapping[str, str]:
    """Return the part of each tensor of a model, by its name on disk."""
    return {item.name: item.part for item in expected_tensors(checkpoint.config, checkpoint.path / "config.json")}


def freeze(model: nn.Module, names: Mapping[str, str], parts: Mapping[str, str], *, images: bool) -> None:
    """Disable gradients of parts that are never trained: the vision tower, and without images the projector.

    Args:
        model: The model.
        names: Names on disk, by parameter name.
        parts: The part of each tensor; see `parts_of`.
        images: Whether there are image steps.
    """
    frozen = {FROZEN} if images else {FROZEN, PROJECTOR}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts[names[name]] not in frozen)


def recompute_activations(model: nn.Module, which: Literal["selective", "full"]) -> None:
    """Recompute activations in the backward pass; results do not change.

    Args:
        model: The model.
        which: full keeps the inputs of layers; selective also keeps the results of their matrix products and attention.

    Raises:
        UsageError: The model does not support it.
    """
    options: dict[str, Any] = {"use_reentrant": False}
    if which == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, KEPT_OPERATIONS)
    # The second name is the older one; newer versions warn about it.
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if (enable := getattr(model, f"{name}_enable", None)) is not None:
            enable(**{f"{name}_kwargs": options})
            # transformers also enables gradients of the inputs of both stacks and of the tower, which only reentrant
            # recomputation needs: the frozen tower would be computed twice, and backwards.
            if (disable := getattr(model, "disable_input_require_grads", None)) is not None:
                disable()
            return
    raise UsageError("this model does not support recomputation", hint="pass --recompute none")


def compile_layers(model: nn.Module, *, backend: str = "inductor") -> None:
    """Let torch.compile compile each layer of each stack when it first runs."""
    for stack in [part for part in model.modules() if isinstance(part, nn.ModuleList)]:
        for layer in stack:
            layer.compile(backend=backend)
