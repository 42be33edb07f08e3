"""The models that are trained, and what their parameters are called in the published layout.

transformers' modules have other names than the checkpoint (`encoder.text_model.layers`, `vision_tower.encoder`), and
other ones by version. A run's checkpoints and exports use the names on disk alone, so the correspondence is proved
before the first step: every parameter has exactly one tensor of MODEL, of its shape and with its values.
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
"""Levels of modules that some versions have in their names, and some have not."""

PROJECTOR: Final = "projector"
"""The part that only documents with images train."""


def load_model(folder: Path, config: Mapping[str, Any]) -> nn.Module:
    """The model of a folder in float32, for training, with nothing missing and nothing left over.

    Args:
        folder: A converted model.
        config: Its config.json.

    Raises:
        CheckpointError: Another kind of model, or its files are not all that the class has.
    """
    load = MODEL_LOADERS.get(str(config.get("model_type")))
    if load is None:
        raise CheckpointError(f"{describe_model_type(config)} is no model that is adapted: T5Gemma 2", where=folder)
    return load(folder)


def _load_t5gemma2(folder: Path) -> nn.Module:
    transformers = quiet_transformers()
    model, found = transformers.T5Gemma2ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True, local_files_only=True
    )
    refuse_incomplete(found, folder)
    for part in (model.config, model.config.encoder.text_config, model.config.decoder):
        # Nothing is generated here, and with gradient checkpointing the class warns of it.
        part.use_cache = False
    return model


MODEL_LOADERS: Final[dict[str, Callable[[Path], nn.Module]]] = {MODEL_TYPE: _load_t5gemma2}
"""How the models of a `model_type` are loaded for training; a family added to `TARGETS` needs an entry here too."""


def quiet_transformers() -> Any:
    """The transformers library, without progress bars of its own."""
    transformers: Any = import_module("transformers")
    transformers.utils.logging.disable_progress_bar()
    return transformers


def refuse_incomplete(found: Mapping[str, Any], folder: Path) -> None:
    """Refuse what transformers loads without an error: tensors that are missing, left over or of another shape."""
    names = {what: {str(name) for name in found[f"{what}_keys"]} for what in ("missing", "unexpected", "mismatched")}
    if told := [f"{what}: {some(which)}" for what, which in names.items() if which]:
        raise CheckpointError(f"does not load in transformers: {'; '.join(told)}", where=folder)


def published_names(model: nn.Module, shapes: Mapping[str, tuple[int, ...]], where: Path) -> dict[str, str]:
    """Names of a model's parameters, as the module has them, to their names on disk; tied ones once.

    Args:
        model: The model, before it is sharded.
        shapes: Names and shapes of all tensors on disk.
        where: Its folder, for errors.

    Raises:
        CheckpointError: A parameter has no tensor, several, or one of another shape; or a tensor has no parameter.
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
    wrong += [f"{tensor}: two parameters have it" for tensor in sorted(set(taken)) if taken.count(tensor) > 1]
    wrong += [f"{tensor}: no parameter has it" for tensor in sorted(shapes.keys() - set(taken))]
    if wrong:
        raise CheckpointError(
            f"{len(wrong)} tensor(s) and parameters of the class do not correspond, first {wrong[0]}",
            where=where,
            details=wrong,
        )
    return names


def _spellings(name: str) -> Iterator[str]:
    """What a parameter may be called on disk: with and without the levels that come and go between versions."""
    yield name
    for part in OPTIONAL_PARTS:
        yield name.replace(part, "")
    yield name.replace("text_model.", "").replace("vision_tower.", "vision_tower.vision_model.")


def compare_values(model: nn.Module, names: Mapping[str, str], checkpoint: Checkpoint) -> None:
    """Refuse a model whose parameters do not have the values on disk, one tensor in memory at a time.

    Two layers' tensors have equal shapes, so shapes alone prove no correspondence.

    Raises:
        CheckpointError: With all parameters that differ.
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
    """The part that each tensor of a model is of, by its name on disk."""
    return {item.name: item.part for item in expected_tensors(checkpoint.config, checkpoint.path / "config.json")}


def freeze(model: nn.Module, names: Mapping[str, str], parts: Mapping[str, str], *, images: bool) -> None:
    """Let no gradient be computed for what is never trained: the tower, and without images the projector.

    Args:
        model: The model.
        names: Its parameters' names to their names on disk.
        parts: The part of each tensor; see `parts_of`.
        images: Whether there are steps of images.
    """
    frozen = {FROZEN} if images else {FROZEN, PROJECTOR}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(parts[names[name]] not in frozen)


def recompute_activations(model: nn.Module) -> None:
    """Keep the layers' inputs alone for the backward pass, which computes the rest again; results do not change.

    Raises:
        UsageError: The model cannot.
    """
    # The second name is the older one; newer versions warn of it.
    for name in ("activation_checkpointing", "gradient_checkpointing"):
        if (enable := getattr(model, f"{name}_enable", None)) is not None:
            enable(**{f"{name}_kwargs": {"use_reentrant": False}})
            # transformers then has the inputs of both stacks and of the tower want gradients, which only the older way
            # of recomputing needs: the frozen tower would be computed twice, and backwards.
            if (disable := getattr(model, "disable_input_require_grads", None)) is not None:
                disable()
            return
    raise UsageError("this model cannot compute its activations twice", hint="leave out --gradient-checkpointing")
