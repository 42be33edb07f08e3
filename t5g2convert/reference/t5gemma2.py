"""T5Gemma 2 (arXiv 2512.14856): a bidirectional encoder and a decoder with merged attention."""

from typing import Unpack

from torch import Tensor

from t5g2convert.checkpoint.families.rope_config import LayerType
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2, T5Gemma2Encoder, read_t5gemma2, read_t5gemma2_encoder
from t5g2convert.checkpoint.families.t5gemma2_spellings import as_published
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.reference.attention import Kernel
from t5g2convert.reference.encoder_decoder import EncoderDecoder, Encoding
from t5g2convert.reference.layers import DecoderLayer, EncoderLayer
from t5g2convert.reference.masks import bidirectional
from t5g2convert.reference.stack import Stack
from t5g2convert.reference.vision import VisionTower, scatter_images, text_only
from t5g2convert.reference.weights import ReadOptions, Weights


class EncoderReference(Encoding):
    """The standalone encoder of a T5Gemma 2, from its own folder.

    Attributes:
        model: Its settings.
        weights: The folder's tensors.
        encoder: The text stack.
        vision: The vision tower; None for the stub of a text-only model.

    Args:
        checkpoint: The folder.
        kernel: The attention kernel.
        model: Settings to use instead of the folder's config.json.
        root: The prefix of the encoder's published names.
        reading: The dtype to compute in, the device, and whether parameters stay in memory.

    Raises:
        CheckpointError: The config is another model's, or a tensor has two spellings.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        kernel: Kernel = "eager",
        model: T5Gemma2Encoder | None = None,
        root: str = "",
        **reading: Unpack[ReadOptions],
    ) -> None:
        model = model or read_t5gemma2_encoder(checkpoint.config, checkpoint.path / "config.json")
        self.model = model
        self.weights = Weights(as_published(checkpoint).checkpoint, **reading)
        self.encoder = Stack(
            self.weights,
            model.encoder,
            EncoderLayer,
            prefix=root,
            table=f"{root}embed_tokens.weight",
            eoi_token=model.tokens.eoi_token_index,
            eoi=f"{root}embed_tokens.eoi_embedding",
            kernel=kernel,
        )
        self.vision = (
            None
            if model.vision.num_hidden_layers == 0
            else VisionTower(
                self.weights,
                model.vision,
                model.tokens,
                model.encoder.hidden_size,
                tower=f"{root}vision_tower.vision_model.",
                projector=f"{root}multi_modal_projector.",
            )
        )

    @property
    def reserved(self) -> frozenset[int]:
        """Ids of the image token and the end-of-image token."""
        return frozenset({self.model.tokens.image_token_index, self.model.tokens.eoi_token_index})

    def encoder_masks(self, kept_BT: Tensor) -> dict[LayerType, Tensor]:
        """Return the encoder's masks: all tokens, or half the window to either side in sliding layers."""
        settings = self.encoder.settings
        return {kind: bidirectional(kind, settings.sliding_window, kept_BT) for kind in set(settings.layer_types)}

    def embed(self, ids_BT: Tensor, features_ITC: Tensor | None) -> Tensor:
        """Return the embeddings, with soft tokens in place of image tokens."""
        if features_ITC is None:
            return self.encoder.embed(ids_BT)
        token = self.model.tokens.image_token_index
        return scatter_images(self.encoder.embed(text_only(ids_BT, token)), ids_BT, token, features_ITC)


class T5Gemma2Reference(EncoderReference, EncoderDecoder):
    """The model of a T5Gemma 2 folder.

    Attributes:
        model: Its settings.
        weights: The folder's tensors.
        encoder: The encoder's text stack.
        decoder: The decoder's text stack.
        vision: The vision tower; None for the stub of a text-only model.

    Args:
        checkpoint: The folder.
        kernel: The attention kernel.
        model: Settings to use instead of the folder's config.json.
        reading: The dtype to compute in, the device, and whether parameters stay in memory.

    Raises:
        CheckpointError: The config is not T5Gemma 2's, or a tensor has two spellings.
    """

    model: T5Gemma2

    def __init__(
        self,
        checkpoint: Checkpoint,
        *,
        kernel: Kernel = "eager",
        model: T5Gemma2 | None = None,
        **reading: Unpack[ReadOptions],
    ) -> None:
        model = model or read_t5gemma2(checkpoint.config, checkpoint.path / "config.json")
        super().__init__(checkpoint, kernel=kernel, model=model, root="model.encoder.", **reading)
        self.decoder = Stack(
            self.weights,
            model.decoder,
            DecoderLayer,
            prefix="model.decoder.",
            table=self.encoder.table,
            eoi_token=self.encoder.eoi_token,
            eoi=self.encoder.eoi,
            kernel=kernel,
        )
