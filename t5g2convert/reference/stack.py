"""A text stack, run one layer at a time: the embedding, the layers, the last norm, the softmax.

`Stack` finds the parameters; a `Run` is one batch on its way through the layers. They are separate so that two models
can advance side by side with one layer of each in memory.
"""

from collections.abc import Callable, Iterator, Mapping
from copy import copy
from dataclasses import dataclass, field
from typing import Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from t5g2convert.checkpoint.families.rope_config import LayerType
from t5g2convert.checkpoint.families.text_and_vision import TextConfig
from t5g2convert.reference.attention import Kernel, Rotation, rotation
from t5g2convert.reference.cache import LayerCache
from t5g2convert.reference.layers import RMSNorm
from t5g2convert.reference.weights import Weights

HEAD_ROWS: Final = 16_384
"""Rows of the softmax's matrix to read at once."""


class Stack:
    """One text stack of a checkpoint.

    Args:
        weights: The checkpoint's tensors.
        settings: The stack's config.
        layer_class: Makes a layer without parameters: Gemma's, the encoder's or the decoder's.
        prefix: The prefix of `layers.N.` and `norm.weight` in the checkpoint.
        table: The name of the embedding matrix.
        head: The name of the softmax's matrix (default: the embedding matrix).
        eoi_token: The id of the end-of-image token; None for a model without images.
        eoi: The name of the vector that replaces the scaled embedding of the end-of-image token, if there is one.
        kernel: The attention kernel.
    """

    def __init__(
        self,
        weights: Weights,
        settings: TextConfig,
        layer_class: Callable[[TextConfig, Kernel], nn.Module],
        *,
        prefix: str,
        table: str,
        head: str | None = None,
        eoi_token: int | None = None,
        eoi: str | None = None,
        kernel: Kernel,
    ) -> None:
        self.weights = weights
        self.table_weights = weights
        self.settings = settings
        self.layer_class = layer_class
        self.prefix = prefix
        self.table = table
        self.head = head or table
        self.eoi_token = eoi_token
        self.eoi = eoi
        self.kernel = kernel

    def __len__(self) -> int:
        """Return the number of layers."""
        return len(self.settings.layer_types)

    def with_table_of(self, other: "Stack") -> "Stack":
        """Return this stack with the embedding matrix and the softmax of another stack of the same width."""
        changed = copy(self)
        changed.table_weights, changed.table, changed.head = other.table_weights, other.table, other.head
        return changed

    def embed(self, ids_BT: Tensor) -> Tensor:
        """Return scaled embeddings, [B, T, C]; first the scale is rounded to the table's dtype, then the product."""
        rows_BTC = self.table_weights.gather(self.table, ids_BT)
        scale = torch.tensor(self.settings.hidden_size**0.5, device=rows_BTC.device).to(rows_BTC.dtype)
        embedded_BTC = rows_BTC * scale
        if self.eoi is not None:
            embedded_BTC[ids_BT == self.eoi_token] = self.weights.tensor(self.eoi)
        return embedded_BTC

    def table_chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield the embedding matrix in slices: the number of the first row, and the unscaled rows."""
        for start in range(0, self.settings.vocab_size, HEAD_ROWS):
            yield start, self.weights.rows(self.table, start, min(start + HEAD_ROWS, self.settings.vocab_size))

    def layer(self, number: int) -> nn.Module:
        """Return a layer with its parameters."""
        return self.weights.module(
            lambda: self.layer_class(self.settings, self.kernel), f"{self.prefix}layers.{number}."
        )

    def norm(self, x_BTC: Tensor, factor: float | None = None) -> Tensor:
        """Apply the norm after the last layer.

        Args:
            x_BTC: The states, [..., C].
            factor: Multiply by this instead of the checkpoint's factors; 1 less is rounded as a conversion does.
        """
        settings, name = self.settings, f"{self.prefix}norm."
        if factor is None:
            norm = self.weights.module(lambda: RMSNorm(settings.hidden_size, settings.rms_norm_eps), name)
        else:
            norm = RMSNorm(settings.hidden_size, settings.rms_norm_eps)
            norm.weight = nn.Parameter(self.weights.like(f"{name}weight", factor - 1), requires_grad=False)
        return norm(x_BTC)

    def rotations(self, start: int, stop: int, dtype: torch.dtype) -> dict[LayerType, Rotation]:
        """Return the rotations of positions `start` to `stop`, by kind of layer."""
        positions = torch.arange(start, stop, device=self.weights.device)
        settings = self.settings
        return {
            kind: rotation(settings.ropes[kind], settings.head_dim, positions, dtype)
            for kind in set(settings.layer_types)
        }

    def logits(self, x_NC: Tensor, rows: int | None = None) -> Tensor:
        """Return the logits of normed states over the first `rows` of the vocabulary (default: all of it)."""
        chunks = [chunk for _, chunk in self.logit_chunks(x_NC, rows)]
        return chunks[0] if len(chunks) == 1 else torch.cat(chunks, dim=-1)

    def logit_chunks(self, x_NC: Tensor, rows: int | None = None) -> Iterator[tuple[int, Tensor]]:
        """Yield the logits in slices of the vocabulary: the number of the first row, and the slice's logits."""
        rows = self.settings.vocab_size if rows is None else rows
        step = rows if self.weights.resident else HEAD_ROWS
        softcap = self.settings.final_logit_softcapping
        for start in range(0, rows, step):
            stop = min(start + step, rows)
            yield start, _capped(functional.linear(x_NC, self.table_weights.rows(self.head, start, stop)), softcap)


def _capped(logits_NV: Tensor, softcap: float | None) -> Tensor:
    return logits_NV if softcap is None else torch.tanh(logits_NV / softcap) * softcap


@dataclass
class Run:
    """A batch on its way through a stack, layer by layer.

    Attributes:
        hidden_BTC: The states after the last layer so far.
        rotations: The rotations, by kind of layer.
        masks: The stack's own tokens that each token may see, by kind of layer.
        memory_BMC: The encoder's output, for a decoder.
        memory_seen_BTM: The memory tokens that each token may see.
        caches: One cache for each layer, for a decoder that generates one token at a time.
    """

    hidden_BTC: Tensor
    rotations: Mapping[LayerType, Rotation]
    masks: Mapping[LayerType, Tensor]
    memory_BMC: Tensor | None = None
    memory_seen_BTM: Tensor | None = None
    caches: list[LayerCache] = field(default_factory=list)

    def advance(self, layer: nn.Module, kind: LayerType, number: int) -> None:
        """Apply one layer."""
        self.hidden_BTC = layer(self.hidden_BTC, *self.arguments(kind, number))

    def arguments(self, kind: LayerType, number: int) -> list[object]:
        """Return the arguments of a layer that follow the states."""
        arguments: list[object] = [self.rotations[kind], self.masks[kind]]
        if self.memory_BMC is not None:
            arguments += [self.memory_BMC, self.memory_seen_BTM]
            arguments += [self.caches[number]] if self.caches else []
        return arguments

    def through(self, stack: Stack) -> Tensor:
        """Apply all layers and the last norm; return the normed states, [B, T, C]."""
        for number, kind in enumerate(stack.settings.layer_types):
            self.advance(stack.layer(number), kind, number)
        return stack.norm(self.hidden_BTC)
