"""What a step of training computes and holds, estimated from the shapes of a model alone; nothing here is measured.

Operations are those of matrix products, two for a multiply-add. Attention is computed with masks, so that masked scores
cost as much as others, and a sliding layer as much as a full one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2
from t5g2convert.checkpoint.families.text_and_vision import SiglipConfig, TextConfig

TRAINED_BYTES: Final = 16
"""For each trained parameter: float32 weight, gradient, and both moments of AdamW."""

FROZEN_BYTES: Final = 4
"""For each frozen parameter: a float32 weight."""

GATHERED_BYTES: Final = 8
"""For each parameter of a group that is gathered: a bfloat16 weight and gradient, and the gradient that all devices add
up in float32."""

STATE_BYTES: Final = 2
"""For each element of a layer's input, which is kept for the backward pass: bfloat16."""

LOGIT_BYTES: Final = 12
"""For each logit of a chunk of labels: it and its gradient, in bfloat16 and in float32."""

PASSES: Final = 4
"""Forward; forward again in the backward pass (gradient checkpointing); twice as much for the gradients."""


@dataclass(frozen=True, slots=True)
class Operations:
    """One forward pass over one sample.

    Attributes:
        encoder: The encoder's layers.
        decoder: The decoder's layers, keys and values of the encoder's output included.
        softmax: The product with the embedding matrix.
        vision: The tower, for all images of the sample.
        projector: From the tower to the encoder's width.
    """

    encoder: int
    decoder: int
    softmax: int
    vision: int = 0
    projector: int = 0

    @property
    def training(self) -> int:
        """The sample in training: the tower runs forward alone, and nothing of images is computed again."""
        return PASSES * (self.encoder + self.decoder + self.softmax) + self.vision + 3 * self.projector


def operations(model: T5Gemma2, *, encoder: int, decoder: int, images: int = 0) -> Operations:
    """The operations of one forward pass over one sample.

    Args:
        model: The model's shapes.
        encoder: Tokens that the encoder reads, those of images included.
        decoder: Labels.
        images: Images among what the encoder reads.
    """
    tower, hidden = model.vision, model.encoder.hidden_size
    return Operations(
        encoder=encoder * model.encoder.num_hidden_layers * (_layer(model.encoder) + _scores(model.encoder, encoder)),
        decoder=model.decoder.num_hidden_layers
        * (
            decoder * (_layer(model.decoder) + _scores(model.decoder, decoder + encoder))
            + encoder * _keys_and_values(model.decoder)
        ),
        softmax=decoder * 2 * hidden * model.decoder.vocab_size,
        vision=images * _tower(tower),
        projector=images * model.tokens.mm_tokens_per_image * 2 * tower.hidden_size * hidden,
    )


def _layer(stack: TextConfig) -> int:
    """Projections and feed-forward of one layer, for one token."""
    queries_and_output = 2 * 2 * stack.hidden_size * stack.dims["query"]
    return queries_and_output + _keys_and_values(stack) + 3 * 2 * stack.hidden_size * stack.intermediate_size


def _keys_and_values(stack: TextConfig) -> int:
    return 2 * 2 * stack.hidden_size * stack.dims["key_value"]


def _scores(stack: TextConfig, keys: int) -> int:
    """One query's scores with so many keys, and the weighted sum of their values."""
    return 2 * 2 * keys * stack.dims["query"]


def _tower(tower: SiglipConfig) -> int:
    """One image through the tower."""
    patches, hidden = tower.dims["vision_positions"], tower.hidden_size
    embedding = 2 * tower.num_channels * tower.patch_size**2 * hidden
    layer = 4 * 2 * hidden**2 + 2 * 2 * hidden * tower.intermediate_size + 2 * 2 * patches * hidden
    return patches * (embedding + tower.num_hidden_layers * layer)


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one device holds in training, but for the work of the layer that is being computed.

    Attributes:
        states: Its share of weights, gradients and moments, float32.
        gathered: The embedding matrix, and two layers, in bfloat16 with their gradients.
        inputs: The inputs of all layers of a micro-batch.
        softmax: The logits of the labels that are computed at once.
    """

    states: int
    gathered: int
    inputs: int
    softmax: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.states + self.gathered + self.inputs + self.softmax


def memory(
    model: T5Gemma2,
    parameters: Mapping[str, int],
    *,
    devices: int,
    samples: int,
    encoder: int,
    decoder: int,
    chunk: int,
) -> Memory:
    """What a device holds where all of the model but the tower is trained, with gradient checkpointing, in bfloat16.

    Args:
        model: The model's shapes.
        parameters: Number of parameters by part, as `inspect` tells.
        devices: Over which the model is sharded.
        samples: Samples of a micro-batch.
        encoder: Tokens that the encoder reads of a sample.
        decoder: Labels of a sample.
        chunk: Labels whose logits exist at once.
    """
    frozen = parameters["vision"]
    states = TRAINED_BYTES * (parameters["total"] - frozen) + FROZEN_BYTES * frozen
    stacks = ((model.encoder, "encoder", encoder), (model.decoder, "decoder", decoder))
    layer = max(parameters[part] // stack.num_hidden_layers for stack, part, _ in stacks)
    inputs = sum(tokens * stack.num_hidden_layers * stack.hidden_size for stack, _, tokens in stacks)
    return Memory(
        states=states // devices,
        gathered=GATHERED_BYTES * (parameters["embedding"] + 2 * layer),
        inputs=STATE_BYTES * samples * inputs,
        softmax=LOGIT_BYTES * min(chunk, samples * decoder) * model.decoder.vocab_size,
    )
