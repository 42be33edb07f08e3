"""SigLIP's vision tower (arXiv 2303.15343) and its projector to soft tokens, run one layer at a time.

Names follow the published layout: `vision_tower.vision_model.` and `multi_modal_projector.`
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from t5g2convert.checkpoint.families.text_and_vision import ImageTokens, SiglipConfig
from t5g2convert.errors import CheckpointError
from t5g2convert.reference.attention import attend_fused
from t5g2convert.reference.layers import ACTIVATIONS, Linear, RMSNorm
from t5g2convert.reference.weights import Weights


class VisionEmbeddings(nn.Module):
    """The embeddings of an image's patches: projected, with a position embedding added."""

    def __init__(self, settings: SiglipConfig) -> None:
        super().__init__()
        patch, side = settings.patch_size, settings.image_size // settings.patch_size
        self.patch_embedding = nn.Conv2d(settings.num_channels, settings.hidden_size, patch, stride=patch)
        self.position_embedding = nn.Embedding(side * side, settings.hidden_size)

    def forward(self, pixels_BNYX: Tensor) -> Tensor:
        """[B, channels, height, width] to [B, P, C]."""
        return self.patch_embedding(pixels_BNYX).flatten(2).transpose(1, 2) + self.position_embedding.weight


class VisionAttention(nn.Module):
    """Multi-head attention over all patches, with biases.

    Always fused: both towers compute the same shapes, and with 4,096 patches it is four times as fast as the eager
    kernel.
    """

    def __init__(self, settings: SiglipConfig) -> None:
        super().__init__()
        hidden, self.heads = settings.hidden_size, settings.num_attention_heads
        if hidden % self.heads:
            raise CheckpointError(
                f"the vision tower's hidden_size {hidden} is not a multiple of num_attention_heads {self.heads}"
            )
        self.q_proj = Linear(hidden, hidden)
        self.k_proj = Linear(hidden, hidden)
        self.v_proj = Linear(hidden, hidden)
        self.out_proj = Linear(hidden, hidden)

    def forward(self, x_BPC: Tensor) -> Tensor:
        """[B, P, C] to [B, P, C]."""
        q, k, v = (
            project(x_BPC).view(*x_BPC.shape[:2], self.heads, -1).transpose(1, 2)
            for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        output = attend_fused(q, k, v, None, scale=q.shape[-1] ** -0.5)
        return self.out_proj(output.transpose(1, 2).flatten(2))


class VisionMLP(nn.Module):
    """Feed-forward block with biases."""

    def __init__(self, settings: SiglipConfig) -> None:
        super().__init__()
        self.fc1 = Linear(settings.hidden_size, settings.intermediate_size)
        self.fc2 = Linear(settings.intermediate_size, settings.hidden_size)
        self.activation = ACTIVATIONS[settings.hidden_act]

    def forward(self, x_BPC: Tensor) -> Tensor:
        """[B, P, C] to [B, P, C]."""
        return self.fc2(self.activation(self.fc1(x_BPC)))


class VisionLayer(nn.Module):
    """A layer of SigLIP: pre-norm attention and MLP."""

    def __init__(self, settings: SiglipConfig) -> None:
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self.self_attn = VisionAttention(settings)
        self.layer_norm2 = nn.LayerNorm(settings.hidden_size, settings.layer_norm_eps)
        self.mlp = VisionMLP(settings)

    def forward(self, x_BPC: Tensor) -> Tensor:
        """[B, P, C] to [B, P, C]."""
        x_BPC = x_BPC + self.self_attn(self.layer_norm1(x_BPC))
        return x_BPC + self.mlp(self.layer_norm2(x_BPC))


class Projector(nn.Module):
    """Patch states averaged over squares (4 x 4 of 64 x 64 to 256 tokens), normed, projected to the text's width."""

    def __init__(self, settings: SiglipConfig, image_tokens: int, text_width: int) -> None:
        super().__init__()
        self.mm_soft_emb_norm = RMSNorm(settings.hidden_size, settings.layer_norm_eps)
        self.mm_input_projection_weight = nn.Parameter(torch.empty(settings.hidden_size, text_width))
        self.side = settings.image_size // settings.patch_size
        self.kernel = self.side // int(image_tokens**0.5)

    def forward(self, x_BPC: Tensor) -> Tensor:
        """[B, P, vision width] to [B, mm_tokens_per_image, text width]."""
        grid_BCYX = x_BPC.transpose(1, 2).reshape(x_BPC.shape[0], -1, self.side, self.side)
        pooled_BCYX = functional.avg_pool2d(grid_BCYX, self.kernel, self.kernel)
        return torch.matmul(
            self.mm_soft_emb_norm(pooled_BCYX.flatten(2).transpose(1, 2)), self.mm_input_projection_weight
        )


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
        """Yield the modules with their names, in the order of computation; each is read when it is reached.

        Args:
            projected: Whether the last module is the projector. Otherwise it is the projector's norm, and the matrix is
                not read: it may be in a separate file.
            normed: Whether to yield that norm if `projected` is False.
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

        If `projected` is False, return the normed states of the patches, [B, patches, vision width].
        """
        state = pixels_BNYX
        for _, module in self.stages(projected=projected):
            state = module(state)
            # Free this stage before the next one is read: the loop variable would keep it in memory meanwhile.
            del module
        return state

    def pixel_shape(self, images: int) -> tuple[int, int, int, int]:
        """Return the shape of a batch of images."""
        side = self.settings.image_size
        return images, self.settings.num_channels, side, side


def text_only(ids_BT: Tensor, image_token: int) -> Tensor:
    """Return the ids with 0 in place of image tokens, which may be beyond the table; their rows are replaced anyway."""
    return torch.where(ids_BT == image_token, 0, ids_BT)


def scatter_images(embedded_BTC: Tensor, ids_BT: Tensor, image_token: int, features_ITC: Tensor) -> Tensor:
    """Replace the embeddings of image tokens by soft tokens, in order.

    Raises:
        CheckpointError: The numbers of image tokens and soft tokens differ.
    """
    at = ids_BT == image_token
    count = features_ITC.shape[0] * features_ITC.shape[1]
    if int(at.sum()) != count:
        raise CheckpointError(f"the input has {int(at.sum())} image tokens, but the images need {count}")
    replaced = embedded_BTC.clone()
    replaced[at] = torch.flatten(features_ITC, 0, 1).to(embedded_BTC.dtype)
    return replaced
