"""The cost of training, from shapes: operations of a sample, and memory of a device.

Both are estimates. Operations count matrix products, two per multiply-add; masked attention scores count in
full, since the class computes them, and a sliding layer as much as a full one.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2
from t5g2convert.checkpoint.families.text_and_vision import SiglipConfig, TextConfig

TRAINED_BYTES: Final = 16
"""Per trained parameter: float32 weight, gradient and both AdamW moments."""

FROZEN_BYTES: Final = 4
"""Per frozen parameter: a float32 weight."""

GATHERED_BYTES: Final = 8
"""Per gathered parameter: a bfloat16 weight and gradient, and the float32 gradient that is reduced over devices."""

GRADIENT_BYTES: Final = 4
"""Per trained parameter: its float32 gradient, of which `TRAINED_BYTES` counts a device's share."""

STATE_BYTES: Final = 2
"""Per element of a layer's input, kept for the backward pass: bfloat16."""

PIXEL_BYTES: Final = 6
"""Per number of a pixel: in float32, and in bfloat16."""

LOGIT_BYTES: Final = 8
"""Per logit of a chunk: in bfloat16, and in float32; the gradients replace them."""

PASSES: Final = 4
"""Of the layers: forward; forward again in the backward pass (recomputation); and twice that for the gradients."""


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes that one device holds in training, besides the activations of the layer being computed.

    Attributes:
        states: Its shard of weights, gradients and moments, float32.
        gathered: The embedding matrix and two layers, in bfloat16, with gradients.
        inputs: Inputs of all layers for a micro-batch.
        softmax: Logits of one chunk of labels.
        gradient: The rest of the whole gradient, float32, if gradients are summed over devices once a step.
        images: Pixels of a micro-batch, and the activations of a layer of the tower for all of its images.
    """

    states: int
    gathered: int
    inputs: int
    softmax: int
    gradient: int = 0
    images: int = 0

    @property
    def total(self) -> int:
        """Sum of all."""
        return self.states + self.gathered + self.inputs + self.softmax + self.gradient + self.images


@dataclass(frozen=True, slots=True)
class Operations:
    """Operations of one forward pass over one sample.

    Attributes:
        encoder: Encoder layers.
        decoder: Decoder layers, including keys and values of the encoder's output.
        softmax: Product with the embedding matrix.
        vision: Vision tower, for all images of the sample.
        projector: Projection to the encoder's width.
    """

    encoder: int
    decoder: int
    softmax: int
    vision: int = 0
    projector: int = 0

    @property
    def training(self) -> int:
        """Operations in training: the frozen tower only runs forward; softmax and projector are not recomputed."""
        return PASSES * (self.encoder + self.decoder) + 3 * (self.softmax + self.projector) + self.vision


def operations(model: T5Gemma2, *, encoder: int, decoder: int, images: int = 0) -> Operations:
    """Estimate the operations of one forward pass over one sample.

    Args:
        model: The model's shapes.
        encoder: Encoder tokens, including image tokens.
        decoder: Labels.
        images: Images in the encoder's input.
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
    """Projections and feed-forward of one layer, per token."""
    queries_and_output = 2 * 2 * stack.hidden_size * stack.dims["query"]
    return queries_and_output + _keys_and_values(stack) + 3 * 2 * stack.hidden_size * stack.intermediate_size


def _keys_and_values(stack: TextConfig) -> int:
    return 2 * 2 * stack.hidden_size * stack.dims["key_value"]


def _scores(stack: TextConfig, keys: int) -> int:
    """Scores of one query with `keys` keys, and the weighted sum of their values."""
    return 2 * 2 * keys * stack.dims["query"]


def _tower(tower: SiglipConfig) -> int:
    """One image through the tower."""
    patches, hidden = tower.dims["vision_positions"], tower.hidden_size
    embedding = 2 * tower.num_channels * tower.patch_size**2 * hidden
    layer = 4 * 2 * hidden**2 + 2 * 2 * hidden * tower.intermediate_size + 2 * 2 * patches * hidden
    return patches * (embedding + tower.num_hidden_layers * layer)


def memory(
    model: T5Gemma2,
    parameters: Mapping[str, int],
    *,
    devices: int,
    encoder: int,
    decoder: int,
    chunk: int,
    reduces_once: bool = False,
    adapter: int | None = None,
    images: int = 0,
) -> Memory:
    """Estimate the memory of a device: all but the vision tower or an adapter trained, layers recomputed, bfloat16.

    Args:
        model: The model's shapes.
        parameters: Number of parameters by part, from `inspect`.
        devices: Number of devices that share a copy of the model.
        encoder: Encoder tokens per micro-batch, including padding.
        decoder: Labels per micro-batch, including padding.
        chunk: Labels per chunk of logits, to limit memory.
        reduces_once: Whether gradients are summed over devices once a step.
        adapter: Parameters of the adapter that is trained; None if the model is.
        images: Images per micro-batch.
    """
    frozen = parameters["vision"] if adapter is None else parameters["total"]
    trained = parameters["total"] - frozen if adapter is None else adapter
    states = TRAINED_BYTES * trained + FROZEN_BYTES * frozen
    stacks = ((model.encoder, "encoder", encoder), (model.decoder, "decoder", decoder))
    layer = max(parameters[part] // stack.num_hidden_layers for stack, part, _ in stacks)
    inputs = sum(tokens * stack.num_hidden_layers * stack.hidden_size for stack, _, tokens in stacks)
    return Memory(
        states=states // devices,
        gathered=GATHERED_BYTES * (parameters["embedding"] + 2 * layer),
        inputs=STATE_BYTES * inputs,
        softmax=LOGIT_BYTES * min(chunk, decoder) * model.decoder.vocab_size,
        gradient=GRADIENT_BYTES * trained * (devices - 1) // devices if reduces_once else 0,
        images=images * _image_bytes(model.vision),
    )


def _image_bytes(tower: SiglipConfig) -> int:
    """Return the bytes of an image: its pixels, and what a layer of the frozen tower holds at its widest."""
    pixels, hidden = tower.num_channels * tower.image_size**2, tower.hidden_size
    # In attention six tensors of the width; in the MLP three, and its inner ones before and after the activation.
    widest = max(6 * hidden, 3 * hidden + 2 * tower.intermediate_size)
    return PIXEL_BYTES * pixels + STATE_BYTES * tower.dims["vision_positions"] * widest
