"""The encoder-decoder that both generations of T5Gemma share: a bidirectional encoder and a causal decoder."""

from collections.abc import Mapping

import torch
from torch import Tensor

from t5g2convert.checkpoint.families.rope_config import LayerType
from t5g2convert.checkpoint.families.t5gemma import T5Gemma
from t5g2convert.checkpoint.families.t5gemma2 import T5Gemma2
from t5g2convert.reference.cache import LayerCache
from t5g2convert.reference.masks import causal, memory
from t5g2convert.reference.stack import Run, Stack
from t5g2convert.reference.vision import VisionTower
from t5g2convert.reference.weights import Weights


class Encoding:
    """The encoder of a folder; subclasses read it.

    Attributes:
        weights: The folder's tensors.
        encoder: The encoder's text stack.
        vision: The vision tower; None for a model without images.
    """

    weights: Weights
    encoder: Stack
    vision: VisionTower | None = None

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """The text stacks."""
        return (self.encoder,)

    @property
    def reserved(self) -> frozenset[int]:
        """Ids of tokens that are not embedded like other tokens."""
        return frozenset()

    def encoder_masks(self, kept_BT: Tensor) -> dict[LayerType, Tensor]:
        """Return the encoder's masks: bidirectional, limited to the window in sliding layers."""
        raise NotImplementedError

    def embed(self, ids_BT: Tensor, features_ITC: Tensor | None) -> Tensor:
        """Return the input of the encoder's first layer, [B, T, C]."""
        if features_ITC is not None:
            raise NotImplementedError("this model has no images")
        return self.encoder.embed(ids_BT)

    def start_encoder(
        self, ids_BT: Tensor, masks: Mapping[LayerType, Tensor], features_ITC: Tensor | None = None
    ) -> Run:
        """Return an encoder batch before its first layer, with any masks.

        Args:
            ids_BT: Token ids, int64.
            masks: By kind of layer; see `encoder_masks`.
            features_ITC: Soft tokens of the images in the batch, in order.
        """
        embedded = self.embed(ids_BT, features_ITC)
        return Run(embedded, self.encoder.rotations(0, ids_BT.shape[1], embedded.dtype), masks)

    @torch.inference_mode()
    def encode(self, ids_BT: Tensor, kept_BT: Tensor, features_ITC: Tensor | None = None) -> Tensor:
        """Return the encoder's output, [B, T, C]."""
        return self.start_encoder(ids_BT, self.encoder_masks(kept_BT), features_ITC).through(self.encoder)


class EncoderDecoder(Encoding):
    """The encoder-decoder of a folder; subclasses read it.

    Attributes:
        model: Its settings.
        decoder: The decoder's text stack.
    """

    model: T5Gemma | T5Gemma2
    decoder: Stack

    @property
    def stacks(self) -> tuple[Stack, ...]:
        """Both text stacks."""
        return self.encoder, self.decoder

    def start_decoder(
        self,
        ids_BT: Tensor,
        kept_BS: Tensor,
        memory_BMC: Tensor | None,
        memory_kept_BM: Tensor | None,
        caches: list[LayerCache] | None = None,
    ) -> Run:
        """Return a decoder batch before its first layer.

        Args:
            ids_BT: Token ids, int64; with caches, only the tokens that the caches do not hold yet.
            kept_BS: False at padding, for the tokens in the caches and these.
            memory_BMC: The encoder's output; None to leave out an attention that reads nothing else.
            memory_kept_BM: False at the memory's padding, or everywhere to hide the memory.
            caches: One cache for each layer; they are filled.
        """
        settings, (queries, keys) = self.decoder.settings, (ids_BT.shape[1], kept_BS.shape[1])
        embedded = self.decoder.embed(ids_BT)
        masks = {
            kind: causal(kind, settings.sliding_window, kept_BS, queries=queries) for kind in set(settings.layer_types)
        }
        rotations = self.decoder.rotations(keys - queries, keys, embedded.dtype)
        seen_BTM = None if memory_kept_BM is None else memory(queries, memory_kept_BM)
        return Run(embedded, rotations, masks, memory_BMC, seen_BTM, caches or [])

    @torch.inference_mode()
    def decode(
        self,
        ids_BT: Tensor,
        kept_BS: Tensor,
        memory_BMC: Tensor,
        memory_kept_BM: Tensor,
        caches: list[LayerCache] | None = None,
    ) -> Tensor:
        """Return the decoder's normed states, [B, T, C]; `decoder.logits` turns them into logits."""
        return self.start_decoder(ids_BT, kept_BS, memory_BMC, memory_kept_BM, caches).through(self.decoder)
