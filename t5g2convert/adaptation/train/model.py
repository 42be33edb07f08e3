"""Loading a model for training, and the published names of its parameters.

Parameters of transformers' modules have other names than tensors on disk (`encoder.text_model.layers`,
`vision_tower.encoder`), and these names change between versions. Checkpoints and exports use only the names on disk, so
the mapping is verified before the first step: every parameter matches exactly one tensor of MODEL in shape and values.
"""

from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from torch import nn

from t5g2convert.checkpoint.families.config_section import describe_model_type
from t5g2convert.checkpoint.families.registry import expected_tensors
from t5g2convert.checkpoint.families.t5gemma2 import MODEL_TYPE
from t5g2convert.checkpoint.folder import Checkpoint, some
from t5g2convert.conversion.trained_model import FROZEN
from t5g2convert.errors import CheckpointError, UsageError

OPTIONAL_PARTS: Final = ("text_model.", "vision_model.")
"""Parts of module names that only some versions have."""

PROJECTOR: Final = "projector"
"""The part that only image steps train."""


def load_model(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """Load a model in float32 for training, and refuse missing or unexpected tensors.

    Args:
        folder: A converted model.
        config: Its config.json.

    Raises:
        CheckpointError: The model is of another kind, or its tensors do not fit the class.
    """
    load = MODEL_LOADERS.get(str(config.get("model_type")))
    if load is None:
        raise CheckpointError(
            f"cannot be trained: expected a T5Gemma 2 checkpoint, found {describe_model_type(config)}", where=folder
        )
    return load(folder)


def _load_t5gemma2(folder: Path) -> nn.Module:
    transformers = quiet_transformers()
    model, found = transformers.T5Gemma2ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    refuse_incomplete(found, folder)
    for part in (model.config, model.config.encoder.text_config, model.config.decoder):
        # Training generates nothing, and the class warns about a cache with gradient checkpointing.
        part.use_cache = False
    return model


MODEL_LOADERS: Final[dict[str, Callable[[Path], nn.Module]]] = {MODEL_TYPE: _load_t5gemma2}
"""How the models of a `model_type` are loaded for training; a family added to `TARGETS` needs an entry here too."""


def quiet_transformers() -> Any:
    """Import transformers, without its progress bars."""
    transformers: Any = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


def refuse_incomplete(found: Mapping[str, Any], folder: Path) -> None:
    """Refuse missing, unexpected or misshapen tensors, which transformers loads without an error."""
    names = {what: {str(name) for name in found[f"{what}_keys"]} for what in ("missing", "unexpected", "mismatched")}
    if problems := [f"{what}: {some(which)}" for what, which in names.items() if which]:
        raise CheckpointError(f"does not load in transformers: {'; '.join(problems)}", where=folder)


def published_names(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], where: Path) -> dict[str, str]:
    """Map the names of a model's parameters to the names of their tensors on disk; tied parameters appear once.

    Args:
        model: The model, before it is sharded.
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


def _spellings(name: str) -> Iterator[str]:
    """Yield the possible names of a parameter on disk: with and without the parts that vary between versions."""
    yield name
    for part in OPTIONAL_PARTS:
        yield name.replace(part, "")
    yield name.replace("text_model.", "").replace("vision_tower.", "vision_tower.vision_model.")


def compare_values(model: nn.Module, names: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Refuse a model if its parameters differ from the values on disk; one tensor is in memory at a time.

    Tensors of two layers have equal shapes, so shapes alone do not prove the mapping.

    Raises:
        CheckpointError: Parameters differ; all are listed.
    """
    parameters = dict(model.named_parameters())
    by_file: dict[str, list[str]] = {}
    for name, tensor in names.items():
        by_file.setdefault(checkpoint.tensors[tensor].file, []).append(name)
    wrong = []
    for file, held in by_file.items():
        with safe_open(checkpoint.path / file, framework="pt") as opened:
            wrong += [
                f"{name} is not {names[name]}"
                for name in held
                if not torch.equal(parameters[name].detach(), opened.get_tensor(names[name]).to(parameters[name].dtype))
            ]
    if wrong:
        raise CheckpointError(f"{wrong[0]}: other values were loaded", where=checkpoint.path, details=wrong)


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


def recompute_activations(model: nn.Module) -> None:
    """Keep only the layers' inputs for the backward pass, which recomputes the rest; results do not change.

    Raises:
        UsageError: The model does not support it.
    """
    # The second name is the older one; newer versions warn about it.
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if (enable := getattr(model, f"{name}_enable", None)) is not None:
            enable(**{f"{name}_kwargs": {"use_reentrant": False}})
            # transformers also enables gradients of the inputs of both stacks and of the tower, which only reentrant
            # recomputation needs: the frozen tower would be computed twice, and backwards.
            if (disable := getattr(model, "disable_input_require_grads", None)) is not None:
                disable()
            return
    raise UsageError("this model does not support gradient checkpointing", hint="pass --no-gradient-checkpointing")
