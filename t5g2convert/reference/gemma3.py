"""Gemma 3, decoder-only, with or without images (arXiv 2503.19786), from a checkpoint folder in any spelling."""

from copy import copy
from typing import Unpack

import torch
from torch import Tensor

from t5g2convert.checkpoint.families.gemma3 import read_gemma3
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.reference.attention import Kernel
from t5g2convert.reference.layers import GemmaLayer
from t5g2convert.reference.masks import causal
from t5g2convert.reference.stack import Run, Stack
from t5g2convert.reference.vision import VisionTower, scatter_images, text_only
from t5g2convert.reference.weights import ReadOptions, Weights, only_prefix


class Gemma3Reference:
    """The model of a Gemma 3 folder.

    Attributes:
        model: Its settings.
        text: The text stack.
        vision: The vision tower; None for a text-only model.

    Args:
        checkpoint: The folder; its tensor names may have any spelling.
        kernel: The attention kernel.
        reading: The dtype to compute in, the device, and whether parameters stay in memory.

    Raises:
        CheckpointError: The config is not Gemma 3's, or the tensor names match no spelling.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        kernel: Kernel = "eager",
        **reading: Unpack[ReadOptions],
    ) -> None:
        model = read_gemma3(checkpoint.config, checkpoint.path / "config.json", checkpoint.tensors)
        self.model = model
        self.weights = Weights(checkpoint, **reading)
        names = list(checkpoint.tensors)
        root = only_prefix(names, "embed_tokens.weight", checkpoint)
        self.text = Stack(
            self.weights,
            model.text,
            GemmaLayer,
            prefix=root,
            table=f"{root}embed_tokens.weight",
            eoi_token=model.tokens.eoi_token_index,
            kernel=kernel,
        )
        self.vision = (
            None
            if model.vision is None
            else VisionTower(
                self.weights,
                model.vision,
                model.tokens,
                self.text.settings.hidden_size,
                tower=only_prefix(names, "embeddings.patch_embedding.weight", checkpoint),
                projector=only_prefix(names, "mm_input_projection_weight", checkpoint),
            )
        )

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The text stack."""
        return (self.text,)

    @property
    def reserved(self) -> frozenset[int]:
        """Ids that are not embedded like other tokens: image tokens and the end-of-image token."""
        return frozenset({self.model.tokens.image_token_index, self.model.tokens.eoi_token_index})

    def with_table_of(self, other: "Gemma3Reference") -> "Gemma3Reference":
        """Return this model with the embedding matrix of another model of the same width."""
        changed = copy(self)
        changed.text = self.text.with_table_of(other.text)
        return changed

    def start(self, ids_BT: Tensor, kept_BT: Tensor, features_ITC: Tensor | None = None) -> Run:
        """Return a batch before its first layer.

        Args:
            ids_BT: Token ids, int64.
            kept_BT: False at padding.
            features_ITC: Soft tokens of the images in the batch, in order; the tokens of an image see each other in
                both directions.
        """
        token, blocks = self.model.tokens.image_token_index, None
        if features_ITC is None:
            embedded = self.text.embed(ids_BT)
        else:
            embedded = scatter_images(self.text.embed(text_only(ids_BT, token)), ids_BT, token, features_ITC)
            blocks = image_blocks(ids_BT, token)
        settings = self.text.settings
        masks = {
            kind: causal(kind, settings.sliding_window, kept_BT, blocks_BS=blocks) for kind in set(settings.layer_types)
        }
        return Run(embedded, self.text.rotations(0, ids_BT.shape[1], embedded.dtype), masks)

    @torch.inference_mode()
    def logits(self, ids_BT: Tensor, kept_BT: Tensor, features_ITC: Tensor | None = None) -> Tensor:
        """Return the logits of every token, [B, T, V]."""
        return self.text.logits(self.start(ids_BT, kept_BT, features_ITC).through(self.text))


def image_blocks(ids_BT: Tensor, image_token: int) -> Tensor:
    """Return the number of the image that each token belongs to, 0 for text; runs of image tokens count from 1."""
    inside = ids_BT == image_token
    before = torch.nn.functional.pad(inside, (1, 0))[:, :-1]
    return torch.where(inside, (inside & ~before).cumsum(1), 0)
