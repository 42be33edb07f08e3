"""T5Gemma, the first generation (arXiv 2504.06225): a bidirectional encoder and a decoder with cross-attention."""

from functools import partial
from typing import Unpack

from torch import Tensor

from t5g2convert.checkpoint.families.rope_config import LayerType
from t5g2convert.checkpoint.families.t5gemma import T5Gemma, read_t5gemma
from t5g2convert.checkpoint.families.text_and_vision import TextConfig
from t5g2convert.checkpoint.folder import Checkpoint
from t5g2convert.reference.attention import Kernel, Rotation
from t5g2convert.reference.cache import LayerCache
from t5g2convert.reference.encoder_decoder import EncoderDecoder
from t5g2convert.reference.layers import EncoderLayer, Linear, Projections, RMSNorm, StackLayer
from t5g2convert.reference.masks import around
from t5g2convert.reference.stack import Stack
from t5g2convert.reference.weights import ReadOptions, Weights


class CrossAttention(Projections):
    """Attention of the decoder's queries to the encoder's keys and values, without rotation and without a window."""

    def __init__(self, settings: TextConfig, kernel: Kernel, *, memory_size: int) -> None:
        super().__init__(settings, kernel)
        key_value, bias = self.k_proj.out_features, settings.attention_bias
        self.k_proj = Linear(memory_size, key_value, bias=bias)
        self.v_proj = Linear(memory_size, key_value, bias=bias)

    def forward(
        self, x_BTC: Tensor, memory_BMC: Tensor, memory_seen_BTM: Tensor, cache: LayerCache | None = None
    ) -> Tensor:
        """[B, T, C] to [B, T, C]; a cache already holds the memory's keys and values."""
        q_BHTD = self.q_norm(self.heads(self.q_proj(x_BTC)))
        k_BKMD, v_BKMD = self.project_memory(memory_BMC) if cache is None else cache.memory
        return self.attended(q_BHTD, k_BKMD, v_BKMD, memory_seen_BTM)


class CrossDecoderLayer(StackLayer):
    """Self-attention, attention to the encoder's output, and MLP, each with a norm before and after.

    `memory_size` is the width of the encoder's output.
    """

    def __init__(self, settings: TextConfig, kernel: Kernel, *, memory_size: int) -> None:
        super().__init__(settings, kernel)
        norm = partial(RMSNorm, settings.hidden_size, settings.rms_norm_eps)
        self.pre_cross_attn_layernorm = norm()
        self.cross_attn = CrossAttention(settings, kernel, memory_size=memory_size)
        self.post_cross_attn_layernorm = norm()

    def forward(
        self,
        x_BTC: Tensor,
        turn: Rotation,
        seen_BTS: Tensor,
        memory_BMC: Tensor | None = None,
        memory_seen_BTM: Tensor | None = None,
        cache: LayerCache | None = None,
    ) -> Tensor:
        """[B, T, C] to [B, T, C].

        Args:
            x_BTC: The states of the querying tokens; with a cache, only of tokens that the cache does not hold yet.
            turn: The rotation of these tokens.
            seen_BTS: The own tokens that each token may see, those in the cache first.
            memory_BMC: The encoder's output; None to leave out the attention to it.
            memory_seen_BTM: The memory tokens that each token may see.
            cache: Holds the keys and values of the memory, computed once, and of earlier tokens.
        """
        if cache is not None and memory_BMC is not None and not cache.started:
            cache.start(*self.cross_attn.project_memory(memory_BMC))
        x_BTC = self.through_attention(x_BTC, turn, seen_BTS, cache)
        if memory_BMC is not None:
            attended = self.cross_attn(self.pre_cross_attn_layernorm(x_BTC), memory_BMC, memory_seen_BTM, cache)
            x_BTC = x_BTC + self.post_cross_attn_layernorm(attended)
        return self.through_mlp(x_BTC)


class T5GemmaReference(EncoderDecoder):
    """The model of a T5Gemma folder.

    Args:
        checkpoint: The folder.
        kernel: The attention kernel.
        model: Settings to use instead of the folder's config.json.
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
        """Return the encoder's masks: all tokens, or the window to either side in sliding layers."""
        settings = self.encoder.settings
        return {kind: around(kind, settings.sliding_window, kept_BT) for kind in set(settings.layer_types)}
