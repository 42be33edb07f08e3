"""Build what is trained: a model with its loss, sharded, its trained parameters, and their optimizer."""

from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from t5g2convert.adaptation.options import RunOptions
from t5g2convert.adaptation.train import model
from t5g2convert.adaptation.train.block_attention import use_block_attention
from t5g2convert.adaptation.train.checkpoints import State
from t5g2convert.adaptation.train.loop import make_optimizer
from t5g2convert.adaptation.train.lora import AdapterStart, add_adapter, is_matrix, weight_of
from t5g2convert.adaptation.train.loss import ModelWithLoss
from t5g2convert.adaptation.train.preflight import Prepared
from t5g2convert.adaptation.train.run_settings import RunSettings
from t5g2convert.adaptation.train.sharding import Rows, load_values, shard
from t5g2convert.adaptation.train.teacher import Teacher, build_teacher, teacher_names
from t5g2convert.checkpoint.folder import open_checkpoint
from t5g2convert.errors import UsageError
from t5g2convert.reference.weights import Weights

if TYPE_CHECKING:
    from lightning_fabric import Fabric


def build(
    engine: "Fabric", folder: Path, prepared: Prepared[Any], options: RunOptions, settings: RunSettings
) -> tuple[nn.Module, State]:
    """Build, shard and load a model, and return it with its trained parameters and their optimizer.

    Args:
        engine: Fabric, launched.
        folder: The model's folder.
        prepared: The checked run.
        options: The options of the run.
        settings: The run's settings, with the teacher's identity.

    Raises:
        CheckpointError: The model's tensors do not fit the class.
        UsageError: A pattern of `trainable` matches no trained tensor.
    """
    checkpoint = prepared.checkpoint
    network = model.build_model(folder, checkpoint.config)
    names = model.names_on_disk(network, checkpoint)
    parts = model.parts_of(checkpoint)
    model.freeze(network, names, parts, images=prepared.samples.has_images)
    weights: Rows = Weights(checkpoint)
    if (adapter := settings.adapter) is not None:
        names = add_adapter(network, names, adapter)
        parts = {**parts, **{name: parts[weight_of(name)] for name in names.values() if is_matrix(name)}}
        weights = AdapterStart(Weights(checkpoint), adapter, seed=settings.seed)
    if options.recomputed != "none":
        model.recompute_activations(network, options.recomputed)
    if options.attention == "blocks":
        use_block_attention(network)
    if options.compile:
        model.compile_layers(network)
    with_loss = ModelWithLoss(
        network,
        tasks=len(prepared.samples.task_names),
        softcap=prepared.limits.softcap,
        chunk=options.loss_chunk,
        teacher=_teacher(options, prepared),
        by_blocks=options.attention == "blocks",
    )
    shard(engine, with_loss, precision=settings.precision, shard_size=options.shard_size)
    load_values(with_loss.model, names, weights, engine.device)
    if with_loss.teacher is not None and options.kd is not None:
        teacher = open_checkpoint(options.kd)
        load_values(with_loss.teacher, teacher_names(with_loss.teacher, teacher), Weights(teacher), engine.device)
    module = engine.setup_module(with_loss)
    parameters = {
        names[name]: parameter for name, parameter in with_loss.model.named_parameters() if parameter.requires_grad
    }
    for pattern in settings.trainable:
        if not any(fnmatchcase(name, pattern) for name in parameters):
            raise UsageError(f"--trainable {pattern} matches none of the {len(parameters)} trained tensors")
    # In the order of published names, whatever the class calls them.
    parameters = dict(sorted(parameters.items()))
    return module, State(parameters, make_optimizer(parameters, settings, parts))


def _teacher(options: RunOptions, prepared: Prepared[Any]) -> Teacher | None:
    if options.kd is None:
        return None
    dtype = torch.bfloat16 if options.precision == "bfloat16" else torch.float32
    return build_teacher(options.kd, vocabulary=prepared.tokens.vocabulary, dtype=dtype)
