"""The vision tower of a checkpoint, run one layer at a time."""

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from t5g2convert.checkpoint.families.text_and_vision import ImageTokens, SiglipConfig
from t5g2convert.errors import CheckpointError
from t5g2convert.reference.layers import RMSNorm
from t5g2convert.reference.siglip import Projector, VisionEmbeddings, VisionLayer
from t5g2convert.reference.weights import Weights


class VisionTower:
    """SigLIP and the projector of one checkpoint.

    Args:
        weights: The checkpoint's tensors.
        settings: The tower's config.
        tokens: The config of image tokens.
        text_width: The hidden width of the text stack.
        tower: The prefix of the tower's names, `...vision_model.`
        projector: The prefix of the projector's names, `...multi_modal_projector.`
    """

    def __init__(
        self,
        weights: Weights,
        settings: SiglipConfig,
        tokens: ImageTokens,
        text_width: int,
        *,
        tower: str,
        projector: str,
    ) -> None:
        self.weights = weights
        self.settings = settings
        self.tokens = tokens
        self.text_width = text_width
        self.tower = tower
        self.projector = projector

    def stages(self, *, projected: bool = True, normed: bool = True) -> Iterator[tuple[str, nn.Module]]:
        """Yield the modules with their names in the order in which an image passes them; each is read in its turn.

        Args:
            projected: Whether the last is the projector; otherwise it is its norm, and the matrix is not read:
                it may lie in a file of its own.
            normed: Whether that norm is passed, where the projector is not.
        """
        settings = self.settings
        yield "embeddings", self.weights.module(lambda: VisionEmbeddings(settings), f"{self.tower}embeddings.")
        for number in range(settings.num_hidden_layers):
            name = f"encoder.layers.{number}"
            yield name, self.weights.module(lambda: VisionLayer(settings), f"{self.tower}{name}.")
        yield (
            "post_layernorm",
            self.weights.module(
                lambda: nn.LayerNorm(settings.hidden_size, settings.layer_norm_eps), f"{self.tower}post_layernorm."
            ),
        )
        if projected:
            yield (
                "multi_modal_projector",
                self.weights.module(
                    lambda: Projector(settings, self.tokens.mm_tokens_per_image, self.text_width), self.projector
                ),
            )
        elif normed:
            yield (
                "multi_modal_projector.mm_soft_emb_norm",
                self.weights.module(
                    lambda: RMSNorm(settings.hidden_size, settings.layer_norm_eps), f"{self.projector}mm_soft_emb_norm."
                ),
            )

    def features(self, pixels_BNYX: Tensor, *, projected: bool = True) -> Tensor:
        """Return the soft tokens of images, [B, mm_tokens_per_image, text width]; pixels have the dtype of the weights.

        Without the projector the normed states of the patches, [B, patches, vision width].
        """
        state = pixels_BNYX
        for _, module in self.stages(projected=projected):
            state = module(state)
            # The next stage is read before the name is bound anew; two need not be in memory.
            del module
        return state

    def pixel_shape(self, images: int) -> tuple[int, int, int, int]:
        """Return the shape of a batch of images."""
        side = self.settings.image_size
        return images, self.settings.num_channels, side, side


def text_only(ids_BT: Tensor, image_token: int) -> Tensor:
    """Return the ids with 0 for image tokens, which may be beyond the table; their rows are replaced anyway."""
    return torch.where(ids_BT == image_token, 0, ids_BT)


def scatter_images(embedded_BTC: Tensor, ids_BT: Tensor, image_token: int, features_ITC: Tensor) -> Tensor:
    """Replace the embeddings of image tokens by soft tokens, in order.

    Raises:
        CheckpointError: The counts differ.
    """
    at = ids_BT == image_token
    count = features_ITC.shape[0] * features_ITC.shape[1]
    if int(at.sum()) != count:
        raise CheckpointError(f"the input has {int(at.sum())} image tokens, the images give {count}")
    replaced = embedded_BTC.clone()
    replaced[at] = torch.flatten(features_ITC, 0, 1).to(embedded_BTC.dtype)
    return replaced
