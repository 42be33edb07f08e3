"""Gemma 2, decoder-only (arXiv 2408.00118), from a checkpoint folder in any spelling."""

from typing import Unpack

import torch
from torch import Tensor

from t5g2convert.checkpoint.families.gemma2 import read_gemma2
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.reference.attention import Kernel
from t5g2convert.reference.layers import GemmaLayer
from t5g2convert.reference.masks import causal
from t5g2convert.reference.stack import Run, Stack
from t5g2convert.reference.weights import ReadOptions, Weights, only_prefix


class Gemma2Reference:
    """The model of a Gemma 2 folder.

    Attributes:
        model: Its settings.
        text: Its layers.

    Args:
        checkpoint: The folder; its tensor names may have any spelling.
        kernel: The attention kernel.
        reading: The dtype to compute in, the device, and whether parameters stay in memory.

    Raises:
        CheckpointError: The config is not Gemma 2's, or the tensor names match no spelling.
    """

    def __init__(self, checkpoint: Checkpoint, *, kernel: Kernel = "eager", **reading: Unpack[ReadOptions]) -> None:
        self.model = read_gemma2(checkpoint.config, checkpoint.path / "config.json")
        self.weights = Weights(checkpoint, **reading)
        root = only_prefix(list(checkpoint.tensors), "embed_tokens.weight", checkpoint)
        self.text = Stack(
            self.weights,
            self.model.text,
            GemmaLayer,
            prefix=root,
            table=f"{root}embed_tokens.weight",
            head=None if self.model.text.tie_word_embeddings else "lm_head.weight",
            kernel=kernel,
        )

    def start(self, ids_BT: Tensor, kept_BT: Tensor) -> Run:
        """Return a batch before its first layer; ids are int64, and `kept_BT` is False at padding."""
        settings, embedded = self.text.settings, self.text.embed(ids_BT)
        masks = {kind: causal(kind, settings.sliding_window, kept_BT) for kind in set(settings.layer_types)}
        return Run(embedded, self.text.rotations(0, ids_BT.shape[1], embedded.dtype), masks)

    @torch.inference_mode()
    def logits(self, ids_BT: Tensor, kept_BT: Tensor) -> Tensor:
        """Return the logits of every token, [B, T, V]."""
        return self.text.logits(self.start(ids_BT, kept_BT).through(self.text))
