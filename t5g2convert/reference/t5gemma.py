"""T5Gemma, the first generation (arXiv 2504.06225): an encoder that sees both ways, a decoder with cross-attention."""

from functools import partial
from typing import Unpack

from torch import Tensor

from t5g2convert.checkpoint.families.rope_config import LayerType
from t5g2convert.checkpoint.families.t5gemma import T5Gemma, read_t5gemma
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.reference.attention import Kernel
from t5g2convert.reference.cross_attention import CrossDecoderLayer
from t5g2convert.reference.encoder_decoder import EncoderDecoder
from t5g2convert.reference.layers import EncoderLayer
from t5g2convert.reference.masks import around
from t5g2convert.reference.stack import Stack
from t5g2convert.reference.weights import ReadOptions, Weights


class T5GemmaReference(EncoderDecoder):
    """The model of a T5Gemma folder.

    Args:
        checkpoint: The folder.
        kernel: The attention kernel.
        model: Settings to use instead of those of the folder's config.json.
        reading: The dtype to compute in, the device, and whether parameters stay in memory.

    Raises:
        CheckpointError: The config is not T5Gemma's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        kernel: Kernel = "eager",
        model: T5Gemma | None = None,
        **reading: Unpack[ReadOptions],
    ) -> None:
        self.model: T5Gemma = model or read_t5gemma(checkpoint.config, checkpoint.path / "config.json")
        self.weights = Weights(checkpoint, **reading)
        self.encoder = Stack(
            self.weights,
            self.model.encoder,
            EncoderLayer,
            prefix="model.encoder.",
            table="model.encoder.embed_tokens.weight",
            kernel=kernel,
        )
        self.decoder = Stack(
            self.weights,
            self.model.decoder,
            partial(CrossDecoderLayer, memory_size=self.model.encoder.hidden_size),
            prefix="model.decoder.",
            table="model.decoder.embed_tokens.weight",
            head=None if self.model.tied else "lm_head.out_proj.weight",
            kernel=kernel,
        )

    def encoder_masks(self, kept_BT: Tensor) -> dict[LayerType, Tensor]:
        """Both ways, in sliding layers the window to either side."""
        settings = self.encoder.settings
        return {kind: around(kind, settings.sliding_window, kept_BT) for kind in set(settings.layer_types)}
