"""Losses on held-out samples by task, with the encoder visible and with the encoder hidden from the decoder.

Their difference is the encoder's gain. A converted model that was not trained does better with the encoder hidden; a
model that has learnt to use its encoder does worse.
"""

from pathlib import Path

import torch
from torch import nn

from t5g2convert.adaptation.train.checkpoint_reader import CheckpointReader
from t5g2convert.adaptation.train.evaluation import hide_encoder
from t5g2convert.adaptation.train.evaluation_log import Evaluation
from t5g2convert.adaptation.train.loss import ModelWithLoss
from t5g2convert.adaptation.train.micro_batches import MicroBatch
from t5g2convert.adaptation.train.model import load_model, published_names
from t5g2convert.adaptation.train.preflight import Prepared, prepare
from t5g2convert.adaptation.train.settings import Settings
from t5g2convert.adaptation.ul2.dataset import task_names
from t5g2convert.errors import CheckpointError, UsageError


def evaluate(
    model: Path, data: Path, settings: Settings, *, samples: int, checkpoint: Path | None = None, micro: int = 16
) -> Evaluation:
    """Evaluate a model on the first samples of packed data.

    Args:
        model: A converted model.
        data: A folder that `t5g2 pack` wrote, from documents that the model was not trained on.
        settings: Lengths, mixture and seed of the samples; a run's settings give its objective.
        samples: Number of samples, a multiple of the mixture's block, so that each task has its share.
        checkpoint: A checkpoint of a run that started from the model, to evaluate instead of the model.
        micro: Samples per pass.

    Raises:
        CheckpointError: The model or the checkpoint is damaged, or they do not belong together.
        DataError: The data does not fit the model.
        UsageError: The number of samples is not a multiple of the block, or exceeds one pass through the data.
    """
    prepared = prepare(model, data, settings)
    block, schedule = settings.mixture.block, prepared.samples.sampler
    if schedule is None:
        raise UsageError("image_every=1 leaves no samples of text to evaluate")
    most = min(texts.per_epoch for texts in schedule.texts)
    if samples < 1 or samples % block or samples > most:
        raise UsageError(f"expected a multiple of {block} up to {most} held-out samples, got {samples}")
    module = load_model(prepared.checkpoint)
    step = 0
    if checkpoint is not None:
        trained = CheckpointReader(checkpoint)
        _take_values(module, prepared, trained)
        step = trained.manifest.step
    return _evaluate(module, prepared, samples, micro, step)


def _take_values(module: nn.Module, prepared: Prepared, trained: CheckpointReader) -> None:
    """Load the values of a checkpoint into a model."""
    where = prepared.checkpoint.path
    shapes = {name: stored.entry.shape for name, stored in prepared.checkpoint.tensors.items()}
    named = {tensor: name for name, tensor in published_names(module, shapes, where).items()}
    parameters = dict(module.named_parameters())
    for name, shape in trained.names.items():
        if shapes.get(name) != shape:
            raise CheckpointError(
                f"has {name!r} of shape {list(shape)}, which is not a tensor of {where}", where=trained.folder
            )
        with torch.no_grad():
            parameters[named[name]].copy_(trained.read(name))


@torch.no_grad()
def _evaluate(module: nn.Module, prepared: Prepared, samples: int, micro: int, step: int) -> Evaluation:
    names = task_names(prepared.samples.settings)
    denoiser = ModelWithLoss(module, tasks=len(names), softcap=prepared.limits.softcap, chunk=4096).eval()
    sums = torch.zeros(3, len(names), dtype=torch.float64)
    for start in range(0, samples, micro):
        numbers = tuple(range(start, min(start + micro, samples)))
        batch = prepared.samples[MicroBatch(0, numbers, (True,) * len(numbers))]
        for row, seen in enumerate((batch, hide_encoder(batch))):
            _, losses_T, labels_T = denoiser(seen)
            sums[row] += losses_T
        sums[2] += labels_T
    return Evaluation.of_sums(step, names, sums)
